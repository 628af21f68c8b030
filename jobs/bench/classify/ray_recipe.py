"""The batch inference that Ray's documentation teaches, for the bundle's network.

https://docs.ray.io/en/latest/data/examples/pytorch_resnet_batch_prediction.html ('Image Classification Batch Inference
with PyTorch'). As there: `read_images` in mode RGB, a `map` with torchvision's transforms that keeps the original image
beside the transformed one, `map_batches` with a class that holds the eager network, and `write_parquet` of the labels.
Different: the network, its weights, size and normalisation; no GPU; as many actors of one CPU as leave one CPU to the
reading tasks; a batch of 32, since 720, which fills the documentation's GPU, only delays a CPU; and two columns with
the times at which an image was ready and was scored.

    python -m jobs.bench.classify.ray_recipe FOLDER OUT NETWORK.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class Classifier:
    """The documentation's callable class: the network is made once per actor."""

    def __init__(self, network: dict[str, Any]) -> None:
        import timm

        self._net = timm.create_model(
            network["model"], num_classes=network["classes"], checkpoint_path=network["checkpoint"]
        )
        self._net.eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score a batch."""
        import numpy as np
        import torch

        images_BCHW = torch.from_numpy(batch["transformed_image"])
        with torch.inference_mode():
            labels_B = self._net(images_BCHW).argmax(dim=1)
        return {
            "path": batch["path"],
            "predicted_label": labels_B.numpy(),
            "transformed_at": batch["transformed_at"],
            "scored_at": np.full(len(labels_B), time.time()),
            "original_image": batch["original_image"],
        }


def main(source: str, out: str, network: dict[str, Any]) -> None:
    """Write the label of each image of a source."""
    import ray.data
    from ray.data import ActorPoolStrategy

    from carray.core.ray.connect import start_ray

    with start_ray() as running:
        images = ray.data.read_images(source, mode="RGB", include_paths=True)
        predictions = images.map(_transform(network)).map_batches(
            Classifier,
            fn_constructor_args=[network],
            compute=ActorPoolStrategy(size=max(1, running.cpus - 1)),
            batch_size=32,
        )
        predictions.drop_columns(["original_image"]).write_parquet(out)


def _transform(network: dict[str, Any]) -> Any:
    """Make the row's function: torchvision's counterpart of the bundle's pixel settings."""
    from torchvision import transforms

    resized = round(network["input_size"] / network["crop_pct"])
    transform = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Resize((resized, resized) if network["crop_mode"] == "squash" else resized, antialias=True),
            transforms.CenterCrop(network["input_size"]),
            transforms.Normalize(network["mean"], network["std"]),
        ]
    )

    def preprocess_image(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "path": row["path"],
            "transformed_at": time.time(),
            "original_image": row["image"],
            "transformed_image": transform(row["image"]).numpy(),
        }

    return preprocess_image


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()))

"""The loop of timm's `inference.py`, which its wheel leaves out, with timm's own create_model, dataset and loader.

https://github.com/huggingface/pytorch-image-models/blob/main/inference.py, on the CPU, with channels_last.
`jobs.bench.classify.arms` runs it with a network and its views as JSON for its argument.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any


def main(task: dict[str, Any]) -> None:
    """Classify a folder into a CSV file; the last line of output is JSON."""
    import pandas as pd
    import torch
    from timm.data import create_dataset, create_loader
    from timm.models import create_model

    network: Any = create_model(task["model"], num_classes=task["classes"], checkpoint_path=task["checkpoint"])
    network = network.eval().to(memory_format=torch.channels_last)
    if task["compiled"]:
        network = torch.compile(network)
    loader = create_loader(
        create_dataset(root=task["images"], name=""),
        input_size=(3, task["input_size"], task["input_size"]),
        batch_size=task["batch"],
        use_prefetcher=True,
        num_workers=task["workers"],
        device=torch.device("cpu"),
        interpolation="bilinear",
        **{name: task[name] for name in ("crop_pct", "crop_mode", "mean", "std")},
    )
    indices, scores, seconds = _score(network, loader)
    names = loader.dataset.filenames(basename=True)
    table = pd.DataFrame({"filename": names, "index": indices, "prob": scores})
    table.set_index("filename").sort_index().to_csv(task["out"])
    batch_seconds = statistics.median(seconds[1:-1] or seconds)
    print(json.dumps({"images": len(names), "steady_images_per_second": task["batch"] / batch_seconds}))


def _score(network: Any, loader: Any) -> tuple[list[int], list[float], list[float]]:
    """Return the likeliest class of each image, its probability, and the seconds of each batch, waiting included."""
    import torch

    indices: list[int] = []
    scores: list[float] = []
    seconds: list[float] = []
    before = time.monotonic()
    with torch.inference_mode():
        for images_BCHW, _ in loader:
            top_B1, classes_B1 = network(images_BCHW).softmax(-1).topk(1)
            indices += classes_B1[:, 0].tolist()
            scores += top_B1[:, 0].tolist()
            seconds.append(time.monotonic() - before)
            before = time.monotonic()
    return indices, scores, seconds


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""The loop of timm's `inference.py`, which its wheel leaves out, with timm's own create_model, dataset and loader.

https://github.com/huggingface/pytorch-image-models/blob/main/inference.py. It takes the arguments of that script which
the benchmark gives, so one command line runs either.

    python -m jobs.bench.classify.timm_loop --data-dir FOLDER --model NAME --checkpoint FILE --num-classes K ...
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def timm_arguments(
    network: dict[str, Any], *, images: str, out: Path, batch: int, workers: int, compiled: bool
) -> list[str]:
    """Return inference.py's arguments for a network and its views, on the CPU."""
    size, mean, std = network["input_size"], network["mean"], network["std"]
    words = ["--data-dir", images, "--model", network["model"], "--checkpoint", network["checkpoint"]]
    words += ["--num-classes", network["classes"], "--input-size", 3, size, size, "--crop-pct", network["crop_pct"]]
    words += ["--crop-mode", network["crop_mode"], "--interpolation", "bilinear", "--mean", *mean, "--std", *std]
    words += ["--device", "cpu", "--channels-last", "--batch-size", batch, "--workers", workers]
    words += ["--results-dir", out.parent, "--results-file", out.name, "--include-index", "--label-type", "none"]
    return [str(word) for word in [*words, "--no-console-results", *(["--torchcompile"] if compiled else [])]]


def main(words: Sequence[str] | None = None) -> None:
    """Classify a folder into a CSV file; the last line of output is JSON."""
    arguments = _arguments(words)
    import torch
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.models import create_model

    network: Any = create_model(
        arguments.model, num_classes=arguments.num_classes, checkpoint_path=arguments.checkpoint
    )
    views = resolve_data_config(vars(arguments), model=network)
    network = network.to(arguments.device).eval()
    if arguments.channels_last:
        network = network.to(memory_format=torch.channels_last)
    if arguments.torchcompile:
        network = torch.compile(network, backend=arguments.torchcompile)
    loader = create_loader(
        create_dataset(root=arguments.data_dir, name=""),
        batch_size=arguments.batch_size,
        use_prefetcher=True,
        num_workers=arguments.workers,
        device=torch.device(arguments.device),
        **views,
    )
    indices, scores, seconds = _score(network, loader)
    names = loader.dataset.filenames(basename=True)
    _write(Path(arguments.results_dir) / arguments.results_file, names, indices, scores)
    batch_seconds = statistics.median(seconds[1:-1] or seconds)
    print(json.dumps({"images": len(names), "steady_images_per_second": arguments.batch_size / batch_seconds}))


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


def _write(file: Path, names: list[str], indices: list[int], scores: list[float]) -> None:
    import pandas as pd

    table = pd.DataFrame({"filename": names, "index": indices, "prob": scores})
    table.set_index("filename").sort_index().to_csv(file)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data-dir", "model", "checkpoint", "crop-mode", "interpolation", "device", "results-dir"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--results-file", required=True)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--input-size", type=int, nargs=3)
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--mean", type=float, nargs="+")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--torchcompile", nargs="?", const="inductor")
    parser.add_argument("--include-index", action="store_true", help="always so")
    parser.add_argument("--label-type", default="none", choices=["none"], help="always so")
    parser.add_argument("--no-console-results", action="store_true", help="always so")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()

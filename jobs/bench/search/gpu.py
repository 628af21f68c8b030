"""Runs the search of jobs/configs/cars-gpu.yaml on this machine's GPU, and measures the winner on test images.

    python -m jobs.bench.search.gpu --data ../shared/stanford-cars [--set search.time_budget_minutes=5]

Appends a row to results/gpu.csv, and resumes what `--work` already holds. If something is missing it says what, and
ends with exit code 2. Not yet run on a GPU. Cost: the time budget of the configuration (20 minutes), and a few minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.bench.rows import CARS, ORIGIN, ROOT, append_rows, new_parser, origin, run_carray

CONFIG = "jobs/configs/cars-gpu.yaml"
NEEDED = ("torch", "torchvision", "timm", "ray", "pandas", "pyarrow", "cv2", "pydantic", "safetensors", "onnxruntime")
COLUMNS = [*ORIGIN, "torch", "trials", "epochs", "spent_minutes", "winner", "val_top1", "test_images", "test_top1"]


def main() -> None:
    """Search, measure, and append a row."""
    parser = new_parser(__doc__)
    parser.add_argument("--data", default=CARS, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--manifest", type=Path, help="one that carray prepare made already")
    parser.add_argument("--work", default=ROOT / "runs" / "gpu", type=Path, help="folder of manifest, run and so on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the search")
    parser.add_argument("--results", default=ROOT / "results" / "gpu.csv", type=Path, help="the table to append to")
    arguments = parser.parse_args()
    if missing := lacking(arguments.manifest or arguments.data):
        print(f"gpu: {missing}", file=sys.stderr)
        raise SystemExit(2)
    import torch

    row = origin("jobs.bench.search.gpu", accelerator=torch.cuda.get_device_name()) | {"torch": torch.__version__}
    row |= measure(arguments)
    append_rows(arguments.results, COLUMNS, [row])
    print(json.dumps(row))


def lacking(source: Path) -> str | None:
    """Return a sentence about what this machine lacks for the search; None if nothing."""
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        return f"this Python has no {', '.join(absent)}; install carray with its dependencies (make)."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU; run it on a machine with one, or jobs.bench.cars on CPUs."
    if not source.exists():
        return f"{source} does not exist; name photographs with --data or a manifest with --manifest."
    return None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, search and evaluate; returns the figures of the winner."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    manifest = (arguments.manifest or work / "manifest.parquet").resolve()
    if not manifest.exists():
        run_carray("prepare", arguments.data.resolve(), "--out", manifest)
    changes = [word for setting in arguments.set for word in ("--set", setting)]
    found = run_carray("tune", "--manifest", manifest, "--out", work / "run", "--config", ROOT / CONFIG, *changes)
    run_carray("evaluate", found["bundle"], "--manifest", manifest, "--out", work / "evaluation")
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())

    import pandas as pd

    return {
        "trials": found["trials"],
        "epochs": len(pd.read_parquet(work / "run" / "epochs.parquet")),
        "spent_minutes": round(found["spent"]["minutes"], 1),
        "winner": found["best_trial"],
        "val_top1": round(found["best_val_top1"], 4),
        "test_images": metrics["images"],
        "test_top1": metrics["top1"],
    }


if __name__ == "__main__":
    main()

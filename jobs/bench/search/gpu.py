"""Runs the search of jobs/configs/cars-gpu.yaml on this machine's GPU, and measures the winner on test images.

    python -m jobs.bench.search.gpu --data ../shared/stanford-cars [--set search.time_budget_minutes=5]

Appends a row to results/gpu.csv, and resumes what `--work` already holds. If something is missing it says what, and
ends with exit code 2. Not yet run on a GPU. Cost: the time budget of the configuration (20 minutes), and a few minutes.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

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
    given = parser.parse_args()
    if missing := lacking(given.manifest or given.data):
        print(f"gpu: {missing}", file=sys.stderr)
        raise SystemExit(2)
    import pandas as pd
    import torch

    work = given.work.resolve()
    manifest, run = (given.manifest or work / "manifest.parquet").resolve(), work / "run"
    if not manifest.exists():
        run_carray("prepare", given.data.resolve(), "--out", manifest)
    changes = [word for setting in given.set for word in ("--set", setting)]
    found = run_carray("tune", "--manifest", manifest, "--out", run, "--config", CONFIG, *changes)
    run_carray("evaluate", found["bundle"], "--manifest", manifest, "--out", work / "evaluation")
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())
    row = origin("jobs.bench.search.gpu", accelerator=torch.cuda.get_device_name()) | {
        "torch": torch.__version__,
        "trials": found["trials"],
        "epochs": len(pd.read_parquet(run / "epochs.parquet")),
        "spent_minutes": round(found["spent"]["minutes"], 1),
        "winner": found["best_trial"],
        "val_top1": round(found["best_val_top1"], 4),
        "test_images": metrics["images"],
        "test_top1": metrics["top1"],
    }
    append_rows(given.results, COLUMNS, [row])
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


if __name__ == "__main__":
    main()

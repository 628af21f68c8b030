"""Runs the search of jobs/configs/cars-gpu.yaml on this machine's GPU, and measures the winner on test images.

    python jobs/bench_gpu.py --data ../shared/stanford-cars [--set search.time_budget_minutes=5]

From: labelled photographs, or a manifest of them, and a GPU that torch sees. To: a row of results/gpu.csv; manifest,
run and evaluation lie in --work, and what is there already is not done again. Where something is missing it ends with
a sentence that names it, and exit code 2. Not yet run on a GPU.
Cost: the time budget of the configuration (20 minutes), and a few minutes for packing and measuring.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.bench.rows import ORIGIN, append_rows, origin

CONFIG = "jobs/configs/cars-gpu.yaml"
NEEDED = ("torch", "torchvision", "timm", "ray", "pandas", "pyarrow", "cv2", "pydantic", "safetensors", "onnxruntime")
COLUMNS = [*ORIGIN, "torch", "trials", "epochs", "spent_minutes", "winner", "val_top1", "test_images", "test_top1"]


def main() -> None:
    """Search, measure, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))
    parser.add_argument("--data", default=beside, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--manifest", type=Path, help="one that carray prepare made already")
    parser.add_argument("--work", default=ROOT / "runs" / "gpu", type=Path, help="where manifest, run and so on lie")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting of the search")
    parser.add_argument("--results", default=ROOT / "results" / "gpu.csv", type=Path, help="where the row is added")
    arguments = parser.parse_args()
    if missing := lacking(arguments.manifest or arguments.data):
        print(f"bench_gpu: {missing}", file=sys.stderr)
        raise SystemExit(2)
    import torch

    row = origin("jobs/bench_gpu.py", accelerator=torch.cuda.get_device_name()) | {"torch": torch.__version__}
    row |= measure(arguments)
    append_rows(arguments.results, COLUMNS, [row])
    print(json.dumps(row))


def lacking(source: Path) -> str | None:
    """Say in a sentence what this machine lacks for the search; None where nothing is missing."""
    if absent := [name for name in NEEDED if find_spec(name) is None]:
        return f"this Python has no {', '.join(absent)}; install carray with its dependencies (make)."
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU; run it on a machine with one, or jobs/bench_cars.py on CPUs."
    if not source.exists():
        return f"{source} does not exist; name photographs with --data or a manifest with --manifest."
    return None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prepare, search and evaluate with the commands that a user has; the figures of the winner."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    manifest = (arguments.manifest or work / "manifest.parquet").resolve()
    if not manifest.exists():
        carray("prepare", arguments.data.resolve(), "--out", manifest)
    changes = [word for setting in arguments.set for word in ("--set", setting)]
    found = carray("tune", "--manifest", manifest, "--out", work / "run", "--config", ROOT / CONFIG, *changes)
    carray("evaluate", found["bundle"], "--manifest", manifest, "--out", work / "evaluation")
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


def carray(*words: object) -> dict[str, Any]:
    """Run a carray command; the JSON of its last line."""
    command = [sys.executable, "-m", "carray", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()

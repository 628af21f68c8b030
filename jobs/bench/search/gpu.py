"""Runs the search of jobs/configs/cars-gpu.yaml on this machine's GPU, and measures the winner on test images.

    python -m jobs.bench.search.gpu --data ../shared/stanford-cars [--set search.time_budget_minutes=5]

Appends a row to results/gpu.csv, and resumes what `--work` already holds. Exit code 2 without a GPU that torch sees.
Not yet run. Cost: the time budget of the configuration (20 minutes), and a few minutes.
"""

from __future__ import annotations

import json
from pathlib import Path

from jobs.bench.rows import CARS, ROOT, Program, check_devkit, run_carray

CONFIG = "jobs/configs/cars-gpu.yaml"


def main() -> None:
    """Search, measure, and append a row."""
    program = Program(__doc__, "gpu.csv")
    program.option("--data", default=CARS, type=Path, help="Stanford Cars in its devkit's layout")
    program.option("--work", default=ROOT / "runs" / "gpu", type=Path, help="folder of manifest, run and so on")
    program.option("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the search")
    given = program.parse()
    import torch

    if not torch.cuda.is_available():
        program.parser.error(f"torch {torch.__version__} sees no GPU; run it on a machine with one.")
    check_devkit(program.parser, given.data)
    program.accelerator = torch.cuda.get_device_name()
    work = given.work.resolve()
    manifest, run = work / "manifest.parquet", work / "run"
    if not manifest.exists():
        run_carray("prepare", given.data.resolve(), "--out", manifest)
    changes = [word for setting in given.set for word in ("--set", setting)]
    found = run_carray("tune", "--manifest", manifest, "--out", run, "--config", CONFIG, *changes)
    run_carray("evaluate", found["bundle"], "--manifest", manifest, "--out", work / "evaluation")
    metrics = json.loads((work / "evaluation" / "metrics.json").read_text())
    row = {
        "torch": torch.__version__,
        "trials": found["trials"],
        "epochs": len(list((run / "log").glob("*.json"))),
        "spent_minutes": round(found["spent"]["minutes"], 1),
        "winner": found["best_trial"],
        "val_top1": round(found["best_val_top1"], 4),
        "test_images": metrics["images"],
        "test_top1": metrics["top1"],
    }
    program.record([row])
    print(json.dumps(row))


if __name__ == "__main__":
    main()

"""Measures the search: its speed beside the recipe of Ray's documentation, what early stopping saves, what it reaches.

    python -m jobs.bench.search --data ../shared/stanford-cars [--work runs/bench-tune] [--parts cnn,frozen] [--quick]

Appends rows to results/tune.csv, one per measured arm, and writes curves to results/tune/. All parts share a manifest.

    fixed      what a trial costs besides its training: (seconds of n trials - seconds of 1) / (n - 1)
    cnn        epochs per core-minute of a small CNN at 64 pixels, both arms
    frozen     of EfficientNet-Lite0 at 160 pixels, training its last two stages
    all        of the whole of it, one epoch on a quarter of the images
    curves     trains 32 configurations in full, on a quarter of the classes
    live       one search with ASHA over the same configurations, beside those curves
    rung0      rung 0's ranking of backbones and sizes beside the one after training, on half of the classes
    accuracy   one search by jobs/configs/cars-cpu.yaml with its final fit, measured on cars_test once

Cost on two cores: fixed to all 30 minutes, curves and live 10, rung0 5, accuracy 55. `--quick` runs every part on a few
images in minutes, and writes to the work folder only, whatever `--results` names. Ends with the rows as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.rows import Program, cores, prepare_cars, run_carray, run_python
from jobs.bench.search import curves, rates

CONFIG = "jobs/configs/cars-cpu.yaml"
_QUICK_CONFIG = "jobs/configs/quick.yaml"
_QUICK_SEARCH = ["--trials", "2", "--epochs", "1", "--set", "search.refit=true"]
PARTS = ["fixed", "cnn", "frozen", "all", "curves", "live", "rung0", "accuracy"]


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    program = Program(__doc__, "tune.csv")
    program.cars_options("bench-tune")
    program.option("--manifest", type=Path, help="one that carray prepare made of it already")
    program.option("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    program.option("--loaders", default=0, type=int, help="the recipe's DataLoader processes per trial")
    program.option("--quick", action="store_true", help="a few images, to see that it works")
    arguments = program.parse()
    if arguments.manifest is None:
        program.check_cars()
    work = arguments.work.resolve()
    shutil.rmtree(work / "measured", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(arguments, work)
    if arguments.quick:
        arguments.results = work / "results" / "tune.csv"
    done: list[dict[str, Any]] = []
    for part in program.parts("parts", PARTS):
        print(f"== {part}", flush=True)
        rows = _measure(part, arguments, manifest, work / "measured", arguments.results.parent / "tune")
        program.record(rows)
        done += rows
    print(json.dumps(done))


def _manifest(arguments: argparse.Namespace, work: Path) -> str:
    manifest = arguments.manifest.resolve() if arguments.manifest else prepare_cars(arguments.data.resolve(), work)
    if not arguments.quick:
        return str(manifest)
    most = {"train": 12, "val": 4, "test": 4}
    return rates.keep_images(str(manifest), work / "quick.parquet", classes=6, most=most).uri


def _measure(
    part: str, arguments: argparse.Namespace, manifest: str, work: Path, results: Path
) -> list[dict[str, Any]]:
    quick = arguments.quick
    plan = curves.QUICK if quick else curves.FULL
    if part == "fixed":
        return rates.measure_fixed(manifest, work, quick=quick)
    if part in rates.CASES:
        case = (rates.QUICK_CASES if quick else rates.CASES)[part]
        return rates.measure_case(case, manifest, work, loaders=arguments.loaders)
    if part == "curves":
        return [curves.train_curves(plan, manifest, work, results)]
    if part == "live":
        return curves.run_live(plan, manifest, work, results)
    if part == "rung0":
        return [rates.measure_rung0(manifest, work, results, quick=quick)]
    config, extra = (_QUICK_CONFIG, _QUICK_SEARCH) if quick else (CONFIG, [])
    return [measure_accuracy(manifest, work, config=config, extra=extra)]


def measure_accuracy(manifest: str, work: Path, *, config: str, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Tune by the configuration, and evaluate the winner on cars_test once; `extra` are more arguments of tune.

    All choices are made on validation images. The reference speed tells how fast the machine was before and after.
    """
    before = reference_speed()
    print(
        f"reference speed: {before:.1f} images a second (EfficientNet-Lite0, 160 pixels, {cores()} cores)", flush=True
    )
    folder, started = work / "accuracy", time.monotonic()
    run = folder / "run"
    outcome = run_carray("tune", "--manifest", manifest, "--out", run, "--config", config, *extra)
    total_minutes = (time.monotonic() - started) / 60
    run_carray("evaluate", run / "bundle", "--manifest", manifest, "--out", folder / "evaluation")
    after = reference_speed()
    test = json.loads((folder / "evaluation" / "metrics.json").read_text())
    log = [json.loads(path.read_text()) for path in sorted((run / "log").glob("*.json"))]
    search_minutes = max(entry["clock_seconds"] for entry in log) / 60
    return {
        "part": "accuracy",
        "arm": "carray",
        "trials": outcome["trials"],
        "epochs": len(log),
        "search_minutes": round(search_minutes, 1),
        "refit_minutes": round(total_minutes - search_minutes, 1),
        "total_minutes": round(total_minutes, 1),
        "val_top1": round(float(outcome["best_val_top1"]), 4),
        **{f"test_{name}": round(test[name], 4) for name in ("top1", "top5", "loss")},
        "reference_images_per_second": round((before + after) / 2, 1),
        "note": f"reference speed {before:.1f} before, {after:.1f} after; refit_minutes has packing and starting in it",
    }


def reference_speed(*, seconds: float = 10.0) -> float:
    """Measure the images a second of EfficientNet-Lite0's forward pass at 160 pixels, float32, all cores."""
    program = f"""
import time, timm, torch
torch.set_num_threads({cores()})
net = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval().to(memory_format=torch.channels_last)
images = torch.zeros(32, 3, 160, 160).contiguous(memory_format=torch.channels_last)
with torch.inference_mode():
    net(images)
    started, passes = time.monotonic(), 0
    while time.monotonic() - started < {seconds}:
        net(images)
        passes += 1
print(passes * 32 / (time.monotonic() - started))
"""
    return float(run_python("-c", program))


if __name__ == "__main__":
    main()

"""Measures what two cores reach in an hour: one search with its final fit, and one look at cars_test.

From: Stanford Cars and jobs/configs/cars-cpu.yaml. To: a row of results/tune.csv.
Invariants: everything is chosen on validation images; cars_test is measured once, with what `carray tune` packed; the
reference speed says how fast the machine was before and after, since shared machines differ from hour to hour.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT, cores

__all__ = ["CONFIG", "measure_accuracy", "reference_speed", "run_carray"]

CONFIG = "jobs/configs/cars-cpu.yaml"


def run_carray(*arguments: object) -> str:
    """Run a carray command; gives its standard output, while its progress goes to ours."""
    command = [sys.executable, "-m", "carray", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measure_accuracy(manifest: str, work: Path, *, config: str, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Tune by the configuration, evaluate on cars_test once; `extra` are more arguments of carray tune."""
    before = reference_speed()
    print(
        f"reference speed: {before:.1f} images a second (EfficientNet-Lite0, 160 pixels, {cores()} cores)", flush=True
    )
    run, started = work / "accuracy" / "run", time.monotonic()
    tuned = run_carray("tune", "--manifest", manifest, "--out", run, "--config", config, *extra)
    total_minutes = (time.monotonic() - started) / 60
    run_carray("evaluate", run / "bundle", "--manifest", manifest, "--out", work / "accuracy" / "evaluation")
    after = reference_speed()
    outcome = json.loads(tuned.splitlines()[-1])
    test = json.loads((work / "accuracy" / "evaluation" / "metrics.json").read_text())
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
        "test_top1": round(test["top1"], 4),
        "test_top5": round(test["top5"], 4),
        "test_loss": round(test["loss"], 4),
        "reference_images_per_second": round((before + after) / 2, 1),
        "note": f"reference speed {before:.1f} before, {after:.1f} after; refit_minutes has packing and starting in it",
    }


def reference_speed(*, seconds: float = 10.0) -> float:
    """Give the images a second of a fixed load: EfficientNet-Lite0's forward pass at 160 pixels, float32, all cores."""
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
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)

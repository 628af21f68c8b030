"""Compares `carray estimate` with what then happens: a classification and a search, each estimated and then run.

    python -m jobs.bench.estimate --bundle run/bundle --images FOLDER --manifest manifest.parquet [--times 3]

Appends a row per job to results/estimate.csv: predicted range, measured seconds, and whether they are inside. Each
estimate is made before its job, on the same machine, which should do nothing else. Cost: with jobs/configs/quick.yaml
and 5,700 photographs about ten minutes a time. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from jobs.bench.rows import ROOT, Program, cores, run_carray, set_words


def main() -> None:
    """Estimate, run and compare what the arguments name, and write the results."""
    program, rows = Program(__doc__, "estimate.csv"), []
    program.option("--bundle", type=Path, help="to classify --images with")
    program.option("--images", type=Path, help="folder of images")
    program.option("--manifest", type=Path, help="to search over")
    program.option("--config", default=ROOT / "jobs/configs/quick.yaml", type=Path, help="of the search")
    program.option("--set", action="append", default=[], help="setting of the search; repeatable")
    program.option("--times", type=int, default=1, help="how often each is estimated and run")
    given = program.parse()
    for _ in range(given.times):
        checks = [check_classify(given.bundle, given.images)] if given.bundle else []
        checks += [check_tune(given.manifest, given.config, given.set)] if given.manifest else []
        program.record(checks)
        rows += checks
    print(json.dumps({"estimates": len(rows), "inside": sum(row["inside"] for row in rows)}))


def check_classify(bundle: Path, images: Path) -> dict[str, Any]:
    """Estimate a classification of a folder, run it, and compare."""
    before = _load_per_core()
    said, estimate_seconds = _timed("estimate", "classify", bundle, images)
    with tempfile.TemporaryDirectory() as out:
        done, seconds = _timed("classify", bundle, images, "--out", f"{out}/predictions")
    row = {"part": "classify", "images": done["images"], "probe_images": said["probed_images"]}
    return row | compare(said["seconds"], seconds, load_before=before, estimate_seconds=estimate_seconds)


def check_tune(manifest: Path, config: Path, changes: Sequence[str]) -> dict[str, Any]:
    """Estimate a search, run it with an empty cache, and compare."""
    before = _load_per_core()
    wanted = ["--manifest", manifest, "--config", config, *set_words(changes)]
    said, estimate_seconds = _timed("estimate", "tune", *wanted)
    with tempfile.TemporaryDirectory() as folder:
        done, seconds = _timed("tune", *wanted, "--out", f"{folder}/run", CARRAY_CACHE=folder)
        epochs = len(pd.read_parquet(f"{folder}/run/epochs.parquet"))
    row = {"part": "tune", "images": said["images"], "trials": done["trials"]}
    row |= compare(said["seconds"], seconds, load_before=before, estimate_seconds=estimate_seconds)
    low, high = said["epochs"]
    return row | {"predicted_low_epochs": low, "predicted_high_epochs": high, "actual_epochs": epochs}


def compare(
    predicted: Sequence[float], seconds: float, *, load_before: float, estimate_seconds: float
) -> dict[str, Any]:
    """Return the columns that compare a predicted range with the measured seconds."""
    low, high = predicted
    return {
        "load_per_core_before": load_before,
        "load_per_core_after": _load_per_core(),
        "predicted_low_seconds": round(low, 1),
        "predicted_high_seconds": round(high, 1),
        "actual_seconds": round(seconds, 1),
        "inside": low <= seconds <= high,
        "estimate_seconds": round(estimate_seconds, 1),
    }


def _load_per_core() -> float:
    return round(os.getloadavg()[0] / cores(), 2)


def _timed(*words: object, **environment: str) -> tuple[dict[str, Any], float]:
    """Run a command; returns the JSON of its last line, and its seconds from Python's start to its end."""
    started = time.monotonic()
    found = run_carray(*words, **environment)
    return found, time.monotonic() - started


if __name__ == "__main__":
    main()

"""Holds estimates against what then happens: a classification and a search, each estimated, run, and compared.

From: a bundle and images, or a manifest and settings. To: a row each: predicted range, measured seconds, inside or not.
Invariants: the estimate is asked before the job is run, of the same machine; both are `carray` commands, as a user
types them, in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd

from jobs.bench.rows import ROOT, cores

__all__ = ["COLUMNS", "check_classify", "check_tune"]

COLUMNS = [
    *("part", "images", "trials", "probe_images", "load_per_core_before", "load_per_core_after"),
    *("predicted_low_seconds", "predicted_high_seconds", "actual_seconds", "inside"),
    *("predicted_low_epochs", "predicted_high_epochs", "actual_epochs", "estimate_seconds"),
]


def check_classify(bundle: str, images: str) -> dict[str, Any]:
    """Estimate a classification of a folder, run it, and compare."""
    before = _load()
    said, estimate_seconds = _carray(["estimate", "classify", bundle, images])
    with tempfile.TemporaryDirectory() as out:
        done, seconds = _carray(["classify", bundle, images, "--out", f"{out}/predictions"])
    return {
        "part": "classify",
        "images": done["images"],
        "probe_images": said["probed_images"],
        "load_per_core_before": before,
        "load_per_core_after": _load(),
        **_compared(said["seconds"], seconds),
        "estimate_seconds": round(estimate_seconds, 1),
    }


def check_tune(manifest: str, config: str, changes: Sequence[str]) -> dict[str, Any]:
    """Estimate a search, run it on an empty cache, and compare."""
    before = _load()
    wanted = ["--manifest", manifest, "--config", config, *(word for one in changes for word in ("--set", one))]
    said, estimate_seconds = _carray(["estimate", "tune", *wanted])
    with tempfile.TemporaryDirectory() as folder:
        done, seconds = _carray(["tune", *wanted, "--out", f"{folder}/run"], cache=folder)
        epochs = len(pd.read_parquet(f"{folder}/run/epochs.parquet"))
    return {
        "part": "tune",
        "images": said["images"],
        "trials": done["trials"],
        "load_per_core_before": before,
        "load_per_core_after": _load(),
        **_compared(said["seconds"], seconds),
        "predicted_low_epochs": said["epochs"][0],
        "predicted_high_epochs": said["epochs"][1],
        "actual_epochs": epochs,
        "estimate_seconds": round(estimate_seconds, 1),
    }


def _load() -> float:
    """Give the machine's load for each core: what else it does decides how far an estimate can be trusted."""
    return round(os.getloadavg()[0] / cores(), 2)


def _compared(predicted: Sequence[float], seconds: float) -> dict[str, Any]:
    low, high = predicted
    return {
        "predicted_low_seconds": round(low, 1),
        "predicted_high_seconds": round(high, 1),
        "actual_seconds": round(seconds, 1),
        "inside": low <= seconds <= high,
    }


def _carray(words: Sequence[str], *, cache: str | None = None) -> tuple[dict[str, Any], float]:
    """Run a command; gives the JSON of its last line, and its seconds from Python's start to its end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"CARRAY_CACHE": cache} if cache else {})}
    started = time.monotonic()
    command = [sys.executable, "-m", "carray", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - started
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, seconds

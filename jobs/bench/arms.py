"""Runs one measured search in a process of its own: carray's, or the one that Ray's documentation teaches.

From: an `Arm`. To: a `Measured`: every epoch that was run, and the wall-clock of all of it.
Invariants: both arms get the same configurations in the same order, the same images, seeds, epochs and scheduler, a
private Ray and one core a trial; each starts with an empty cache, so that carray's decoding and its kept features are
counted; the clock runs from before Ray starts until after it has ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from jobs.bench.rows import ROOT

__all__ = ["Arm", "Measured", "measure"]


@dataclass(frozen=True)
class Arm:
    """Says what is to be measured."""

    kind: Literal["carray", "recipe"]
    manifest: str
    settings: dict[str, Any]
    """Of TuneSettings: the search and the pixels."""
    configurations: list[dict[str, Any]]
    """Hypers, in the order in which they are tried."""
    loaders: int = 0
    """The recipe's DataLoader processes a trial."""


@dataclass(frozen=True)
class Measured:
    """Says what a search did and how long it took."""

    wall_seconds: float
    epochs: list[dict[str, Any]]
    """One a (trial, epoch), in the order of their ends: number, epoch, seconds, val_top1, clock_seconds."""
    run: str
    """carray's run folder; empty for the recipe."""

    @property
    def epoch_seconds(self) -> float:
        """Give the seconds of all epochs, of all trials."""
        return float(sum(epoch["seconds"] for epoch in self.epochs))


def measure(arm: Arm, folder: Path, *, keep: bool = False) -> Measured:
    """Run one arm below `folder`, which must not exist yet; its cache is removed afterwards unless `keep` is said."""
    folder.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps(asdict(arm)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CARRAY_CACHE": str(folder / "cache")}
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.bench.arms", str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
    if done.returncode:
        raise SystemExit(f"the {arm.kind} arm failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    if not keep:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    return Measured(**json.loads((folder / "measured.json").read_text()))


def _run_carray(arm: Arm, folder: Path) -> Measured:
    from carray.core.settings import parse_settings
    from carray.search.run_folder import read_log
    from carray.search.search_on_ray import search
    from carray.search.space import TuneSettings
    from carray.search.train.hyperparameters import read_hyper

    settings = parse_settings(TuneSettings, arm.settings)
    configurations = [read_hyper(values) for values in arm.configurations]
    run, started = str(folder / "run"), time.monotonic()
    # The configurations are given here, where a search would draw them, its families' defaults first.
    with patch("carray.search.search_on_ray.draw_trials", lambda settings: configurations):
        search(arm.manifest, run=run, settings=settings)
    wall_seconds = time.monotonic() - started
    return Measured(wall_seconds, _of_log(read_log(run)), run)


def _of_log(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("number", "epoch", "seconds", "train_loss", "val_loss", "val_top1", "clock_seconds", "decision")
    return [{name: entry[name] for name in names} for entry in entries]


def _run_recipe(arm: Arm, folder: Path) -> Measured:
    from jobs.bench.recipe import tune_as_documented

    started = time.monotonic()
    epochs = tune_as_documented(arm, folder)
    return Measured(time.monotonic() - started, epochs, "")


def main(folder: Path) -> None:
    """Run the arm that is described in a folder and write what was measured beside it."""
    arm = Arm(**json.loads((folder / "arm.json").read_text()))
    measured = {"carray": _run_carray, "recipe": _run_recipe}[arm.kind](arm, folder)
    (folder / "measured.json").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

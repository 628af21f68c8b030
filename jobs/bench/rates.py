"""Measures epochs per core-minute of carray's search and of the documented recipe, and the fixed cost of a trial.

From: a manifest. To: rows of results/tune.csv, one a measured arm.
Invariants: the arms of a case alternate; a rate is epochs over the wall-clock of the whole search times the cores in
use, Ray's start, decoding and kept features included; `steady` is epochs over their own seconds alone. Where the
recipe's arm is given fewer trials or epochs because it is slow, its steady rate stands for it, which leaves its fixed
costs out and so flatters it.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bench.arms import Arm, Measured, measure
from jobs.bench.rows import cores
from jobs.bench.subsets import few_images, share_of_images

__all__ = ["CASES", "QUICK_CASES", "Case", "measure_case", "measure_fixed"]

_PLAIN = {"colour_jitter": 0.0, "crop_scale": 0.7, "crop_stretch": 1.1, "flip": True, "batch_images": 32}
"""Views that torchvision has a counterpart of."""
_SMALL_CNN = {"family": "cnn", "input_size": 64, "stages": 4, "width": 8, "blocks": 1, **_PLAIN}
_LITE0 = {"family": "transfer", "backbone": "tf_efficientnet_lite0", "input_size": 160, **_PLAIN}


@dataclass(frozen=True)
class Case:
    """Is one comparison: the same configurations, images and scheduler for both arms."""

    name: str
    hyper: dict[str, Any]
    decode_size: int
    trials: int
    epochs: int
    share: float = 1.0
    """Of each class's training and validation images."""
    recipe_trials: int | None = None
    """Fewer for the recipe, without ASHA; None is as many, with it."""
    recipe_epochs: int | None = None
    repeats: int = 1


_RATES = [0.001, 0.002, 0.0005, 0.004, 0.0003, 0.0015, 0.003, 0.0007]
_RATES += [0.0012, 0.0025, 0.0004, 0.005, 0.0002, 0.0018, 0.0035, 0.0009]
"""Learning rates of the trials, in their order."""

CASES = {
    "cnn": Case("cnn", _SMALL_CNN, decode_size=72, trials=16, epochs=9, repeats=2),
    "cnn_wide": Case("cnn_wide", {**_SMALL_CNN, "width": 16}, decode_size=72, trials=8, epochs=4),
    "frozen": Case(
        "frozen",
        {**_LITE0, "train": "last_stages", "last_stages": 2, "cached_views": 4},
        decode_size=184,
        trials=6,
        epochs=4,
        recipe_trials=2,
        recipe_epochs=1,
    ),
    "all": Case("all", {**_LITE0, "train": "all"}, decode_size=184, trials=1, epochs=1, share=0.25),
}
QUICK_CASES = {
    "cnn": Case("cnn", {**_SMALL_CNN, "input_size": 32, "stages": 2}, decode_size=40, trials=2, epochs=2),
    "cnn_wide": Case("cnn_wide", {**_SMALL_CNN, "input_size": 32}, decode_size=40, trials=2, epochs=1),
    "frozen": Case(
        "frozen",
        {**_LITE0, "input_size": 64, "train": "last_stages", "last_stages": 2, "cached_views": 2},
        decode_size=72,
        trials=2,
        epochs=2,
        recipe_trials=2,
        recipe_epochs=1,
    ),
    "all": Case("all", {**_LITE0, "input_size": 64, "train": "all"}, decode_size=72, trials=1, epochs=1),
}


def measure_case(case: Case, manifest: str, work: Path, *, loaders: int) -> list[dict[str, Any]]:
    """Measure both arms of a case, one after the other, as often as the case says; gives a row each, of medians."""
    images = share_of_images(manifest, case.share, work / f"{case.name}-{case.share:g}.parquet")
    arms = {
        "carray": Arm("carray", images.uri, _settings(case, case.trials, case.epochs), _configurations(case)),
        "recipe": _recipe_arm(case, images.uri, loaders),
    }
    measured: dict[str, list[Measured]] = {"carray": [], "recipe": []}
    for repeat in range(case.repeats):
        for kind, arm in arms.items():
            measured[kind].append(measure(arm, work / f"{case.name}-{kind}-{repeat}"))
    counts = images.split_counts()
    rows = []
    for kind, runs in measured.items():
        in_use = min(cores(), len(arms[kind].configurations))
        rows.append(
            {
                "part": case.name,
                "arm": kind,
                "train_images": counts["train"],
                "val_images": counts["val"],
                "input_size": case.hyper["input_size"],
                "trials": len(arms[kind].configurations),
                "epochs": statistics.median(len(run.epochs) for run in runs),
                "repeats": case.repeats,
                "wall_seconds": round(statistics.median(run.wall_seconds for run in runs), 1),
                "epochs_per_core_minute": statistics.median(_whole_rate(run, in_use) for run in runs),
                "steady_epochs_per_core_minute": statistics.median(_steady_rate(run) for run in runs),
            }
        )
    return _with_ratios(case, rows, loaders)


def _with_ratios(case: Case, rows: list[dict[str, Any]], loaders: int) -> list[dict[str, Any]]:
    ours, recipe = rows
    cut = case.recipe_epochs is not None
    against = recipe["steady_epochs_per_core_minute" if cut else "epochs_per_core_minute"]
    ours["times_recipe"] = round(ours["epochs_per_core_minute"] / against, 2)
    steady = "steady_epochs_per_core_minute"
    ours["steady_times_recipe"] = round(ours[steady] / recipe[steady], 2)
    recipe["note"] = f"num_workers={loaders} a trial"
    if cut:
        recipe["note"] += "; fewer trials and epochs than carray's arm, so its steady rate stands for it"
    for row in rows:
        for name in ("epochs_per_core_minute", steady):
            row[name] = round(row[name], 3)
    return rows


def measure_fixed(manifest: str, work: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Measure what a trial costs beside its training: one trial at a time, one epoch, 16 images.

    It is (wall-clock of n trials - wall-clock of 1) / (n - 1); the epoch of 16 images is in it.
    """
    images = few_images(manifest, work / "few.parquet")
    counts = images.split_counts()
    rows = []
    for net in ("cnn", "frozen"):
        case = (QUICK_CASES if quick else CASES)[net]
        for kind, more in (("carray", 3 if quick else 11), ("recipe", 2 if quick else 4)):
            walls = {}
            for trials in (1, 1 + more):
                settings = _settings(case, trials, 1, cpus_per_trial=cores())
                hypers = [{**case.hyper, "learning_rate": 0.001 + i * 1e-5} for i in range(trials)]
                arm = Arm("carray" if kind == "carray" else "recipe", images.uri, settings, hypers)
                walls[trials] = measure(arm, work / f"fixed-{net}-{kind}-{trials}").wall_seconds
            rows.append(
                {
                    "part": f"fixed_{net}",
                    "arm": kind,
                    "train_images": counts["train"],
                    "val_images": counts["val"],
                    "input_size": case.hyper["input_size"],
                    "trials": 1 + more,
                    "epochs": 1 + more,
                    "wall_seconds": round(walls[1 + more], 1),
                    "fixed_seconds_per_trial": round((walls[1 + more] - walls[1]) / more, 2),
                }
            )
    return rows


def _recipe_arm(case: Case, manifest: str, loaders: int) -> Arm:
    trials, epochs = case.recipe_trials or case.trials, case.recipe_epochs or case.epochs
    scheduler = "asha" if case.recipe_epochs is None else "none"
    settings = _settings(case, trials, epochs, scheduler=scheduler)
    return Arm("recipe", manifest, settings, _configurations(case)[:trials], loaders)


def _configurations(case: Case) -> list[dict[str, Any]]:
    return [{**case.hyper, "learning_rate": _RATES[i % len(_RATES)]} for i in range(case.trials)]


def _settings(case: Case, trials: int, epochs: int, **search: Any) -> dict[str, Any]:
    family = {"default": {name: value for name, value in case.hyper.items() if name != "family"}}
    return {
        "search": {"trials": trials, "epochs": epochs, "rung0": "off", "cpus_per_trial": 1, **search},
        "pixels": {"decode_size": case.decode_size, "input_size": case.hyper["input_size"]},
        "families": {case.hyper["family"]: family},
    }


def _whole_rate(run: Measured, in_use: int) -> float:
    return len(run.epochs) / (run.wall_seconds / 60 * in_use)


def _steady_rate(run: Measured) -> float:
    return len(run.epochs) / (run.epoch_seconds / 60)

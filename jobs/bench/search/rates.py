"""Measures epochs per core-minute of carray's search and of the documented recipe, a trial's fixed cost, and rung 0.

A rate is epochs over the wall-clock of the whole search times the cores in use, with Ray's start, decoding and kept
features; `steady` is epochs over their own seconds alone. Where the slow recipe gets fewer trials or epochs, its steady
rate is taken, which omits its fixed costs and so flatters it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from carray.manifest.manifest_file import Manifest, read_manifest, write_manifest
from jobs.bench.rows import cores, write_rows
from jobs.bench.search.arms import Arm, Measured, measure

_PLAIN = {"colour_jitter": 0.0, "crop_scale": 0.7, "crop_stretch": 1.1, "flip": True, "batch_images": 32}
"""Views with a counterpart in torchvision."""
_SMALL_CNN = {"family": "cnn", "input_size": 64, "stages": 4, "width": 8, "blocks": 1, **_PLAIN}
_LITE0 = {"family": "transfer", "backbone": "tf_efficientnet_lite0", "input_size": 160, **_PLAIN}
_FROZEN = {**_LITE0, "train": "last_stages", "last_stages": 2, "cached_views": 4}

RUNG0_CLASSES = 98
"""Half of Stanford Cars' classes."""
RUNG0_BACKBONES = [f"tf_efficientnet_lite{i}" for i in range(3)]


@dataclass(frozen=True)
class Case:
    """A comparison: the same configurations, images and scheduler for both arms."""

    name: str
    hyper: dict[str, Any]
    decode_size: int
    trials: int
    epochs: int
    share: float = 1.0
    """Of each class's training and validation images."""
    recipe_trials: int | None = None
    """Fewer for the slow recipe, without ASHA; None is as many."""
    recipe_epochs: int | None = None
    repeats: int = 1


_RATES = [0.001, 0.002, 0.0005, 0.004, 0.0003, 0.0015, 0.003, 0.0007]
_RATES += [0.0012, 0.0025, 0.0004, 0.005, 0.0002, 0.0018, 0.0035, 0.0009]
"""Learning rates of the trials."""

CASES = {
    "cnn": Case("cnn", _SMALL_CNN, decode_size=72, trials=16, epochs=9, repeats=2),
    "frozen": Case("frozen", _FROZEN, decode_size=184, trials=6, epochs=4, recipe_trials=2, recipe_epochs=1),
    "all": Case("all", {**_LITE0, "train": "all"}, decode_size=184, trials=1, epochs=1, share=0.25),
}
_QUICK: dict[str, Any] = {"trials": 2, "epochs": 2, "repeats": 1, "share": 1.0}
QUICK_CASES = {
    "cnn": replace(CASES["cnn"], hyper={**_SMALL_CNN, "input_size": 32, "stages": 2}, decode_size=40, **_QUICK),
    "frozen": replace(
        CASES["frozen"], hyper={**_FROZEN, "input_size": 64, "cached_views": 2}, decode_size=72, **_QUICK
    ),
    "all": replace(CASES["all"], hyper={**_LITE0, "input_size": 64, "train": "all"}, decode_size=72, share=1.0),
}


def measure_case(case: Case, manifest: str, work: Path, *, loaders: int) -> list[dict[str, Any]]:
    """Measure both arms of a case in turn, as often as the case says; returns a row of medians for each."""
    images = keep_images(manifest, work / f"{case.name}-{case.share:g}.parquet", share=case.share)
    arms = {
        "carray": Arm("carray", images.uri, _settings(case, case.trials, case.epochs), _configurations(case)),
        "recipe": _recipe_arm(case, images.uri, loaders),
    }
    measured: dict[str, list[Measured]] = {"carray": [], "recipe": []}
    for repeat in range(case.repeats):
        for kind, arm in arms.items():
            measured[kind].append(measure(arm, work / f"{case.name}-{kind}-{repeat}"))
    rows: list[dict[str, Any]] = []
    for kind, runs in measured.items():
        in_use = min(cores(), len(arms[kind].configurations))
        rows.append(
            {
                "part": case.name,
                "arm": kind,
                **_image_counts(images),
                "input_size": case.hyper["input_size"],
                "trials": len(arms[kind].configurations),
                "epochs": statistics.median(len(run.epochs) for run in runs),
                "repeats": case.repeats,
                "wall_seconds": round(statistics.median(run.wall_seconds for run in runs), 1),
                "epochs_per_core_minute": statistics.median(run.rate(in_use) for run in runs),
                "steady_epochs_per_core_minute": statistics.median(run.steady_rate for run in runs),
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
    """Measure what a trial costs besides its training: (seconds of n trials - seconds of 1) / (n - 1).

    One trial runs at a time, one epoch of 16 images.
    """
    images = keep_images(manifest, work / "few.parquet", classes=2, most={"train": 8, "val": 2})
    rows: list[dict[str, Any]] = []
    for net in ("cnn", "frozen"):
        case = (QUICK_CASES if quick else CASES)[net]
        kinds: list[tuple[Any, int]] = [("carray", 3 if quick else 11), ("recipe", 2 if quick else 4)]
        for kind, more in kinds:
            walls = {}
            for trials in (1, 1 + more):
                settings = _settings(case, trials, 1, cpus_per_trial=cores())
                hypers = [{**case.hyper, "learning_rate": 0.001 + i * 1e-5} for i in range(trials)]
                arm = Arm(kind, images.uri, settings, hypers)
                walls[trials] = measure(arm, work / f"fixed-{net}-{kind}-{trials}").wall_seconds
            rows.append(
                {
                    "part": f"fixed_{net}",
                    "arm": kind,
                    **_image_counts(images),
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


def measure_rung0(manifest: str, work: Path, results: Path, *, quick: bool) -> dict[str, Any]:
    """Compare rung 0's ranking of candidates with that after short trainings; writes rung0.csv, returns a row.

    Every candidate is trained with the same settings, in its own size; none is stopped or dropped.
    """
    from scipy.stats import spearmanr

    sizes, epochs = ([48, 64], 1) if quick else ([64, 96, 128], 4)
    backbones = RUNG0_BACKBONES[:2] if quick else RUNG0_BACKBONES
    shared = {"family": "transfer", "train": "last_stages", "last_stages": 2, "cached_views": epochs}
    hypers = [{**shared, "backbone": backbone, "input_size": size} for size in sizes for backbone in backbones]
    search = {"trials": len(hypers), "epochs": epochs, "scheduler": "none", "cpus_per_trial": 1}
    settings = {
        "search": {**search, "rung0": "on", "rung0_margin": 1.0},
        "pixels": {"decode_size": max(sizes) + 24, "input_size": max(sizes)},
        "families": {"transfer": {}},
    }
    images = keep_images(manifest, work / "rung0.parquet", classes=RUNG0_CLASSES)
    measured = measure(Arm("carray", images.uri, settings, hypers), work / "rung0")
    listed = json.loads(Path(measured.run, "probes.json").read_text())
    probes = {(probe["backbone"], probe["input_size"]): probe for probe in listed}
    rows = []
    for number, hyper in enumerate(hypers):
        candidate = {name: hyper[name] for name in ("backbone", "input_size")}
        probe = probes[hyper["backbone"], hyper["input_size"]]
        own = [epoch for epoch in measured.epochs if epoch["number"] == number]
        figures = {
            "probe_val_top1": probe["val_top1"],
            "probe_seconds": probe["seconds"],
            "final_val_top1": max(epoch["val_top1"] or 0.0 for epoch in own),
            "training_seconds": round(sum(epoch["seconds"] for epoch in own), 1),
        }
        rows.append(candidate | figures)
    write_rows(results / "rung0.csv", rows)
    rank = spearmanr([row["probe_val_top1"] for row in rows], [row["final_val_top1"] for row in rows])
    return {
        "part": "rung0",
        "arm": "carray",
        **_image_counts(images),
        "trials": len(hypers),
        "epochs": len(measured.epochs),
        "wall_seconds": round(measured.wall_seconds, 1),
        "candidates": len(rows),
        "spearman": round(float(rank.statistic), 3),
    }


def _image_counts(images: Manifest) -> dict[str, int]:
    counts = images.split_counts()
    return {"train_images": counts["train"], "val_images": counts["val"]}


def keep_images(
    manifest: str, out: Path, *, classes: int | None = None, share: float = 1.0, most: Mapping[str, int] = {}
) -> Manifest:
    """Write a manifest of a part of another's images; returns it.

    Args:
        manifest: The other manifest.
        out: File to write.
        classes: Only the first so many classes.
        share: Of each class's training and validation images, at least two and one.
        most: At most so many images of each class, by split.
    """
    source = read_manifest(manifest)
    kept = source.classes[:classes]
    rows = source.usable[source.usable["label"].isin(kept)]
    parts = []
    for (_, split), group in rows.groupby(["label", "split"], sort=False):
        count = max(2 if split == "train" else 1, round(share * len(group)))
        parts.append(group.head(min(count, most.get(str(split), 0 if split == "test" else count))))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(pd.concat(parts).sort_index(), str(out), classes=kept, crop_boxes=source.crop_boxes)
    return read_manifest(str(out))

"""Compares rung 0's ranking of candidate backbones with what short trainings of the same candidates come to.

From: a manifest. To: results/tune/rung0.csv, a row a candidate, and a row of results/tune.csv.
Invariants: every candidate is trained with the same settings, in its own size; the probe and the training see the same
split; nobody is stopped early and nobody is dropped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.bench.arms import Arm, measure
from jobs.bench.rows import write_rows
from jobs.bench.subsets import first_classes

__all__ = ["measure_rung0"]

_CLASSES, _ALL = 98, 1_000_000
"""Half of Stanford Cars' classes, with all their images."""
_BACKBONES = [f"tf_efficientnet_lite{i}" for i in range(3)]


def measure_rung0(manifest: str, work: Path, results: Path, *, quick: bool) -> dict[str, Any]:
    """Probe and train every candidate through one search; gives the row with Spearman's correlation."""
    from scipy.stats import spearmanr

    sizes, epochs = ([48, 64], 1) if quick else ([64, 96, 128], 4)
    backbones = _BACKBONES[:2] if quick else _BACKBONES
    hypers = [
        {
            "family": "transfer",
            "backbone": backbone,
            "input_size": size,
            "train": "last_stages",
            "last_stages": 2,
            "cached_views": epochs,
        }
        for size in sizes
        for backbone in backbones
    ]
    search = {
        "trials": len(hypers),
        "epochs": epochs,
        "scheduler": "none",
        "cpus_per_trial": 1,
        "rung0": "on",
        "rung0_margin": 1.0,
    }
    settings = {
        "search": search,
        "pixels": {"decode_size": max(sizes) + 24, "input_size": max(sizes)},
        "families": {"transfer": {}},
    }
    images = first_classes(manifest, _CLASSES, work / "rung0.parquet", train=_ALL, val=_ALL)
    measured = measure(Arm("carray", images.uri, settings, hypers), work / "rung0")
    final: dict[int, float] = {}
    seconds: dict[int, float] = {}
    for epoch in measured.epochs:
        final[epoch["number"]] = max(final.get(epoch["number"], 0.0), epoch["val_top1"] or 0.0)
        seconds[epoch["number"]] = seconds.get(epoch["number"], 0.0) + epoch["seconds"]
    probes = {
        (probe["backbone"], probe["input_size"]): probe
        for probe in json.loads(Path(measured.run, "probes.json").read_text())
    }
    rows = []
    for number, hyper in enumerate(hypers):
        probe = probes[hyper["backbone"], hyper["input_size"]]
        rows.append(
            {
                "backbone": hyper["backbone"],
                "input_size": hyper["input_size"],
                "probe_val_top1": probe["val_top1"],
                "probe_seconds": probe["seconds"],
                "final_val_top1": final[number],
                "training_seconds": round(seconds[number], 1),
            }
        )
    write_rows(results / "rung0.csv", rows)
    rank = spearmanr([row["probe_val_top1"] for row in rows], [row["final_val_top1"] for row in rows])
    return {
        "part": "rung0",
        "arm": "carray",
        "train_images": images.split_counts()["train"],
        "val_images": images.split_counts()["val"],
        "trials": len(hypers),
        "epochs": len(measured.epochs),
        "wall_seconds": round(measured.wall_seconds, 1),
        "candidates": len(rows),
        "spearman": round(float(rank.statistic), 3),
    }

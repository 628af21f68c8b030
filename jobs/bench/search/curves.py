"""Trains configurations in full, and searches the same ones live with ASHA: how soon each reaches an accuracy.

Writes results/tune/curves.csv (a row per trial and epoch) and configurations.csv. The live search has the order in
which the curves were trained, so their training is its other arm.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from carray.manifest.manifest_file import Manifest
from jobs.bench.rows import write_rows
from jobs.bench.search.arms import Arm, measure
from jobs.bench.search.rates import keep_images


@dataclass(frozen=True)
class Plan:
    """Which configurations are trained in full."""

    trials: int = 32
    epochs: int = 27
    """Rungs of ASHA at 1, 3 and 9."""
    classes: int = 49
    """The first ones of the manifest: a quarter of Stanford Cars."""
    input_size: int = 96
    decode_size: int = 112
    seed: int = 0

    def settings(self, scheduler: str) -> dict[str, Any]:
        """Return the search's settings: one backbone with a frozen part that all trials share, and varied rates."""
        return {
            "search": {
                "trials": self.trials,
                "epochs": self.epochs,
                "seed": self.seed,
                "scheduler": scheduler,
                "rung0": "off",
                "cpus_per_trial": 1,
            },
            "pixels": {"decode_size": self.decode_size, "input_size": self.input_size},
            "families": {
                "transfer": {
                    "default": {"input_size": self.input_size, "train": "last_stages", "last_stages": 1},
                    "space": {
                        "learning_rate": {"log_uniform": [1e-4, 1e-1]},
                        "head_learning_rate": {"log_uniform": [1e-4, 1e-1]},
                        "weight_decay": {"log_uniform": [1e-3, 1.0]},
                        "dropout": {"uniform": [0.0, 0.5]},
                        "label_smoothing": {"uniform": [0.0, 0.3]},
                        "optimizer": ["adamw", "sgd"],
                    },
                }
            },
        }

    def images(self, manifest: str, work: Path) -> Manifest:
        """Write a manifest of the classes that are trained on."""
        return keep_images(manifest, work / "curves.parquet", classes=self.classes)

    def configurations(self) -> list[dict[str, Any]]:
        """Draw the configurations at random, without the default, which a search would try first."""
        from carray.core.settings import parse_settings
        from carray.search.proposals import draw_trials
        from carray.search.space import TuneSettings

        wanted = self.settings("none")
        wanted["search"] = {**wanted["search"], "trials": self.trials + 1}
        drawn = draw_trials(parse_settings(TuneSettings, wanted))[1:]
        return [hyper.model_dump(mode="json") for hyper in drawn]


FULL = Plan()
QUICK = Plan(trials=4, epochs=3, classes=6, input_size=64, decode_size=72)


def train_curves(plan: Plan, manifest: str, work: Path, results: Path) -> dict[str, Any]:
    """Train every configuration in full, and write curves.csv and configurations.csv; returns a row."""
    configurations = plan.configurations()
    images = plan.images(manifest, work)
    counts = images.split_counts()
    arm = Arm("carray", images.uri, plan.settings("none"), configurations)
    measured = measure(arm, work / "curves")
    family = configurations[0]["family"]
    write_rows(results / "curves.csv", [{"family": family, **epoch} for epoch in measured.epochs])
    varied = list(plan.settings("none")["families"]["transfer"]["space"])
    named = [{"number": i, **{name: hyper[name] for name in varied}} for i, hyper in enumerate(configurations)]
    write_rows(results / "configurations.csv", named)
    return {
        "part": "curves",
        "arm": "unpruned",
        "train_images": counts["train"],
        "val_images": counts["val"],
        "input_size": plan.input_size,
        "trials": plan.trials,
        "epochs": len(measured.epochs),
        "wall_seconds": round(measured.wall_seconds, 1),
        "val_top1": max(epoch["val_top1"] or 0.0 for epoch in measured.epochs),
    }


def run_live(plan: Plan, manifest: str, work: Path, results: Path) -> list[dict[str, Any]]:
    """Search live with ASHA, and compare with the training of all when both had reached the best that both reached."""
    images = plan.images(manifest, work).uri
    live = measure(Arm("carray", images, plan.settings("asha"), plan.configurations()), work / "live")
    epochs = {"asha": pd.DataFrame(live.epochs), "unpruned": pd.read_csv(results / "curves.csv")}
    target = min(of_arm["val_top1"].max() for of_arm in epochs.values())
    rows: list[dict[str, Any]] = [
        {
            "part": "live",
            "arm": arm,
            "trials": plan.trials,
            "epochs": len(of_arm),
            "wall_seconds": round(of_arm["clock_seconds"].max(), 1),
            "val_top1": of_arm["val_top1"].max(),
            "target_val_top1": round(target, 4),
            "seconds_to_target": of_arm.loc[of_arm["val_top1"] >= target, "clock_seconds"].min(),
        }
        for arm, of_arm in epochs.items()
    ]
    rows[0]["sooner_times"] = round(rows[1]["seconds_to_target"] / rows[0]["seconds_to_target"], 2)
    rows[0]["note"] = "Ray's start is in these seconds"
    return rows

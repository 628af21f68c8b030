"""Trains configurations in full once, replays them in many orders, and checks the outcome with one live search.

Writes results/tune/curves.csv (a row per trial and epoch), configurations.csv and sooner.csv. Both arms of the replay
see the same orders. The live search has the order in which the curves were trained, so their training is its other arm.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carray.manifest.manifest_file import Manifest
from jobs.bench.rows import cores, write_rows
from jobs.bench.search.arms import Arm, measure
from jobs.bench.search.rates import first_classes
from jobs.bench.search.replay import Costs, Curve, Replay, compare, highest_common, replay, shuffles

SHUFFLES = 200
_BELOW_BEST = (0.0, 0.005, 0.01, 0.02, 0.05)
"""Further targets: the best of all curves minus this."""


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
        return first_classes(manifest, self.classes, work / "curves.parquet")

    def configurations(self) -> list[dict[str, Any]]:
        """Draw the configurations at random, without the default, which a search would try first."""
        from carray.core.settings import parse_settings
        from carray.search.space import TuneSettings, draw_trials

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


def read_curves(file: Path, *, workers: int, views: int = 8) -> tuple[list[Curve], Costs]:
    """Read curves.csv: the curves in the order in which they were trained, and the costs besides their epochs.

    The trials that began first computed the frozen part's features of views 1 to `views` for all; what their epochs
    took above their own median is that cost, and is kept separate from the curves.
    """
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    of_trial: dict[int, list[dict[str, str]]] = {}
    for row in rows:
        of_trial.setdefault(int(row["number"]), []).append(row)
    trials = [sorted(of_trial[number], key=lambda row: int(row["epoch"])) for number in sorted(of_trial)]
    seconds = [[float(row["seconds"]) for row in trial] for trial in trials]
    shared = [0.0] * min(views, min(len(lengths) for lengths in seconds))
    for lengths in seconds[:workers]:
        usual = statistics.median(lengths)
        for i in range(len(shared)):
            shared[i] += max(0.0, lengths[i] - usual)
            lengths[i] = min(lengths[i], usual)
    curves = [
        Curve(
            number=int(trial[0]["number"]),
            family=trial[0]["family"],
            val_top1_E=tuple(float(row["val_top1"]) if row["val_loss"] else None for row in trial),
            seconds_E=tuple(lengths),
        )
        for trial, lengths in zip(trials, seconds, strict=True)
    ]
    trial_cost, epoch_cost = _costs(trials, workers)
    return curves, Costs(trial_cost, epoch_cost, tuple(shared))


def _costs(trials: Sequence[Sequence[dict[str, str]]], workers: int) -> tuple[float, float]:
    """Compute from the search's clock the seconds before a trial's first epoch and between epochs."""
    clocks = [[float(row["clock_seconds"]) for row in trial] for trial in trials]
    between = [
        clock[i] - clock[i - 1] - float(trial[i]["seconds"])
        for trial, clock in zip(trials, clocks, strict=True)
        for i in range(1, len(trial))
    ]
    epoch_cost = max(0.0, statistics.median(between)) if between else 0.0
    ends = sorted(clock[-1] for clock in clocks)
    before = [  # a trial begins when one of those before it ends
        clock[0] - ends[i] - float(trial[0]["seconds"]) - epoch_cost
        for i, (trial, clock) in enumerate(zip(trials[workers:], clocks[workers:], strict=True))
    ]
    return (max(0.0, statistics.median(before)) if before else 0.0), epoch_cost


def replay_curves(results: Path, *, count: int = SHUFFLES) -> tuple[list[dict[str, Any]], float]:
    """Replay curves.csv with and without ASHA, and write sooner.csv; returns rows and the main target."""
    curves, costs = read_curves(results / "curves.csv", workers=cores())
    orders = shuffles(curves, count)
    searches = {
        scheduler: [replay(order, scheduler=scheduler, workers=cores(), costs=costs) for order in orders]
        for scheduler in ("asha", "none")
    }
    pruned, unpruned = searches["asha"], searches["none"]
    best = max(search.best for search in unpruned)
    common = highest_common([*pruned, *unpruned])
    targets = dict.fromkeys([common, *(best - below for below in _BELOW_BEST)])
    table = [
        asdict(compare(pruned, unpruned, target))
        for target in targets
        if any(search.seconds_to(target) for search in pruned)
    ]
    write_rows(results / "sooner.csv", [_rounded(row) for row in table])
    main = table[0]
    rows = [
        {
            "part": "replay",
            "arm": arm,
            "trials": len(curves),
            "epochs": statistics.mean(search.epochs for search in runs),
            "shuffles": count,
            "target_val_top1": round(common, 4),
            "seconds_to_target": round(main[f"{arm}_seconds"], 1),
        }
        for arm, runs in (("asha", pruned), ("unpruned", unpruned))
    ]
    names = ("times", "low", "high", "median_low", "median_high")
    rows[0] |= {f"sooner_{name}": round(main[name], 2) for name in names}
    rows[0]["note"] = (
        f"target: the highest accuracy that both reach in every order; best of all {best:.4f}; {costs.trial:.2f} s "
        f"before a trial, {costs.epoch:.2f} s after an epoch, {sum(costs.first_of_epoch):.0f} s for the frozen features"
    )
    return rows, common


def run_live(plan: Plan, manifest: str, work: Path, results: Path, target: float) -> list[dict[str, Any]]:
    """Search live with ASHA, in the order in which the curves were trained, and compare when a target was reached.

    If the live search does not reach `target`, the highest accuracy that both reached is the target.
    """
    images = plan.images(manifest, work).uri
    measured = measure(Arm("carray", images, plan.settings("asha"), plan.configurations()), work / "live")
    with (results / "curves.csv").open(newline="") as file:
        trained = [
            {"clock_seconds": float(row["clock_seconds"]), "val_top1": float(row["val_top1"] or 0)}
            for row in csv.DictReader(file)
        ]
    live, unpruned = _as_search(measured.epochs), _as_search(trained)
    target = min(target, live.best, unpruned.best)
    simulated = _simulated(results, target)
    seconds = {"asha": live.seconds_to(target), "unpruned": unpruned.seconds_to(target)}
    rows: list[dict[str, Any]] = [
        {
            "part": "live",
            "arm": arm,
            "trials": plan.trials,
            "epochs": search.epochs,
            "wall_seconds": round(search.seconds, 1),
            "val_top1": search.best,
            "target_val_top1": round(target, 4),
            "seconds_to_target": seconds[arm],
        }
        for arm, search in (("asha", live), ("unpruned", unpruned))
    ]
    rows[0]["sooner_times"] = round((seconds["unpruned"] or 0) / (seconds["asha"] or 1), 2)
    rows[0]["note"] = f"Ray's start is in these seconds; the replay of this order says {simulated:.2f} times"
    return rows


def _simulated(results: Path, target: float) -> float:
    curves, costs = read_curves(results / "curves.csv", workers=cores())
    by_scheduler = [replay(curves, scheduler=name, workers=cores(), costs=costs) for name in ("asha", "none")]
    pruned, unpruned = (search.seconds_to(target) for search in by_scheduler)
    return unpruned / pruned if pruned and unpruned else float("nan")


def _as_search(epochs: Sequence[dict[str, Any]]) -> Replay:
    """Convert a real search's log to a replay's outcome."""
    steps: list[tuple[float, float]] = []
    for epoch in sorted(epochs, key=lambda epoch: float(epoch["clock_seconds"])):
        if not steps or (epoch["val_top1"] or 0.0) > steps[-1][1]:
            steps.append((float(epoch["clock_seconds"]), float(epoch["val_top1"] or 0.0)))
    return Replay(tuple(steps), max(float(epoch["clock_seconds"]) for epoch in epochs), len(epochs))


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}

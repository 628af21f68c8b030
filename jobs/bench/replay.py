"""Replays a search over learning curves that are known, and compares searches over the same orders of trials.

From: curves, which say what each trial reaches after each epoch and how long that takes. To: when a search over them
would have reached which accuracy, by a simulation of its events; how much sooner one with a scheduler reaches what
both reach.
Invariants: decisions are those of carray's `FamilyScheduler`, and so of Ray's ASHA; an epoch counts when it ends; a
worker that is free takes the next trial of the order.
Cost: 5 ms for 32 trials, not their hours; importing Ray takes 3 s.
"""

from __future__ import annotations

import heapq
import itertools
import json
import logging
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    from carray.search.run_log import SearchLog

__all__ = ["Costs", "Curve", "Replay", "Sooner", "compare", "highest_common", "interval", "replay", "shuffles"]


@dataclass(frozen=True)
class Curve:
    """Holds what one configuration reaches in full; an accuracy is None where the epoch's loss was infinite."""

    number: int
    family: str
    val_top1_E: tuple[float | None, ...]
    """After each epoch, a fraction."""
    seconds_E: tuple[float, ...]
    shared: str = ""
    """Names what it shares with other trials, such as the features of one frozen trunk."""
    shared_seconds_E: tuple[float, ...] = ()
    """What the first trial that comes to epoch e pays for all with the same `shared`."""


@dataclass(frozen=True)
class Costs:
    """Says what a search pays beside its epochs, seconds."""

    trial: float = 0.0
    """Before a trial's first epoch."""
    epoch: float = 0.0
    """After each epoch: its checkpoint, and what the scheduler takes."""
    first_of_epoch: tuple[float, ...] = ()
    """What the first trial that comes to epoch e pays for all of them: random view e of the frozen features."""


@dataclass(frozen=True)
class Replay:
    """Says what a search over known curves came to."""

    steps: tuple[tuple[float, float], ...]
    """(seconds, best validation accuracy so far), one each time that it grows."""
    seconds: float
    """Until all trials have ended."""
    epochs: int

    @property
    def best(self) -> float:
        """Give the best accuracy of all."""
        return self.steps[-1][1] if self.steps else 0.0

    def seconds_to(self, target: float) -> float | None:
        """Give when the best so far first reached a target; None where it never did."""
        return next((seconds for seconds, best in self.steps if best >= target), None)


def replay(
    curves: Sequence[Curve],
    *,
    scheduler: str,
    reduction_factor: float = 3,
    grace_epochs: int = 1,
    workers: int = 2,
    costs: Costs | None = None,
) -> Replay:
    """Run curves in their order, `workers` trials at once, and give when the best so far grew.

    Args:
        curves: In the order in which trials start.
        scheduler: search.scheduler: asha, median or none.
        reduction_factor: Of ASHA.
        grace_epochs: Before which no trial is stopped.
        workers: Trials at once.
        costs: Beside the epochs; None is nothing.
    """
    decide, costs = _scheduler(curves, scheduler, reduction_factor, grace_epochs), costs or Costs()
    waiting, order = iter(curves), itertools.count()
    # An event is the end of an epoch: (seconds, order of its beginning, curve, epoch).
    events: list[tuple[float, int, Curve, int]] = []
    seen: set[int] = set()
    paid: set[tuple[str, int]] = set()

    def begin(now: float, curve: Curve | None, epoch: int) -> None:
        if curve is not None:
            length = curve.seconds_E[epoch - 1] + costs.epoch + (costs.trial if epoch == 1 else 0.0)
            if epoch not in seen and epoch <= len(costs.first_of_epoch):
                length += costs.first_of_epoch[epoch - 1]
            seen.add(epoch)
            if (curve.shared, epoch) not in paid and epoch <= len(curve.shared_seconds_E):
                length += curve.shared_seconds_E[epoch - 1]
            paid.add((curve.shared, epoch))
            heapq.heappush(events, (now + length, next(order), curve, epoch))

    for _ in range(workers):
        begin(0.0, next(waiting, None), 1)
    steps: list[tuple[float, float]] = []
    epochs, now = 0, 0.0
    while events:
        now, _, curve, epoch = heapq.heappop(events)
        epochs += 1
        reached = curve.val_top1_E[epoch - 1]
        if reached is not None and (not steps or reached > steps[-1][1]):
            steps.append((now, reached))
        goes_on = decide(curve, epoch) and epoch < len(curve.val_top1_E)
        begin(now, curve if goes_on else next(waiting, None), epoch + 1 if goes_on else 1)
    return Replay(tuple(steps), now, epochs)


def _scheduler(curves: Sequence[Curve], scheduler: str, reduction_factor: float, grace_epochs: int) -> Any:
    """Give what says whether a trial goes on after an epoch: the search's own scheduler, with a log in memory."""
    from carray.search.schedulers_on_ray import FamilyScheduler
    from carray.search.space import SearchSettings

    logging.getLogger("ray.tune.schedulers").setLevel(logging.ERROR)
    search = SearchSettings.model_validate(
        {
            "trials": len(curves),
            "epochs": max(len(curve.val_top1_E) for curve in curves),
            "scheduler": scheduler,
            "reduction_factor": reduction_factor,
            "grace_epochs": grace_epochs,
        }
    )
    asked = FamilyScheduler(search, cast("SearchLog", _MemoryLog()))

    def decide(curve: Curve, epoch: int) -> bool:
        reached = curve.val_top1_E[epoch - 1]
        loss = None if reached is None else 1.0  # only whether it is finite is asked
        entry = {
            "number": curve.number,
            "family": curve.family,
            "epoch": epoch,
            "val_top1": reached,
            "train_loss": loss,
            "val_loss": loss,
            "note": None,
        }
        trial = cast("Any", _Trial({"number": curve.number}))
        return asked.on_trial_result(cast("Any", None), trial, {"entry": json.dumps(entry)}) == "CONTINUE"

    return decide


@dataclass(frozen=True)
class _Trial:
    """Stands for Tune's trial, of which the scheduler asks the number."""

    config: dict[str, int]


class _MemoryLog:
    """Stands for the log of a run folder: nothing was logged before, and nothing is kept."""

    missing: Sequence[int] = ()

    def replayed(self) -> Iterable[dict[str, Any]]:
        return ()

    def decision_of(self, entry: Mapping[str, Any]) -> str | None:
        return None

    def add(self, entry: Mapping[str, Any], decision: str) -> None:
        return None


def shuffles(curves: Sequence[Curve], count: int, *, seed: int = 0) -> list[list[Curve]]:
    """Give so many random orders of the curves; the same seed gives the same orders."""
    random = np.random.default_rng(seed)
    return [[curves[i] for i in random.permutation(len(curves))] for _ in range(count)]


@dataclass(frozen=True)
class Sooner:
    """Compares a scheduler with none, by when they reached a target, over many orders."""

    target: float
    asha_reached: float
    """Share of the orders in which ASHA's search came to the target at all; the other one's always does."""
    asha_seconds: float
    """Median over the orders in which both reached it."""
    unpruned_seconds: float
    times: float
    """Median over orders of unpruned over ASHA seconds, each ratio of one order."""
    low: float
    """95 % of the orders lie between `low` and `high`."""
    high: float
    median_low: float
    """95 % interval of the median, by resampling orders."""
    median_high: float


def compare(pruned: Sequence[Replay], unpruned: Sequence[Replay], target: float) -> Sooner:
    """Compare searches over the same orders; at least one of the pruned ones reaches the target."""
    pairs = [(a.seconds_to(target), b.seconds_to(target)) for a, b in zip(pruned, unpruned, strict=True)]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not both:
        raise ValueError(f"no order reached {target}")
    ratios = [b / a for a, b in both]
    low, high = interval(ratios)
    median_low, median_high = interval(_medians(ratios))
    return Sooner(
        target=target,
        asha_reached=len(both) / len(pairs),
        asha_seconds=statistics.median(a for a, _ in both),
        unpruned_seconds=statistics.median(b for _, b in both),
        times=statistics.median(ratios),
        low=low,
        high=high,
        median_low=median_low,
        median_high=median_high,
    )


def highest_common(searches: Iterable[Replay]) -> float:
    """Give the highest accuracy that every one of the searches reached."""
    return min(search.best for search in searches)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Give the bounds between which the middle 95 % of the values lie."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _medians(values: Sequence[float], *, times: int = 2000, seed: int = 0) -> list[float]:
    drawn_TN = np.random.default_rng(seed).choice(np.asarray(values), size=(times, len(values)))
    return [float(median) for median in np.median(drawn_TN, axis=1)]

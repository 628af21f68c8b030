"""Decides after each epoch whether its trial continues, and when a budget ends the search.

Everything here is a function of the settings and of log entries (search.run_folder): no clock, no file, no Ray. A log
that is fed in its order to a new `Judge` leads to the decisions that it holds.
Sources: ASHA, Li et al., 'A System for Massively Parallel Hyperparameter Tuning', 2020; median stopping, Golovin et
al., 'Google Vizier', 2017. Rungs, percentiles and medians are those of Ray's AsyncHyperBandScheduler and
MedianStoppingRule, with which a test compares them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from carray.search.space import SearchSettings

__all__ = [
    "BUDGETS",
    "STOPPING_SETTINGS",
    "Judge",
    "budget_reached",
    "diverged",
    "first_stop",
    "is_finite",
    "replay",
    "spent",
]

Entry = Mapping[str, Any]
"""A (trial, epoch) of the log, or one that is about to be logged."""

STOPPING_SETTINGS = ("scheduler", "epochs", "grace_epochs", "reduction_factor")
"""Settings of `search` that decide which trials are stopped."""
BUDGETS = {"time_budget_minutes": "minutes", "device_hours_budget": "device_hours", "money_budget": "money"}
"""Each budget's setting of `search`, and the figure of `spent` that it limits."""
_FEWEST_MEANS = 3
"""Other trials that the median rule needs before it stops any."""


class Judge:
    """What decisions need of the log so far; trials are compared within their family.

    A trial's score is its best validation top-1 so far, so one bad last epoch does not stop it.
    """

    def __init__(self, search: SearchSettings, entries: Iterable[Entry] = ()) -> None:
        """Take in the entries of a log, in their order."""
        self._search = search
        self._families: dict[str, _Rule] = defaultdict(lambda: _RULES[search.scheduler](search))
        self._scores: dict[int, float] = {}
        for entry in entries:
            self.add(entry)

    def decide(self, entry: Entry) -> str:
        """Decide about an epoch that is not logged yet: continue, stop, finish (last epoch) or non_finite."""
        if diverged(entry):
            return "non_finite"
        if entry["epoch"] >= self._search.epochs:
            return "finish"
        if entry["val_top1"] is None:
            return "continue"
        rule = self._families[entry["family"]]
        return "stop" if rule.stops(entry["number"], entry["epoch"], self._score(entry)) else "continue"

    def add(self, entry: Entry) -> None:
        """Take in a logged epoch; one that is not finite is compared with nothing."""
        if entry["val_top1"] is not None and is_finite(entry):
            self._scores[entry["number"]] = self._score(entry)
            self._families[entry["family"]].add(entry["number"], entry["epoch"], self._score(entry))

    def score_of(self, number: int) -> float | None:
        """Give a trial's best validation top-1 so far, a fraction; None without a finite epoch."""
        return self._scores.get(number)

    def _score(self, entry: Entry) -> float:
        return max(self._scores.get(entry["number"], -1.0), float(entry["val_top1"]))


class _Rule:
    """An early-stopping rule over the trials of one family; this one stops none."""

    def __init__(self, search: SearchSettings) -> None: ...

    def stops(self, number: int, epoch: int, score: float) -> bool:
        """Say whether a trial with that score after that epoch is stopped."""
        return False

    def add(self, number: int, epoch: int, score: float) -> None:
        """Take in a trial's score after an epoch."""


class _Asha(_Rule):
    """Asynchronous successive halving, one bracket: rungs at grace_epochs * reduction_factor ** k."""

    def __init__(self, search: SearchSettings) -> None:
        self._epochs, self._factor = search.epochs, search.reduction_factor
        count = int(np.log(search.epochs / search.grace_epochs) / np.log(self._factor) + 1)
        self._rungs: list[tuple[float, dict[int, float]]] = [
            (search.grace_epochs * self._factor**k, {}) for k in reversed(range(count))
        ]
        """The epoch of each rung, highest first, and the score of each trial that reached it."""

    def stops(self, number: int, epoch: int, score: float) -> bool:
        rung = self._reached(number, epoch)
        if not rung:  # the first trial at a rung has none to be compared with
            return False
        return score < float(np.nanpercentile(list(rung.values()), (1 - 1 / self._factor) * 100))

    def add(self, number: int, epoch: int, score: float) -> None:
        rung = self._reached(number, epoch)
        if rung is not None:
            rung[number] = score

    def _reached(self, number: int, epoch: int) -> dict[int, float] | None:
        """Give the highest rung that a trial has reached without being recorded there."""
        if epoch >= self._epochs:  # as in Ray, the last epoch is compared with none
            return None
        return next((scores for at, scores in self._rungs if epoch >= at and number not in scores), None)


class _Median(_Rule):
    """Stops a trial whose score is below the median of the other trials' mean scores up to that epoch."""

    def __init__(self, search: SearchSettings) -> None:
        self._grace = search.grace_epochs
        self._scores: dict[int, list[tuple[int, float]]] = defaultdict(list)

    def stops(self, number: int, epoch: int, score: float) -> bool:
        if epoch < self._grace:
            return False
        means = [
            float(np.mean(counted))
            for other, results in self._scores.items()
            if other != number and results[-1][0] >= epoch
            if (counted := [theirs for at, theirs in results if self._grace <= at <= epoch])
        ]
        return len(means) >= _FEWEST_MEANS and score < float(np.median(means))

    def add(self, number: int, epoch: int, score: float) -> None:
        self._scores[number].append((epoch, score))


_RULES: dict[str, type[_Rule]] = {"asha": _Asha, "median": _Median, "none": _Rule}


def first_stop(search: SearchSettings) -> int:
    """Give the first epoch after which a trial may end; the last one where no trial is stopped early."""
    return search.epochs if search.scheduler == "none" else min(search.grace_epochs, search.epochs)


def replay(search: SearchSettings, entries: Iterable[Entry]) -> list[str]:
    """Decide about a log's epochs once more, in their order; give a sentence for each that the log has otherwise."""
    judge, epochs = Judge(search), dict[int, int]()
    problems = []
    for entry in entries:
        name, before = f"{entry['trial_id']}, epoch {entry['epoch']}", epochs.get(entry["number"], 0)
        if entry["epoch"] != before + 1:
            problems.append(f"{name} follows epoch {before}")
        epochs[entry["number"]] = entry["epoch"]
        decision = judge.decide(entry)
        if decision != entry["decision"]:
            problems.append(f"{name}: the log says {entry['decision']}, its epochs lead to {decision}")
        judge.add(entry)
    return problems


def diverged(entry: Entry) -> bool:
    """Say whether an epoch ends its trial, since a loss is not finite.

    A training on the validation images, too, has no validation figures: only its training loss counts.
    """
    return not (_finite(entry["train_loss"]) if entry["val_top1"] is None else is_finite(entry))


def is_finite(entry: Entry) -> bool:
    """Say whether both losses of an epoch are finite; the log has null for one that is not."""
    return _finite(entry["train_loss"]) and _finite(entry["val_loss"])


def _finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def spent(search: SearchSettings, *, clock_seconds: float, device_seconds: float) -> dict[str, float]:
    """Give what is spent: minutes, device_hours and, where there is a price, money in its currency.

    Args:
        search: The price.
        clock_seconds: Of the search, summed over its starts; time while none runs is not counted.
        device_seconds: Seconds of logged epochs times the devices of each.
    """
    found = {"minutes": clock_seconds / 60, "device_hours": device_seconds / 3600}
    if search.price_per_device_hour is not None:
        found["money"] = found["device_hours"] * search.price_per_device_hour
    return found


def budget_reached(search: SearchSettings, used: Mapping[str, float]) -> str | None:
    """Name the first budget that `used` (see `spent`) has reached, in words; None while none is."""
    for name, figure in BUDGETS.items():
        limit = getattr(search, name)
        if limit is not None and used.get(figure, 0.0) >= limit:
            return f"search.{name} of {limit:g} is used up ({used[figure]:.4g} spent)"
    return None

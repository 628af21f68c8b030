"""Compares searches over known learning curves: with a scheduler, and with nobody being stopped.

From: replays (carray.estimates.rehearsal), of the same orders. To: how much sooner one reaches what both reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from carray.estimates.rehearsal import Costs, Curve, Replay, replay, shuffles

__all__ = ["Costs", "Curve", "Replay", "Sooner", "compare", "highest_common", "interval", "replay", "shuffles"]


@dataclass(frozen=True)
class Sooner:
    """Compares a scheduler with nobody being stopped, by when they reached a target, over many orders."""

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

"""Holds what an estimate says: a range from low to high, and lays such ranges out as a table.

Invariants: low is at most high; an estimate is never a single figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MACHINE_FACTOR", "Range", "middle", "money_text", "number_text", "seconds_text", "table_text", "whole"]

MACHINE_FACTOR = 1.25
"""By which machines of one name differ, and one machine with and without neighbours: the same job took 28 and 35
seconds on two of them (results/classify.csv). Each end of a range of times is moved outwards by it."""
_INSIDE = (10.0, 90.0)
"""Percentiles between which the middle 80 % lie."""


@dataclass(frozen=True, slots=True)
class Range:
    """Says that something lies between low and high."""

    low: float
    high: float

    def __add__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low * other.low, self.high * other.high)

    def widened(self, factor: float) -> Range:
        """Give the range with both ends moved outwards by a factor."""
        return Range(self.low / factor, self.high * factor)

    def at_least(self, low: float, high: float) -> Range:
        """Give the range with each end not below a bound."""
        return Range(max(self.low, low), max(self.high, high))

    def at_most(self, limit: float) -> Range:
        """Give the range with neither end above a limit."""
        return Range(min(self.low, limit), min(self.high, limit))

    def rounded(self) -> list[float]:
        """Give both ends to three digits, for JSON."""
        return [float(f"{value:.3g}") if abs(value) < 1e6 else round(value) for value in (self.low, self.high)]


def middle(values: npt.NDArray[np.float64] | Sequence[float]) -> Range:
    """Give the range in which the middle 80 % of the values lie."""
    low, high = np.percentile(np.asarray(values, dtype=np.float64), _INSIDE)
    return Range(float(low), float(high))


def whole(low: float, high: float | None = None) -> Range:
    """Give a range of a count, which has no fractions."""
    return Range(math.floor(low), math.ceil(low if high is None else high))


def seconds_text(seconds: float) -> str:
    """Say a time in the unit that fits it: '45 s', '12 min', '3.4 h'."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def number_text(value: float) -> str:
    """Give a number to three digits, or whole above a hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def money_text(value: float) -> str:
    """Give a price to its cents."""
    return f"{value:,.2f}" if value >= 0.01 or not value else "< 0.01"


def table_text(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Lay (what, from, to, note) out in columns, numbers to the right."""
    lines = [("", "from", "to", ""), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    laid = [
        f"{what:<{widths[0]}}  {low:>{widths[1]}}  {high:>{widths[2]}}  {note}".rstrip()
        for what, low, high, note in lines
    ]
    return "\n".join(laid)

"""Ranges, of which estimates consist, and their layout as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["MACHINE_FACTOR", "START_SECONDS", "Range", "busy_text", "middle", "table_row", "table_text", "whole"]

MACHINE_FACTOR = 1.25
"""Machines of one type differ: the same job took 28 and 35 seconds on two of them (results/classify.csv). Each end of a
range of times is moved outwards by this factor."""
_INSIDE = (10.0, 90.0)
"""Percentiles between which the middle 80 % lie."""


@dataclass(frozen=True, slots=True)
class Range:
    """The low and high end of an estimated figure; low is at most high."""

    low: float
    high: float

    def __add__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low * other.low, self.high * other.high)

    def widened(self, factor: float) -> Range:
        """Move both ends outwards by a factor."""
        return Range(self.low / factor, self.high * factor)

    def at_least(self, low: float, high: float) -> Range:
        """Raise each end to at least a bound."""
        return Range(max(self.low, low), max(self.high, high))

    def at_most(self, limit: float) -> Range:
        """Lower each end to at most a limit."""
        return Range(min(self.low, limit), min(self.high, limit))

    def rounded(self) -> list[float]:
        """Round both ends to three digits, for JSON."""
        return [float(f"{value:.3g}") if abs(value) < 1e6 else round(value) for value in (self.low, self.high)]


START_SECONDS = Range(1.0, 20.0)
"""Start of the command and of its processes, without Ray or with it (results/classify.csv, cold start)."""


def middle(values: npt.NDArray[np.float64] | Sequence[float]) -> Range:
    """Compute the range of the middle 80 % of the values."""
    low, high = np.percentile(np.asarray(values, dtype=np.float64), _INSIDE)
    return Range(float(low), float(high))


def whole(low: float, high: float | None = None) -> Range:
    """Make a range of a count, without fractions."""
    return Range(math.floor(low), math.ceil(low if high is None else high))


def seconds_text(seconds: float) -> str:
    """Format a time in a suitable unit: '45 s', '12 min', '3.4 h'."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def number_text(value: float) -> str:
    """Format a number to three digits, or whole above a hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def money_text(value: float) -> str:
    """Format a price to its cents."""
    return f"{value:,.2f}" if value >= 0.01 or not value else "< 0.01"


def busy_text(load: float) -> list[str]:
    """Warn if other work kept the machine busy during the measurement, by its load for each core."""
    if load <= 1.5:
        return []
    return [
        f"Other work kept this machine busy (a load of {load:.1f} for each core), which raised the upper ends; repeat "
        "the estimate when it is idle."
    ]


def table_row(
    what: str, value: Range, text: Callable[[float], str] = number_text, note: str = ""
) -> tuple[str, str, str, str]:
    """Format a range as a row of `table_text`."""
    return what, text(value.low), text(value.high), note


def table_text(rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Format rows (what, from, to, note) as columns, numbers to the right."""
    lines = [("", "from", "to", ""), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    laid = [
        f"{what:<{widths[0]}}  {low:>{widths[1]}}  {high:>{widths[2]}}  {note}".rstrip()
        for what, low, high, note in lines
    ]
    return "\n".join(laid)

"""Reads what a space says of one value, and draws from it.

From: a list, {uniform: [a, b]}, {log_uniform: [a, b]}, {integers: [a, b]}, or one fixed value. To: a `Range`.
Invariants: the same generator state gives the same draw; a range nothing can be drawn from is refused in a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from carray.core.errors import SettingsError

__all__ = ["Range", "read_range", "shorten"]

_KINDS = ("uniform", "log_uniform", "integers")


@dataclass(frozen=True)
class Range:
    """Is what one value may be: `choices`, or numbers from `low` to `high`, both included."""

    kind: Literal["fixed", "choice", "uniform", "log_uniform", "integers"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Give the choices, or both ends: what a network must take for all of the range to be possible."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.kind == "integers" else (self.low, self.high)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Give every value there is, each once; None of a continuous range."""
        if self.kind == "integers":
            return tuple(range(int(self.low), int(self.high) + 1))
        return tuple(dict.fromkeys(self.choices)) or None

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value; a number has four significant digits."""
        if self.kind == "fixed":
            return self.choices[0]
        if self.kind == "choice":
            return self.choices[int(rng.integers(len(self.choices)))]
        if self.kind == "integers":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.kind == "log_uniform":
            return shorten(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return shorten(rng.uniform(self.low, self.high))


def shorten(value: float) -> float:
    """Round to four significant digits, which is as much as anybody wants to read or type again."""
    return float(f"{value:.4g}")


def read_range(where: str, spec: Any) -> Range:
    """Read a space's entry; `where` names it in a sentence.

    Raises:
        SettingsError: nothing can be drawn from it.
    """
    if isinstance(spec, list):
        if not spec:
            raise SettingsError(f"{where} is an empty list; give at least one choice.")
        return Range("choice", tuple(spec))
    if not isinstance(spec, dict):
        return Range("fixed", (spec,))
    kind, bounds = next(iter(spec.items())) if len(spec) == 1 else ("", None)
    if kind not in _KINDS:
        allowed = "a list, {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}"
        raise SettingsError(f"{where} is {spec!r}; allowed is {allowed}.")
    try:
        low, high = (float(bound) for bound in bounds or ())
    except (TypeError, ValueError):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed are two numbers [a, b].") from None
    if not low <= high or not math.isfinite(high - low) or (kind == "log_uniform" and low <= 0):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed is a <= b, and a > 0 for log_uniform.")
    if kind == "integers" and not (low.is_integer() and high.is_integer()):
        raise SettingsError(f"{where}.integers is {bounds!r}; allowed are two whole numbers [a, b].")
    return Range(cast("Literal['uniform', 'log_uniform', 'integers']", kind), low=low, high=high)

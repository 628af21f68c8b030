"""Draws configurations: number i is a function of (seed, i) and the families alone.

Invariants: every configuration is drawn and checked before anything is launched; the first trial of each family is its
known-good default; drawing more trials leaves the earlier ones as they were.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from carray.core.errors import SettingsError
from carray.trials.hyper import CnnHyper, TransferHyper, read_hyper
from carray.trials.space import TuneSettings

__all__ = ["draw_trials"]


def draw_trials(settings: TuneSettings) -> list[CnnHyper | TransferHyper]:
    """Draw every configuration of a search; number i depends on the seed, i and the families alone.

    Raises:
        SettingsError: a range that cannot be drawn from, or a drawn value that no network takes.
    """
    problems: dict[str, None] = {}
    trials: list[CnnHyper | TransferHyper] = []
    seen: set[str] = set()
    for number in range(settings.search.trials):
        name = _family_of(number, settings)
        values = dict(settings.families[name].default)
        if name in seen:
            values |= _draw(name, settings.families[name].space, np.random.default_rng([settings.search.seed, number]))
        seen.add(name)
        try:
            hyper = read_hyper({"family": name, **values})
            _check_size(hyper, settings)
            trials.append(hyper)
        except ValidationError as err:
            for problem in err.errors():
                where = ".".join(str(part) for part in problem["loc"][1:])
                problems[f"families.{name}: {where} is {problem['input']!r}: {problem['msg'].lower()}."] = None
        except SettingsError as err:
            problems |= dict.fromkeys(err.problems)
    if problems:
        raise SettingsError(list(problems))
    return trials


def _check_size(hyper: CnnHyper | TransferHyper, settings: TuneSettings) -> None:
    for name, size in (("input_size", hyper.input_size), ("eval_size", hyper.eval_size or 0)):
        if size > settings.pixels.decode_size:
            raise SettingsError(
                f"families.{hyper.family}: {name} is {size}, above pixels.decode_size "
                f"{settings.pixels.decode_size}; lower it or raise pixels.decode_size."
            )


def _family_of(number: int, settings: TuneSettings) -> Literal["cnn", "transfer"]:
    """Deal numbers to families in proportion to their shares, the largest first (Bresenham's rule)."""
    names = sorted(settings.families, key=lambda name: (-settings.families[name].share, name))
    total = sum(family.share for family in settings.families.values())
    given = dict.fromkeys(names, 0)
    for i in range(number + 1):
        # A family that has had none goes first, so that even a short search tries each default.
        name = max(names, key=lambda n: (given[n] == 0, settings.families[n].share / total * (i + 1) - given[n]))
        given[name] += 1
    return name


def _draw(family: str, space: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    # Sorted, so that the order of keys in a file does not change what is drawn.
    return {key: _draw_value(f"families.{family}.space.{key}", space[key], rng) for key in sorted(space)}


def _draw_value(where: str, spec: Any, rng: np.random.Generator) -> Any:
    allowed = "a list, {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}"
    if isinstance(spec, list):
        if not spec:
            raise SettingsError(f"{where} is an empty list; give at least one choice.")
        return spec[int(rng.integers(len(spec)))]
    if not isinstance(spec, dict):
        return spec
    kind, bounds = next(iter(spec.items())) if len(spec) == 1 else ("", None)
    if kind not in ("uniform", "log_uniform", "integers"):
        raise SettingsError(f"{where} is {spec!r}; allowed is {allowed}.")
    try:
        low, high = (float(bound) for bound in bounds or ())
    except (TypeError, ValueError):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed are two numbers [a, b].") from None
    if not low <= high or (kind == "log_uniform" and low <= 0):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed is a <= b, and a > 0 for log_uniform.")
    if kind == "integers":
        return int(rng.integers(int(low), int(high) + 1))
    if kind == "log_uniform":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{rng.uniform(low, high):.4g}")

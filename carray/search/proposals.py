"""Reads the search space and draws configurations: number i is a function of the seed, i and the families alone.

Every domain is checked before anything is drawn, and every configuration before anything is launched. The first trial
of each family is its known-good default; a larger search keeps the configurations of a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import TypeAdapter, ValidationError

from carray.core.errors import SettingsError
from carray.search.space import TuneSettings
from carray.search.train.hyperparameters import HYPERS, CnnHyper, TransferHyper, read_hyper

__all__ = [
    "Domain",
    "Family",
    "candidates",
    "deal_families",
    "draw_trials",
    "draw_values",
    "grid_size",
    "read_domain",
    "read_values",
    "shorten",
    "spaces",
]

_KINDS = ("uniform", "log_uniform", "integers")


@dataclass(frozen=True)
class Domain:
    """The values that one hyperparameter may have: `choices`, or numbers from `low` to `high`, both included."""

    kind: Literal["fixed", "choice", "uniform", "log_uniform", "integers"]
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Give the choices, or both ends of the range; a network that takes these takes all of it."""
        if self.choices:
            return self.choices
        return (int(self.low), int(self.high)) if self.kind == "integers" else (self.low, self.high)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Give every value, each once; None for a continuous range."""
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
    """Round to four significant digits, so that a person can read and type the value."""
    return float(f"{value:.4g}")


def read_domain(where: str, spec: Any) -> Domain:
    """Read an entry of a space: a list, {uniform|log_uniform|integers: [a, b]} or a fixed value; `where` is its name.

    Raises:
        SettingsError: nothing can be drawn from it.
    """
    if isinstance(spec, list):
        if not spec:
            raise SettingsError(f"{where} is an empty list; give at least one choice.")
        return Domain("choice", tuple(spec))
    if not isinstance(spec, dict):
        return Domain("fixed", (spec,))
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
    return Domain(cast("Literal['uniform', 'log_uniform', 'integers']", kind), low=low, high=high)


Family = Literal["cnn", "transfer"]

_LARGEST_GRID = 1_000_000


def draw_trials(settings: TuneSettings) -> list[CnnHyper | TransferHyper]:
    """Draw every configuration of a search, at random or from a grid.

    A grid holds each family's default and every combination of its lists and integers, in an order that the seed
    shuffles; a search has at most that many trials. With tpe, these are the configurations of the trials before it
    has observed enough to propose any.

    Raises:
        SettingsError: a range that cannot be drawn from, or a value that no network takes.
    """
    _check_spaces(settings)
    grid = settings.search.searcher == "grid"
    problems: dict[str, None] = {}
    trials: list[CnnHyper | TransferHyper] = []
    for name, values in _grid(settings) if grid else _random(settings):
        try:
            trials.append(read_values(settings, name, values))
        except SettingsError as err:
            problems |= dict.fromkeys(err.problems)
    if problems:
        raise SettingsError(list(problems))
    return trials


def grid_size(settings: TuneSettings) -> int:
    """Count the configurations of a grid, including the families' defaults.

    Raises:
        SettingsError: a continuous range, or a default that no network takes.
    """
    _check_spaces(settings)
    return sum(_combinations(settings, name, axes)[0] for name, axes in spaces(settings).items())


def spaces(settings: TuneSettings) -> dict[Family, dict[str, Domain]]:
    """Read the families' spaces; sorted, so that the order of keys in a file does not change what is drawn.

    Raises:
        SettingsError: a range nothing can be drawn from.
    """
    return {
        name: {key: _axis(name, key, family.space[key]) for key in sorted(family.space)}
        for name, family in settings.families.items()
    }


def _axis(family: Family, key: str, spec: Any) -> Domain:
    possible = read_domain(f"families.{family}.space.{key}", spec)
    # Values as the hyper holds them: YAML reads 1e-3 as text, and a path of weights becomes absolute.
    field = HYPERS[family].model_fields[key]
    as_held = TypeAdapter(cast("Any", Annotated[cast("Any", field.annotation), field])).validate_python
    with suppress(ValidationError):
        return replace(possible, choices=tuple(as_held(value) for value in possible.choices))
    return possible


def _check_spaces(settings: TuneSettings) -> None:
    """Check that every choice, and both ends of every range, is a value that a network takes.

    Raises:
        SettingsError: one sentence for each that is not, and for each continuous range of a grid.
    """
    problems: dict[str, None] = {}
    for name, family in settings.families.items():
        for key, spec in sorted(family.space.items()):
            where = f"families.{name}.space.{key}"
            try:
                possible = read_domain(where, spec)
            except SettingsError as err:
                problems |= dict.fromkeys(err.problems)
                continue
            if settings.search.searcher == "grid" and possible.values is None:
                problems[
                    f"{where} is {spec!r}, of which a grid cannot try every value; give a list or "
                    "{integers: [a, b]}, or take search.searcher random or tpe."
                ] = None
            for value in possible.extremes:
                problems |= dict.fromkeys(_field_problems(settings, name, key, value))
    if problems:
        raise SettingsError(list(problems))


def read_values(settings: TuneSettings, family: Family, values: Mapping[str, Any]) -> CnnHyper | TransferHyper:
    """Check one configuration's values, including those of the family's default.

    Raises:
        SettingsError: one sentence for each value that no network takes.
    """
    try:
        hyper = read_hyper({"family": family, **values})
    except ValidationError as err:
        raise SettingsError(list(dict.fromkeys(_sentence(family, problem) for problem in err.errors()))) from None
    problems = [
        problem
        for key, size in (("input_size", hyper.input_size), ("eval_size", hyper.eval_size))
        for problem in _size_problems(settings, family, key, size)
    ]
    if problems:
        raise SettingsError(problems)
    return hyper


def draw_values(settings: TuneSettings, family: Family, axes: Mapping[str, Domain], number: int) -> dict[str, Any]:
    """Draw trial `number` from its family's space, over the family's default; the result is not checked."""
    rng = np.random.default_rng([settings.search.seed, number])
    return {**settings.families[family].default, **{key: possible.draw(rng) for key, possible in axes.items()}}


def candidates(settings: TuneSettings) -> list[CnnHyper | TransferHyper]:
    """Give a configuration for every backbone, weights and size that a searcher may propose.

    Each has the highest last_stages, the only value of it that a backbone may lack.

    Raises:
        SettingsError: a range that cannot be drawn from, or a default that no network takes.
    """
    found = []
    for name, axes in spaces(settings).items():
        default = settings.families[name].default
        highest = {key: max(axes[key].extremes) for key in ("last_stages",) if key in axes}
        if "last_stages" in getattr(axes.get("train"), "choices", ()):
            highest["train"] = "last_stages"
        keys = [key for key in ("backbone", "weights", "input_size", "eval_size") if key in axes]
        for chosen in product(*(axes[key].extremes for key in keys)):
            found.append(read_values(settings, name, {**default, **highest, **dict(zip(keys, chosen, strict=True))}))
    return found


def deal_families(settings: TuneSettings, *, limits: Mapping[Family, int] | None = None) -> Iterator[Family]:
    """Deal numbers 0, 1, ... to families in proportion to their shares, the largest first (Bresenham's rule).

    It ends after `search.trials` numbers, or when every family has its limit.
    """
    limits = limits or dict.fromkeys(settings.families, settings.search.trials)
    names = sorted(settings.families, key=lambda name: (-settings.families[name].share, name))
    total = sum(family.share for family in settings.families.values())
    given = dict.fromkeys(names, 0)
    for i in range(min(settings.search.trials, sum(limits.values()))):
        # A family without a trial goes first, so that even a short search tries each default.
        name = max(
            (name for name in names if given[name] < limits[name]),
            key=lambda n: (given[n] == 0, settings.families[n].share / total * (i + 1) - given[n]),
        )
        given[name] += 1
        yield name


def _random(settings: TuneSettings) -> Iterator[tuple[Family, dict[str, Any]]]:
    axes = spaces(settings)
    seen: set[Family] = set()
    for number, name in enumerate(deal_families(settings)):
        default = settings.families[name].default
        yield name, draw_values(settings, name, axes[name], number) if name in seen else dict(default)
        seen.add(name)


def _grid(settings: TuneSettings) -> Iterator[tuple[Family, dict[str, Any]]]:
    combinations = {name: _combinations(settings, name, axes) for name, axes in spaces(settings).items()}
    for name in deal_families(settings, limits={name: count for name, (count, _) in combinations.items()}):
        yield name, next(combinations[name][1])


def _combinations(
    settings: TuneSettings, family: Family, axes: Mapping[str, Domain]
) -> tuple[int, Iterator[dict[str, Any]]]:
    """Count a family's configurations and yield each once: the default, then the others shuffled."""
    default = settings.families[family].default
    known_good = read_values(settings, family, default).model_dump()
    choices = {key: possible.values or () for key, possible in axes.items()}
    shape = [len(values) for values in choices.values()]
    count = math.prod(shape)
    if count > _LARGEST_GRID:
        raise SettingsError(
            f"families.{family}.space has {count:,} combinations; a grid may have {_LARGEST_GRID:,}, so shorten its "
            "lists, or take search.searcher random or tpe."
        )
    # A combination equal to the default would be a second trial of the same configuration.
    twin = {key: known_good[key] for key in choices}
    has_twin = all(twin[key] in values for key, values in choices.items())

    def each() -> Iterator[dict[str, Any]]:
        yield dict(default)
        order = np.random.default_rng([settings.search.seed, sorted(HYPERS).index(family)]).permutation(count)
        for index in order:
            indices = np.unravel_index(index, shape) if shape else ()
            chosen = {key: values[int(i)] for (key, values), i in zip(choices.items(), indices, strict=True)}
            if chosen != twin:
                yield {**default, **chosen}

    return count + (not has_twin), each()


def _field_problems(settings: TuneSettings, family: Family, key: str, value: Any) -> list[str]:
    """List the problems of one value by itself; combinations are checked when they are drawn."""
    try:
        HYPERS[family].model_validate({key: value})
    except ValidationError as err:
        return [_sentence(family, problem) for problem in err.errors() if problem["loc"][:1] == (key,)]
    return _size_problems(settings, family, key, value) if key in ("input_size", "eval_size") else []


def _size_problems(settings: TuneSettings, family: Family, key: str, size: int | None) -> list[str]:
    largest = settings.pixels.decode_size
    if size is None or size <= largest:
        return []
    return [
        f"families.{family}: {key} is {size}, above pixels.decode_size {largest}; lower it or raise pixels.decode_size."
    ]


def _sentence(family: Family, problem: Any) -> str:
    # A problem of a whole configuration has no location; its message names the values.
    where = ".".join(str(part) for part in problem["loc"] if part != family)
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    return (
        f"families.{family}: {where} is {problem['input']!r}: {message}." if where else f"families.{family}: {message}."
    )

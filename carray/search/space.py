"""Defines the settings of `carray tune`, and draws the configurations of its trials from the search spaces.

Configuration i is a function of the seed, i and the families alone. Every space is checked before anything is drawn,
and every configuration before anything is launched. The first trial of each family is its known-good default; a larger
search keeps the configurations of a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from carray.core.errors import SettingsError
from carray.core.settings import Seed, Settings
from carray.images.pixels import PixelSettings, plain_crop_size
from carray.search.train.hyperparameters import HYPERS, CnnHyper, TransferHyper, read_hyper

__all__ = [
    "Domain",
    "Family",
    "FamilySettings",
    "SearchSettings",
    "TuneSettings",
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

Family = Literal["cnn", "transfer"]
_LARGEST_GRID = 1_000_000


class FamilySettings(Settings):
    """A family of networks: its share of the trials, its first configuration, and its search space."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the trials, relative to the other families' shares."""
    default: dict[str, Any] = Field(default_factory=dict)
    """Values of the first trial, over the hyperparameters' own defaults."""
    space: dict[str, Any] = Field(default_factory=dict)
    """For each varied value: a list (choice), {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}."""


class SearchSettings(Settings):
    """Length, method, budgets and resources of a search."""

    trials: int = Field(default=8, ge=1, le=100_000)
    """Largest number of configurations."""
    epochs: int = Field(default=6, ge=1, le=10_000)
    """Epochs of a trial that is not stopped early; the learning rate schedule spans them."""
    seed: Seed = 0
    """Seed of all random numbers; configuration i is a function of (seed, i)."""
    searcher: Literal["random", "tpe", "grid"] = "random"
    """Source of configurations: random draws, Optuna's TPE, or every combination of the listed choices."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Early stopping: ASHA, the median rule, or none."""
    grace_epochs: int = Field(default=1, ge=1)
    """First epoch after which a trial may be stopped."""
    reduction_factor: float = Field(default=3, gt=1)
    """At each rung of ASHA, one trial in this many continues."""
    rung0: Literal["auto", "on", "off"] = "auto"
    """Whether transfer trials are ordered by a linear head on each backbone's frozen features; auto: with two or more
    candidates."""
    rung0_margin: float = Field(default=0.2, ge=0, le=1)
    """Trials whose candidate is more than this below the best candidate's accuracy are not run; 1 drops none."""
    time_budget_minutes: float | None = Field(default=None, gt=0)
    """The search ends after this long, summed over all starts, and packs the best trial so far."""
    device_hours_budget: float | None = Field(default=None, gt=0)
    """The same in device hours: of a trial's GPUs, or of its CPUs where it has none."""
    money_budget: float | None = Field(default=None, gt=0)
    """The same in money, at price_per_device_hour."""
    price_per_device_hour: float | None = Field(default=None, gt=0)
    """Price of one GPU, or of one CPU where a trial has no GPU."""
    cpus_per_trial: float | None = Field(default=None, gt=0)
    """None: one, or each trial's share of the CPUs beside its GPUs."""
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """None: one GPU where the cluster has any, else none; 0.5 lets two trials share one."""
    loggers: list[Literal["tensorboard", "mlflow"]] = Field(default_factory=list)
    """Loggers besides the run's own log: TensorBoard files under RUN/tensorboard, an MLflow server at
    MLFLOW_TRACKING_URI."""
    refit: bool = False
    """Whether the winner is trained once more, on train and val, and packed from that training."""
    refit_epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Epochs of the refit; None is epochs."""
    target_precision: float | None = Field(default=0.95, gt=0, lt=1)
    """Share of accepted labels that should be right: the bundle's threshold is chosen for it on validation images,
    where that can be shown; None chooses no threshold."""

    @field_validator("rung0", mode="before")
    @classmethod
    def _take_yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_epochs(self) -> SearchSettings:
        if self.grace_epochs > self.epochs:
            raise ValueError(f"grace_epochs is {self.grace_epochs}, above epochs {self.epochs}; lower it")
        if self.money_budget is not None and self.price_per_device_hour is None:
            raise ValueError(f"money_budget is {self.money_budget:g} without price_per_device_hour; give that price")
        return self


_FAMILIES: dict[Family, FamilySettings] = {
    "transfer": FamilySettings(
        share=0.6,
        space={
            "train": ["head", "last_stages"],
            "learning_rate": {"log_uniform": [3e-4, 3e-3]},
            "label_smoothing": {"uniform": [0.0, 0.2]},
        },
    ),
    "cnn": FamilySettings(
        share=0.4,
        default={"input_size": 96},
        space={
            "input_size": [64, 96],
            "width": [16, 32],
            "blocks": {"integers": [1, 2]},
            "kernel": [3, 5],
            "learning_rate": {"log_uniform": [5e-4, 5e-3]},
            "dropout": {"uniform": [0.0, 0.4]},
        },
    ),
}


class TuneSettings(Settings):
    """All settings of `carray tune`."""

    search: SearchSettings = SearchSettings()
    pixels: PixelSettings = PixelSettings()
    """Pixel settings; a trial's own eval_size or input_size replaces pixels.input_size."""
    families: dict[Family, FamilySettings] = Field(default_factory=lambda: dict(_FAMILIES))

    @model_validator(mode="after")
    def _check_families(self) -> TuneSettings:
        if not self.families:
            raise ValueError("families is empty; name cnn, transfer or both")
        for name, family in self.families.items():
            known = set(HYPERS[name].model_fields) - {"family"}
            for where in ("default", "space"):
                unknown = sorted(set(getattr(family, where)) - known)
                if unknown:
                    raise ValueError(
                        f"families.{name}.{where} has {', '.join(unknown)}; allowed are {', '.join(sorted(known))}"
                    )
        return self

    @model_validator(mode="after")
    def _fit_decode_size(self) -> TuneSettings:
        """Decode for the largest trial, unless decode_size is given: all trials share one block of decoded images."""
        if "decode_size" not in self.pixels.model_fields_set:
            largest = max(_largest_size(name, family) for name, family in self.families.items())
            size = plain_crop_size(largest, self.pixels.view_crop)
            pixels = self.pixels.model_copy(update={"decode_size": size, "input_size": min(largest, size)})
            object.__setattr__(self, "pixels", pixels)  # it is frozen for everyone else
        return self

    def trial_pixels(self, hyper: CnnHyper | TransferHyper) -> PixelSettings:
        """Give a trial's pixel settings: the search's, at the trial's own size."""
        return self.pixels.model_copy(update={"input_size": hyper.eval_size or hyper.input_size})


@dataclass(frozen=True)
class Domain:
    """The values that one hyperparameter may have: `choices`, or numbers from `low` to `high`, both included."""

    kind: str
    """choice, integers, uniform or log_uniform."""
    choices: Sequence[Any] = ()
    """Every value; of integers, a range; none of a continuous kind."""
    low: float = 0.0
    high: float = 0.0

    @property
    def extremes(self) -> tuple[Any, ...]:
        """Give the choices, or both ends of the range; a network that accepts these accepts every value."""
        if self.kind == "choice":
            return tuple(self.choices)
        return (self.choices[0], self.choices[-1]) if self.choices else (self.low, self.high)

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value; a number has four significant digits."""
        if self.choices:
            return self.choices[int(rng.integers(len(self.choices)))]
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
    if isinstance(spec, list) and not spec:
        raise SettingsError(f"{where} is an empty list; give at least one choice.")
    if not isinstance(spec, dict):
        return Domain("choice", spec if isinstance(spec, list) else [spec])
    kind, bounds = next(iter(spec.items())) if len(spec) == 1 else ("", None)
    if kind not in ("uniform", "log_uniform", "integers"):
        allowed = "a list, {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}"
        raise SettingsError(f"{where} is {spec!r}; allowed is {allowed}.")
    try:
        low, high = (float(bound) for bound in bounds or ())
    except (TypeError, ValueError):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed are two numbers [a, b].") from None
    if not low <= high or not math.isfinite(high - low) or (kind == "log_uniform" and low <= 0):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed is a <= b, and a > 0 for log_uniform.")
    if kind != "integers":
        return Domain(kind, low=low, high=high)
    if not (low.is_integer() and high.is_integer()):
        raise SettingsError(f"{where}.integers is {bounds!r}; allowed are two whole numbers [a, b].")
    return Domain("integers", range(int(low), int(high) + 1))


def draw_trials(settings: TuneSettings) -> list[CnnHyper | TransferHyper]:
    """Draw every configuration of a search, at random or from a grid.

    A grid holds each family's default and every combination of its lists and integers, in an order that the seed
    shuffles; a search has at most that many trials. With tpe, these are the configurations of the trials before it
    has observed enough to propose any.

    Raises:
        SettingsError: a range that cannot be drawn from, or a value that no network takes.
    """
    problems: dict[str, None] = {}
    trials: list[CnnHyper | TransferHyper] = []
    for name, values in (_grid if settings.search.searcher == "grid" else _random)(settings):
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
    return sum(_combinations(settings, name, axes)[0] for name, axes in spaces(settings).items())


def spaces(settings: TuneSettings) -> dict[Family, dict[str, Domain]]:
    """Read the families' spaces; sorted, so that the order of keys in a file does not change what is drawn.

    Raises:
        SettingsError: one sentence for each range that nothing can be drawn from, each continuous range of a grid, and
            each choice or end of a range that no network takes.
    """
    problems: dict[str, None] = {}
    found: dict[Family, dict[str, Domain]] = {name: {} for name in settings.families}
    for name, family in settings.families.items():
        for key in sorted(family.space):
            try:
                found[name][key] = _axis(settings, name, key)
            except SettingsError as err:
                problems |= dict.fromkeys(err.problems)
    if problems:
        raise SettingsError(list(problems))
    return found


def _axis(settings: TuneSettings, family: Family, key: str) -> Domain:
    """Read the space of one hyperparameter, its choices as the hyperparameter's type holds them."""
    where, spec, hypers = f"families.{family}.space.{key}", settings.families[family].space[key], HYPERS[family]
    possible = read_domain(where, spec)
    problems, held = [], []
    if settings.search.searcher == "grid" and not possible.choices:
        problems.append(
            f"{where} is {spec!r}, of which a grid cannot try every value; give a list or {{integers: [a, b]}}, or "
            "take search.searcher random or tpe."
        )
    # YAML reads 1e-3 as text, and a path of weights becomes absolute.
    field: Any = hypers.model_fields[key]
    reader = TypeAdapter[Any](Annotated[field.annotation, field], config=hypers.model_config)
    for value in possible.extremes:
        try:
            held.append(reader.validate_python(value))
        except ValidationError as err:
            problems += [_sentence(family, problem, key) for problem in err.errors()]
        else:
            problems += _size_problems(settings, family, {key: value})
    if problems:
        raise SettingsError(problems)
    return replace(possible, choices=held) if possible.kind == "choice" else possible


def read_values(settings: TuneSettings, family: Family, values: Mapping[str, Any]) -> CnnHyper | TransferHyper:
    """Check one configuration's values, including those of the family's default.

    Raises:
        SettingsError: one sentence for each value that no network takes.
    """
    try:
        hyper = read_hyper({"family": family, **values})
    except ValidationError as err:
        raise SettingsError(list(dict.fromkeys(_sentence(family, problem) for problem in err.errors()))) from None
    if problems := _size_problems(settings, family, vars(hyper)):
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
        highest = {key: max(axes[key].extremes) for key in ("last_stages",) if key in axes}
        if "train" in axes and "last_stages" in axes["train"].choices:
            highest["train"] = "last_stages"
        keys = [key for key in ("backbone", "weights", "input_size", "eval_size") if key in axes]
        for chosen in product(*(axes[key].extremes for key in keys)):
            values = {**settings.families[name].default, **highest, **dict(zip(keys, chosen, strict=True))}
            found.append(read_values(settings, name, values))
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
    choices = [list(dict.fromkeys(possible.choices)) for possible in axes.values()]
    count = math.prod(map(len, choices))
    if count > _LARGEST_GRID:
        raise SettingsError(
            f"families.{family}.space has {count:,} combinations; a grid may have {_LARGEST_GRID:,}, so shorten its "
            "lists, or take search.searcher random or tpe."
        )
    # A combination equal to the default would be a second trial of the same configuration.
    known_good = read_values(settings, family, default)
    twin = tuple(getattr(known_good, key) for key in axes)
    combinations = list(product(*choices))
    order = np.random.default_rng([settings.search.seed, sorted(HYPERS).index(family)]).permutation(count)
    others = [combinations[i] for i in order if combinations[i] != twin]
    return 1 + len(others), (default | dict(zip(axes, chosen, strict=False)) for chosen in [(), *others])


def _largest_size(family: Family, settings: FamilySettings) -> int:
    """Find the largest size of a family's trials; a value that is no size is refused later."""
    sizes = [8]
    for key in ("input_size", "eval_size"):
        sizes.append(settings.default.get(key, HYPERS[family].model_fields[key].default))
        with suppress(SettingsError):
            sizes += read_domain(key, settings.space.get(key, 8)).extremes
    return max(size for size in sizes if isinstance(size, int))


def _size_problems(settings: TuneSettings, family: Family, values: Mapping[str, Any]) -> list[str]:
    largest = settings.pixels.decode_size
    return [
        f"families.{family}: {key} is {size}, above pixels.decode_size {largest}; lower it or raise pixels.decode_size."
        for key in ("input_size", "eval_size")
        if (size := values.get(key)) is not None and size > largest
    ]


def _sentence(family: Family, problem: Any, key: str = "") -> str:
    # A problem of a whole configuration has no location; its message names the values.
    where = key or ".".join(str(part) for part in problem["loc"] if part != family)
    message = problem["msg"].removeprefix("Value error, ")
    value = f"{where} is {problem['input']!r}: " if where else ""
    return f"families.{family}: {value}{message[:1].lower()}{message[1:]}."

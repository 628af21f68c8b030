"""Copies better trials over worse ones while they train, and varies what is copied: population-based training.

From: every epoch's accuracy, in the order of the log. To: for some trials, after some epochs, an order to go on from
another trial's weights of that epoch with new values (RUN/trials/ID/copy.json), which the trial obeys before its next
epoch.
Invariants: trials are compared, and copied, at equal epochs, so a trial's epochs count on and the schedule of learning
rates stays whole; an order is a function of the seed and of the log so far, and is written before the epoch that led to
it is logged, so a search that goes on finds it; what it needs of another trial is kept until all trials are past it.
With fewer places than trials, later trials copy from earlier ones, but not the other way round.
Source: Jaderberg et al., 'Population Based Training of Neural Networks', 2017: truncation selection; values are
multiplied by 0.8 or 1.25, moved by one place in a list, or drawn anew with probability 0.25.
Cost: a copy of each trial's state every search.grace_epochs epochs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from carray.core.errors import SettingsError
from carray.core.storage import delete, exists, join, read_json, write_json
from carray.trials import format as runs
from carray.trials.draw import Family, read_values, spaces
from carray.trials.ranges import Range, shorten
from carray.trials.space import TuneSettings

__all__ = ["Copy", "Population", "check_population", "copied_state", "is_copied_at", "population_for", "read_copy"]

_QUARTER = 0.25
"""The worst so many copy, the best so many are copied."""
_LEAST = 4
"""Trials at an epoch, below which a quarter is nobody."""
_DRAWN_ANEW, _FACTORS = 0.25, (0.8, 1.25)

_CHANGEABLE = frozenset(
    """clip_norm colour_jitter crop_scale crop_stretch cutmix drop_path dropout erasing flip head_learning_rate
    label_smoothing learning_rate mixup momentum policy weight_decay""".split()
)
"""What a network that has begun to learn can be told anew: its shape and its optimiser's state do not depend on it."""


def check_population(settings: TuneSettings) -> None:
    """Check, where the scheduler is pbt, that the space is one of values that may change while a network learns.

    Raises:
        SettingsError: one sentence for each reason why it is not.
    """
    search = settings.search
    if search.scheduler != "pbt":
        return
    problems = []
    if len(settings.families) != 1:
        problems.append(
            "search.scheduler pbt copies weights, so all trials must be of one family, not of "
            f"{' and '.join(sorted(settings.families))}; leave one of them, or take scheduler asha."
        )
    if search.searcher != "random":
        problems.append(
            f"search.searcher is {search.searcher}, but search.scheduler pbt varies values itself; take random."
        )
    if search.trials < _LEAST:
        problems.append(f"search.trials is {search.trials}; search.scheduler pbt needs {_LEAST} or more.")
    if search.grace_epochs >= search.epochs:
        problems.append(
            f"search.grace_epochs is {search.grace_epochs}, so search.scheduler pbt would copy nothing within "
            f"search.epochs {search.epochs}; lower it."
        )
    for name, axes in spaces(settings).items():
        fixed = sorted(set(axes) - _CHANGEABLE)
        if fixed:
            problems.append(
                f"families.{name}.space varies {', '.join(fixed)}, which cannot change while a network learns; "
                f"search.scheduler pbt takes {', '.join(sorted(_CHANGEABLE))}."
            )
        if not axes:
            problems.append(f"families.{name}.space is empty, so search.scheduler pbt has nothing to vary.")
    if problems:
        raise SettingsError(problems)


def population_for(
    settings: TuneSettings, run: str, configurations: Sequence[Mapping[str, Any] | None]
) -> Population | None:
    """Give the population of a search whose scheduler is pbt, as no epoch had come yet; None of any other."""
    return Population(settings, run, configurations) if settings.search.scheduler == "pbt" else None


def is_copied_at(settings: TuneSettings, epoch: int) -> bool:
    """Say whether trials may copy each other after an epoch, counted from 1; never after the last one."""
    search = settings.search
    return search.scheduler == "pbt" and epoch % search.grace_epochs == 0 and 0 < epoch < search.epochs


def copied_state(run: str, number: int, epoch: int) -> str:
    """Give the URI of what others may copy of a trial after an epoch (Fit.checkpoint)."""
    return join(runs.trial_folder(run, number), f"epoch-{epoch:05d}.safetensors")


@dataclass(frozen=True)
class Copy:
    """Orders a trial to go on, after an epoch, from another one's weights of that epoch with new values."""

    number: int
    epoch: int
    source: int
    hyper: dict[str, Any]
    """The whole configuration from then on."""
    varied: tuple[str, ...]
    """What of it the space varies."""

    def text(self) -> str:
        """Say it in words, for the log."""
        values = ", ".join(f"{key} {self.hyper[key]}" for key in self.varied)
        return f"goes on from {runs.trial_id(self.source)}'s weights with {values}"


def read_copy(run: str, number: int) -> Copy | None:
    """Read a trial's last order; None of a trial that never had one."""
    place = _order_place(run, number)
    if not exists(place):
        return None
    order = read_json(place)
    return Copy(**{**order, "varied": tuple(order["varied"])})


class Population:
    """Knows how every trial stands, and orders copies."""

    def __init__(self, settings: TuneSettings, run: str, configurations: Sequence[Mapping[str, Any] | None]) -> None:
        self._settings, self._run = settings, run
        self._family: Family = next(iter(settings.families))
        self._axes = spaces(settings)[self._family]
        self._hypers = {number: dict(hyper or {}) for number, hyper in enumerate(configurations)}
        self._scores: dict[int, dict[int, float]] = defaultdict(dict)
        self._epochs: dict[int, int] = defaultdict(int)
        self._kept: set[tuple[int, int]] = set()
        self._copies: dict[int, Copy] = {}

    def judge(self, entry: Mapping[str, Any]) -> Copy | None:
        """Take note of one finite epoch, and say whether its trial is to copy another one."""
        number, epoch = entry["number"], entry["epoch"]
        self._epochs[number] = epoch
        if not is_copied_at(self._settings, epoch):
            return None
        self._kept.add((number, epoch))
        # This epoch's accuracy, not the trial's best: what a copy goes on from are this epoch's weights.
        scores = self._scores[epoch]
        scores[number] = entry["val_top1"]
        if len(scores) < _LEAST:
            return None
        ranked = self._ranked(epoch)
        quarter = math.ceil(len(ranked) * _QUARTER)
        if number not in ranked[-quarter:]:
            return None
        rng = np.random.default_rng([self._settings.search.seed, number, epoch])
        source = ranked[int(rng.integers(quarter))]
        if scores[source] <= scores[number]:
            return None
        self._hypers[number] = self._vary(self._hypers[source], rng)
        self._copies[number] = Copy(number, epoch, source, self._hypers[number], tuple(self._axes))
        return self._copies[number]

    def order(self, number: int, copy: Copy | None) -> None:
        """Write an order for the trial to find; without one, take back what a killed start may have left.

        Raises:
            StorageError: storage refused it after every try.
        """
        place = _order_place(self._run, number)
        if copy is None:
            there = read_copy(self._run, number)
            if there is not None and there.epoch == self._epochs[number]:
                delete(place)
        else:
            write_json(place, {**vars(copy), "varied": list(copy.varied)})

    def sweep(self, unfinished: Iterable[int]) -> None:
        """Delete what nobody can copy any more: states of epochs that every unfinished trial is past, and of the worst.

        Raises:
            StorageError: storage refused it after every try.
        """
        unfinished = set(unfinished)
        reached = min((self._epochs[number] for number in unfinished), default=self._settings.search.epochs)
        awaited = {
            (c.source, c.epoch) for n, c in self._copies.items() if n in unfinished and self._epochs[n] == c.epoch
        }
        # Who is once below the best quarter of all trials does not come back into that of those who are there.
        best = math.ceil(len(self._hypers) * _QUARTER)
        for number, epoch in sorted(self._kept - awaited):
            if epoch < reached or self._ranked(epoch).index(number) >= best:
                delete(copied_state(self._run, number, epoch))
                self._kept.discard((number, epoch))

    def _ranked(self, epoch: int) -> list[int]:
        """Give the trials that have come to an epoch, best first."""
        scores = self._scores[epoch]
        return sorted(scores, key=lambda number: (-scores[number], number))

    def _vary(self, hyper: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        varied = {key: _varied(possible, hyper[key], rng) for key, possible in self._axes.items()}
        try:
            return read_values(self._settings, self._family, {**hyper, **varied}).model_dump(mode="json")
        except SettingsError:  # two values that do not go together; the copy then has its source's
            return dict(hyper)


def _order_place(run: str, number: int) -> str:
    return join(runs.trial_folder(run, number), "copy.json")


def _varied(possible: Range, value: Any, rng: np.random.Generator) -> Any:
    """Vary one value as the paper does; it stays in its range."""
    if rng.random() < _DRAWN_ANEW:
        return possible.draw(rng)
    if possible.choices:
        if value not in possible.choices:
            return possible.draw(rng)
        place = possible.choices.index(value) + int(rng.choice([-1, 1]))
        return possible.choices[min(max(place, 0), len(possible.choices) - 1)]
    varied = value * float(rng.choice(_FACTORS))
    varied = round(varied) if possible.kind == "integers" else shorten(varied)
    return min(max(varied, type(varied)(possible.low)), type(varied)(possible.high))

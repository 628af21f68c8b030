"""Says what one training without a search is told: one configuration, from a YAML file or a row of a leaderboard.

From: YAML, `--set key=value`, or a run and a row. To: `TrainSettings`.
Invariants: a file of `carray tune` is understood, too: it stands for the known-good default of its first family; a row
brings its search's pixels, epochs and seed, so that it trains as the trial did.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import Field

from carray.core.errors import SettingsError
from carray.core.settings import Seed, Settings, load_settings, parse_settings, read_yaml
from carray.images.pixels import PixelSettings
from carray.search import run_folder
from carray.search.proposals import draw_trials
from carray.search.space import FamilySettings, SearchSettings, TuneSettings
from carray.search.train.hyperparameters import HYPERS, CnnHyper, TransferHyper

__all__ = ["TrainSettings", "find_row", "read_recipe", "recipe_of_row"]


class TrainSettings(Settings):
    """Is everything `carray train` can be told."""

    hyper: dict[str, Any] = Field(default_factory=dict)
    """The configuration: `family` (transfer, or cnn) and the values that it takes, over its own defaults."""
    epochs: int = Field(default=6, ge=1, le=10_000)
    """The schedule of learning rates spans them."""
    seed: Seed = 0
    """Of all random numbers of the training."""
    pixels: PixelSettings = PixelSettings()
    """As of `carray tune`."""

    def configuration(self) -> CnnHyper | TransferHyper:
        """Check the configuration, its sizes against pixels.decode_size included.

        Raises:
            SettingsError: an unknown family, or values that it does not take.
        """
        family = self.hyper.get("family", "transfer")
        if family not in HYPERS:
            raise SettingsError(f"hyper.family is {family!r}; allowed are {' and '.join(sorted(HYPERS))}.")
        try:
            hyper = parse_settings(HYPERS[family], self.hyper)
        except SettingsError as err:
            raise SettingsError([f"hyper.{problem}" for problem in err.problems]) from None
        return draw_trials(self._search_of(hyper))[0]

    def as_search(self) -> TuneSettings:
        """Give the search of one trial that this training is, for the run's files.

        Raises:
            SettingsError: the configuration is not one.
        """
        return self._search_of(self.configuration())

    def _search_of(self, hyper: CnnHyper | TransferHyper) -> TuneSettings:
        default = hyper.model_dump(mode="json", exclude={"family"})
        search = SearchSettings(trials=1, epochs=self.epochs, seed=self.seed, scheduler="none", rung0="off")
        return TuneSettings(search=search, pixels=self.pixels, families={hyper.family: FamilySettings(default=default)})


def read_recipe(config: str | None = None, *, overrides: Iterable[str] = ()) -> TrainSettings:
    """Read a training's settings from a YAML file and `key.sub=value` overrides, which win.

    Raises:
        SettingsError: a value is not one, or the file is none of `train` and none of `tune`.
        StorageError: the file cannot be read.
    """
    start = read_yaml(config) if config else {}
    if config and {"families", "search"} & set(start):
        tune = load_settings(TuneSettings, config=config)
        first = draw_trials(tune.model_copy(update={"search": tune.search.model_copy(update={"trials": 1})}))[0]
        start = _values(first.model_dump(mode="json"), tune, number=0)
    settings = load_settings(TrainSettings, start=start, overrides=overrides)
    settings.configuration()
    return settings


def recipe_of_row(run: str, row: str, *, overrides: Iterable[str] = ()) -> tuple[TrainSettings, dict[str, Any]]:
    """Give what a row of a run's leaderboard was trained with, and the row.

    Raises:
        SettingsError: no run lies there, it has no such row, or an override is not one.
    """
    chosen = find_row(run, row)
    hyper = json.loads(chosen["hyper"])
    if hyper is None:
        raise SettingsError(f"{chosen['trial_id']} of {run} was never begun and has no configuration; choose another.")
    tune = parse_settings(TuneSettings, run_folder.read_search(run)["settings"])
    settings = load_settings(
        TrainSettings, start=_values(hyper, tune, number=int(chosen["number"])), overrides=overrides
    )
    settings.configuration()
    return settings, chosen


def find_row(run: str, row: str) -> dict[str, Any]:
    """Give a row of a run's leaderboard, by its place, counted from 1, or by its trial's id.

    Raises:
        SettingsError: no run lies there, or it has no such row.
    """
    trials = run_folder.read_trials(run)
    if row.isdecimal() and 1 <= int(row) <= len(trials):
        chosen = trials.iloc[int(row) - 1]
    elif row in set(trials["trial_id"]):
        chosen = trials[trials["trial_id"] == row].iloc[0]
    else:
        raise SettingsError(
            f"{run} has no row {row!r}; allowed are 1 to {len(trials)}, as carray leaderboard counts them, and the "
            f"trials {_named(sorted(trials['trial_id']))}."
        )
    return {str(key): value for key, value in chosen.items()}


def _values(hyper: dict[str, Any], tune: TuneSettings, *, number: int) -> dict[str, Any]:
    return {
        "hyper": hyper,
        "epochs": tune.search.epochs,
        "seed": tune.search.seed + number,  # as the trial's own
        "pixels": tune.pixels.model_dump(mode="json"),
    }


def _named(trials: list[str]) -> str:
    return ", ".join(trials) if len(trials) <= 12 else f"{trials[0]} to {trials[-1]}"

"""Hands Ray Tune the configurations that are still to be run, in their order.

From: the configurations that are stored, those left for a searcher to propose, and the run's log. To: {number, hyper}.
Invariants: a proposed configuration is stored in the run folder before Tune hears of it; Tune is told of no metric and
keeps no state of a searcher's, since all of it is in the run folder.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from ray.tune.search import Searcher

from carray.search import run_folder
from carray.search.run_log import METRIC
from carray.search.space import TuneSettings
from carray.search.tpe import Observation, propose

__all__ = ["build_searcher"]


def build_searcher(
    settings: TuneSettings, run: str, configurations: list[dict[str, Any] | None], missing: Sequence[int]
) -> Searcher:
    """Build what Tune asks for configurations; Tune must be told `num_samples=len(missing)`, or it asks for one.

    Args:
        settings: The search's.
        run: The run's folder, with the log of earlier starts.
        configurations: Every one that is known, by number; with tpe, None is filled in when its turn comes.
        missing: The numbers to run, in this order.

    Raises:
        StorageError: the log cannot be read.
    """
    if settings.search.searcher == "tpe":
        return _Proposing(settings, run, configurations, missing)
    return _Listed(configurations, missing)


class _Listed(Searcher):
    """Gives configurations that are all known beforehand."""

    def __init__(self, configurations: list[dict[str, Any] | None], missing: Sequence[int]) -> None:
        super().__init__()
        self._configurations = configurations
        self._waiting = list(reversed(missing))
        self._numbers: dict[str, int] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take no metric and no space from Tune: both are known, and the config holds what all trials share."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Give the next configuration, with its number, or say that there are no more."""
        if not self._waiting:
            return Searcher.FINISHED
        number = self._waiting[-1]
        hyper = self._configuration(number)
        self._waiting.pop()
        self._numbers[trial_id] = number
        return {"number": number, "hyper": hyper}

    def _configuration(self, number: int) -> dict[str, Any]:
        hyper = self._configurations[number]
        if hyper is None:
            raise ValueError(f"configuration {number} is not drawn, and the searcher proposes none")
        return hyper

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take note of an end; here nothing follows from it."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: a later start begins from the run folder."""


class _Proposing(_Listed):
    """Has the configurations that are not stored yet proposed from how the trials ended that are."""

    def __init__(
        self,
        settings: TuneSettings,
        run: str,
        configurations: list[dict[str, Any] | None],
        missing: Sequence[int],
    ) -> None:
        super().__init__(configurations, missing)
        self._settings, self._run = settings, run
        self._observed = _ended_before(run, self._configurations)

    def _configuration(self, number: int) -> dict[str, Any]:
        stored = self._configurations[number]
        if stored is None:
            stored = propose(self._settings, number, self._observed.values()).model_dump(mode="json")
            run_folder.store_configuration(self._run, number, stored)
            self._configurations[number] = stored
        return stored

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Observe how a trial ended; one that failed or diverged has no score."""
        number = self._numbers[trial_id]
        hyper = self._configurations[number]
        entry = json.loads((result or {}).get("entry", "null"))
        if hyper is not None:
            good = result and entry and not error and run_folder.is_finite(entry)
            score, epochs = (result[METRIC], entry["epoch"]) if result and good else (None, 0)
            self._observed[number] = Observation(number, hyper, epochs, score)


def _ended_before(run: str, configurations: Sequence[dict[str, Any] | None]) -> dict[int, Observation]:
    """Read, from the log of earlier starts, what this one would have observed."""
    entries = defaultdict(list)
    for entry in run_folder.read_log(run):
        entries[entry["number"]].append(entry)
    observed = {}
    for number, end in run_folder.read_trial_ends(run, len(configurations)).items():
        hyper, own = configurations[number], entries[number]
        if hyper is not None:
            ended_well = end["status"] in ("finished", "stopped")
            good = ended_well and own and all(run_folder.is_finite(entry) for entry in own)
            score = max(entry["val_top1"] for entry in own) if good else None
            observed[number] = Observation(number, hyper, max(e["epoch"] for e in own) if good else 0, score)
    return observed

"""Checks that a run's log explains itself: fed to new schedulers in its order, it leads to the decisions it holds.

From: a run folder. To: what differs, in words.
Invariants: the run is only read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from carray.core.settings import parse_settings
from carray.search import run_folder
from carray.search.run_log import SearchLog
from carray.search.schedulers_on_ray import FamilyScheduler
from carray.search.space import TuneSettings

__all__ = ["replay"]


def replay(run: str) -> list[str]:
    """Give what is wrong with a run's log, one sentence each: decisions that cannot be made again, epochs logged twice.

    Raises:
        SettingsError: no search was ever started there.
    """
    settings = parse_settings(TuneSettings, run_folder.read_search(run)["settings"])
    noted = _Noted()
    scheduler = FamilyScheduler(settings.search, cast("SearchLog", noted))
    problems, reached = [], dict[int, int]()
    for entry in run_folder.read_log(run):
        name = f"{entry['trial_id']}, epoch {entry['epoch']}"
        if entry["epoch"] != reached.get(entry["number"], 0) + 1:
            problems.append(f"{name} follows epoch {reached.get(entry['number'], 0)}")
        reached[entry["number"]] = entry["epoch"]
        trial: Any = SimpleNamespace(trial_id=entry["trial_id"], config={"number": entry["number"]})
        scheduler.on_trial_result(None, trial, {"entry": json.dumps(entry)})
        if noted.decision != entry["decision"]:
            problems.append(f"{name}: the log says {entry['decision']}, the schedulers {noted.decision}")
    return problems


class _Noted:
    """Stands for the log of a search that has just begun, and keeps the last decision."""

    decision = ""

    def replayed(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def decision_of(self, entry: Mapping[str, Any]) -> None:
        return None

    def add(self, entry: Mapping[str, Any], decision: str) -> None:
        self.decision = decision

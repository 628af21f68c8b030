"""Decides which trials go on: a scheduler of Ray's for each family, fed from our own log.

From: a trial's epochs, as Tune reports them, and the log of earlier starts. To: continue or stop, logged before anybody
acts on it.
Invariants: a run's log, fed in its order to a new `FamilyScheduler`, gives the same decisions again, whatever Tune
calls the trials now; a decision that was logged is not made a second time; a non-finite epoch reaches no scheduler.
Source of ASHA: Li et al., 'A System for Massively Parallel Hyperparameter Tuning', 2020; of median stopping: Golovin et
al., 'Google Vizier', 2017; the rungs and medians are Ray's.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from typing import Any, cast

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from carray.search import run_folder
from carray.search.run_log import METRIC, SearchLog
from carray.search.space import SearchSettings

__all__ = ["FamilyScheduler"]


class FamilyScheduler(FIFOScheduler):
    """Gives each family a scheduler of its own, so that slow starters are judged among themselves."""

    def __init__(self, search: SearchSettings, log: SearchLog) -> None:
        """Bring every family's scheduler to where the log's earlier epochs left it."""
        super().__init__()
        self._search, self._log = search, log
        self._families: dict[str, FIFOScheduler] = defaultdict(lambda: _family_scheduler(search))
        self._trials: dict[int, _Named] = {}
        self._best: dict[int, float] = {}
        for entry in log.replayed():
            self._feed(entry)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take no metric from outside: each family's scheduler has its own."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide about a trial after an epoch, and log the decision before anybody acts on it."""
        if result.get("failed"):
            self._log.fail(trial.config["number"], str(result["failed"]))
            return TrialScheduler.STOP
        entry = json.loads(result["entry"])
        decision = self._log.decision_of(entry)
        if decision is None:
            decision = self._decide(entry)
            self._log.add(entry, decision)
        return TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP

    def _decide(self, entry: dict[str, Any]) -> str:
        if not run_folder.is_finite(entry):
            return "non_finite"  # Ray's ASHA would let it go on, and keep the figure in its rung
        answer = self._feed(entry)
        if entry["epoch"] >= self._search.epochs:
            return "finish"
        return "stop" if answer == TrialScheduler.STOP else "continue"

    def _feed(self, entry: dict[str, Any]) -> str:
        """Hand one finite epoch to its family's scheduler, under a name that a resumed trial keeps."""
        family, number = self._families[entry["family"]], entry["number"]
        if number not in self._trials:
            self._trials[number] = _Named(run_folder.trial_id(number))
            family.on_trial_add(cast("Any", None), cast("Trial", self._trials[number]))
        # What is compared is the log's own best, so that a trial which had to begin anew is judged as it was.
        self._best[number] = max(self._best.get(number, -1.0), entry["val_top1"])
        judged = {"epoch": entry["epoch"], METRIC: self._best[number]}
        return family.on_trial_result(cast("Any", None), cast("Trial", self._trials[number]), judged)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take the last epoch of a trial that ended by itself, which Tune reports here and not as a result."""
        if result.get("failed") or (result.get("entry") and self._log.decision_of(json.loads(result["entry"])) is None):
            self.on_trial_result(tune_controller, trial, result)


def _family_scheduler(search: SearchSettings) -> FIFOScheduler:
    judged: dict[str, Any] = {
        "time_attr": "epoch",
        "metric": METRIC,
        "mode": "max",
        "grace_period": search.grace_epochs,
    }
    if search.scheduler == "asha":
        return AsyncHyperBandScheduler(
            max_t=search.epochs, reduction_factor=search.reduction_factor, brackets=1, **judged
        )
    if search.scheduler == "median":
        # With an infinite slice it pauses no trial while there are too few to take a median of.
        return MedianStoppingRule(hard_stop=True, min_time_slice=cast("int", math.inf), **judged)
    return FIFOScheduler()


class _Named:
    """Stands for trial number i where a scheduler asks for a trial's id, or keeps a trial as a key."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

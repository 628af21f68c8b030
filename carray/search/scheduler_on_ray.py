"""What Ray Tune asks while it runs trials: whether one continues after an epoch, and whether all must stop.

Decisions are the log's (search.run_log, search.judge); here Tune's calls become log entries, and errors of the store or
of the images, which no single trial is to blame for, end the search.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.stopper import Stopper

from carray.core.errors import BudgetError, CarrayError, DataError, StorageError
from carray.core.exit_lines import advise
from carray.core.ray.internals import forget_handover
from carray.core.ray.metrics import Meter
from carray.search.run_log import SearchLog

__all__ = ["MOST_LOSSES", "SearchMetrics", "SearchScheduler"]

MOST_LOSSES = 3
"""How often a trial's process may be lost in one epoch; a trial that kills its process each time must end."""


class SearchScheduler(FIFOScheduler, Stopper):
    """Passes each epoch to the log, and its decision to Tune; also the stopper, which Tune asks between results."""

    def __init__(self, log: SearchLog, losses: dict[int, int]) -> None:
        """Take the search's log, and how often each trial has lost its process."""
        super().__init__()
        self.log, self._losses = log, losses
        self.trouble: CarrayError | None = None
        """What ends the whole search, with nothing noted against the trial that met it."""
        self.given_up: set[int] = set()
        """Trials whose process was lost while it took them up, which Tune does not try again."""
        self.broken = False
        """Whether Tune itself ended unexpectedly."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles a copy, which is never read

    @property
    def goes_on(self) -> bool:
        """Say whether another round of Tune's is due."""
        return self.broken or bool(self.given_up)

    def stop(self, why: CarrayError) -> None:
        """End the search as soon as Tune asks again, which it does ten times a second."""
        self.trouble = self.trouble or why

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take no metric: the judge has its own."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Log an epoch and give the decision on it; a log that cannot be written ends the search."""
        number = trial.config["number"]
        if "restarted" in result:
            self.log.remark(number, result["restarted"])
        try:
            if result.get("failed"):
                self.log.fail(number, str(result["failed"]))
                return str(TrialScheduler.STOP)
            entry = json.loads(result["entry"])
            if not self.log.is_logged(entry):
                # Losses count per epoch, since a long trial on preemptible machines loses many processes.
                trial.run_metadata.num_failures = self._losses[number] = 0
            decision = self.log.add(entry)
            return str(TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP)
        except (StorageError, BudgetError) as err:
            self.trouble = err
            return str(TrialScheduler.NOOP)
        finally:
            advise(self.log.advice)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take a trial's last epoch, which Tune reports here, or the news that the store or the images are at fault."""
        if self.trouble is not None:
            return
        if "halt" in result:
            self.trouble = DataError(result["halt"])
            if result["halt_kind"] == "storage":
                self.trouble = StorageError(f"{result['halt']} Nothing is lost: run the same command again to resume.")
        elif result.get("failed") or ("entry" in result and not self.log.is_logged(json.loads(result["entry"]))):
            self.on_trial_result(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Let a trial whose process was lost resume in a new one, unless that happens too often without an epoch."""
        number, cause = trial.config["number"], _cause(trial)
        tune_tries_again = trial.should_recover() and trial.status == Trial.ERROR
        forget_handover(tune_controller, trial)
        self._losses[number] += trial.should_recover() and not tune_tries_again
        try:
            if not trial.should_recover() or self._losses[number] > MOST_LOSSES:
                self.log.fail(number, f"its process was lost {MOST_LOSSES + 1} times in one epoch: {cause}")
            elif tune_tries_again:
                self.log.remark(number, f"its process was lost ({cause}), and a new one resumes from its last epoch")
            else:
                self.given_up.add(number)
        except StorageError as err:
            self.trouble = err

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial: `on_trial_result` does."""
        return False

    def stop_all(self) -> bool:
        """Say whether a budget is used up, or something ends the search, so that no running epoch is awaited."""
        return self.trouble is not None or self.log.budget_reached() is not None


def _cause(trial: Trial) -> str:
    """Give the last line of what Tune wrote about a lost process."""
    trace = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    cause = lines[-1].rpartition("Worker exit detail: ")[2] if lines else "no cause known"
    return shorten(cause, 100, placeholder=" ...")


class SearchMetrics:
    """Turns logged epochs and ends of trials into Ray metrics (core.ray.metrics)."""

    def __init__(self, meter: Meter, log: SearchLog) -> None:
        """Begin where earlier starts left the search."""
        self._meter, self._log = meter, log
        self._running: set[int] = set()
        self._states = Counter(log.ended.values())
        self._states.update(waiting=len(log.missing), running=0)
        self._set_states()

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count a logged epoch."""
        number, family = entry["number"], entry["family"]
        self._meter.record("carray_tune_epochs_total", 1, family=family, decision=entry["decision"])
        self._meter.record("carray_tune_device_seconds_total", entry["seconds"] * entry["devices"], family=family)
        self._meter.record("carray_tune_epoch_seconds", entry["seconds"], family=family)
        self._meter.record("carray_tune_best_val_top1_ratio", self._log.best[0])
        if number not in self._running:
            self._running.add(number)
            self._states.update(running=1, waiting=-1)
            self._set_states()

    def end(self, number: int, status: str) -> None:
        """Count how a trial ended."""
        before = "running" if number in self._running else "waiting"
        self._running.discard(number)
        self._states.update({before: -1, status: 1})
        self._set_states()

    def _set_states(self) -> None:
        for state, trials in self._states.items():
            self._meter.record("carray_tune_trials", trials, state=state)

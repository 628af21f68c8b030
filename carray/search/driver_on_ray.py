"""Is what Ray Tune asks while it runs trials: who goes on, who is next, and whether all must end.

From: results, lost processes and errors, as Tune tells of them. To: decisions, and lines in the log.
Invariants: a full disk or a store that is away is nobody's fault: it ends the search and is noted against no trial; a
trial goes on after its process was lost, from its last epoch, until that happens too often within one epoch.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.stopper import Stopper

from carray.core.errors import BudgetError, CarrayError, DataError, StorageError
from carray.core.exit_lines import advise
from carray.search.run_log import SearchLog
from carray.search.schedulers_on_ray import FamilyScheduler
from carray.search.space import SearchSettings

__all__ = ["MOST_LOSSES", "SearchDriver", "SearchStopper"]

MOST_LOSSES = 3
"""How often a trial's process may be lost in one epoch; a trial that kills its process each time must end."""


class SearchDriver(FamilyScheduler):
    """Is the scheduler that Tune asks, with an eye on what goes wrong outside the trials."""

    def __init__(self, search: SearchSettings, log: SearchLog, losses: dict[int, int]) -> None:
        """Bring the families' schedulers to where the log stands; `losses` counts each trial's lost processes."""
        super().__init__(search, log)
        self.log, self._losses = log, losses
        self.trouble: CarrayError | None = None
        """What ends the whole search, with nothing recorded against the trial that met it."""
        self.given_up: set[int] = set()
        """Trials whose process was lost while it took them up, which Tune does not try again."""
        self.broken = False
        """Whether Tune itself came to an unexpected end."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of its own, which nobody reads

    @property
    def goes_on(self) -> bool:
        """Say whether another round of Tune's is due."""
        return self.broken or bool(self.given_up)

    def stop(self, why: CarrayError) -> None:
        """End the search as soon as Tune asks again, which it does ten times a second."""
        self.trouble = self.trouble or why

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide about a trial after an epoch; a log that cannot be written ends the search."""
        number = trial.config["number"]
        if "restarted" in result:
            self.log.remark(number, result["restarted"])
        if "entry" in result and self.log.decision_of(json.loads(result["entry"])) is None:
            # Whoever comes further may lose its process again: on machines that come and go, a long trial loses many.
            trial.run_metadata.num_failures = self._losses[number] = 0
        try:
            return super().on_trial_result(tune_controller, trial, result)
        except (StorageError, BudgetError) as err:
            self.trouble = err
            return str(TrialScheduler.NOOP)
        finally:
            advise(self.log.advice)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take a trial's last result, or the news that the place of all trials is out of order."""
        if "halt" in result and self.trouble is None:
            self.trouble = DataError(result["halt"])
            if result["halt_kind"] == "storage":
                self.trouble = StorageError(f"{result['halt']} Nothing is lost: the same command then goes on.")
        elif self.trouble is None:
            super().on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Let a trial whose process was lost go on in a new one, unless that happens too often without an epoch."""
        number, cause = trial.config["number"], _cause(trial)
        tune_tries_again = trial.should_recover() and trial.status == Trial.ERROR
        # Tune forgets this where a process is lost that was to take up its next trial, and then waits for it for ever.
        getattr(tune_controller, "_resetting_trials", set()).discard(trial)
        self._losses[number] += trial.should_recover() and not tune_tries_again
        try:
            if not trial.should_recover() or self._losses[number] > MOST_LOSSES:
                self.log.fail(number, f"its process was lost {MOST_LOSSES + 1} times in one epoch: {cause}")
            elif tune_tries_again:
                self.log.remark(number, f"its process was lost ({cause}), and a new one goes on from its last epoch")
            else:
                self.given_up.add(number)
        except StorageError as err:
            self.trouble = err


class SearchStopper(Stopper):
    """Ends the search between results, too, so that no running epoch is awaited."""

    def __init__(self, driver: SearchDriver) -> None:
        self._driver = driver

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial: that is the scheduler's."""
        return False

    def stop_all(self) -> bool:
        """Say whether a limit is reached, or the search's place is out of order."""
        return self._driver.trouble is not None or self._driver.log.budget.spent_up() is not None

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as above


def _cause(trial: Trial) -> str:
    """Give the last line of what Tune wrote about a lost process."""
    trace = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    cause = lines[-1].rpartition("Worker exit detail: ")[2] if lines else "no cause known"
    return shorten(cause, 100, placeholder=" ...")

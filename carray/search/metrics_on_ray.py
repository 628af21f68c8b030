"""Turns a search's log into Ray metrics (core.ray.metrics): epochs, trials by state, the best so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from carray.core.ray.metrics import Meter
from carray.search import run_folder
from carray.search.run_log import METRIC, SearchLog

__all__ = ["SearchMetrics"]


class SearchMetrics:
    """Is told of each logged epoch and of each end, as loggers are."""

    def __init__(self, meter: Meter, log: SearchLog) -> None:
        """Begin where earlier starts left the search."""
        self._meter = meter
        self._best = max((entry[METRIC] for entry in log.replayed()), default=0.0)
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
        if run_folder.is_finite(entry):
            self._best = max(self._best, entry["val_top1"])
        self._meter.record("carray_tune_best_val_top1_ratio", self._best)
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

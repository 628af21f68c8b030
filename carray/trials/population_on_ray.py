"""Is the process that trains trials which copy each other (trials.population).

From: what `TrialRunner` takes, and the orders in the run folder. To: what it gives, and a state for others to copy.
Invariants: what others may copy of an epoch lies in the run folder before that epoch is reported; an order is obeyed
once, before the epoch after the one that led to it, and after a kill again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carray.core.errors import SettingsError
from carray.core.storage import exists, read_bytes, write_bytes
from carray.trials.population import Copy, copied_state, is_copied_at, read_copy
from carray.trials.space import TuneSettings
from carray.trials.trial_on_ray import TrialRunner

__all__ = ["PopulationRunner"]


class PopulationRunner(TrialRunner):
    """Is one worker process whose trials may take over other trials' weights."""

    def _begin(self, hyper_values: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        self._shared, self._settings = shared, TuneSettings.model_validate(shared["settings"])
        order = read_copy(shared["run"], self._number)
        super()._begin(order.hyper if order else hyper_values, shared)
        if order and self._fit.epoch < order.epoch:  # its own state is lost
            self._take_over(order)

    def _next_result(self) -> dict[str, Any]:
        # What has just been reported has been decided on, and an order, if there is one, been written.
        if self._reported and is_copied_at(self._settings, self._fit.epoch):
            order = read_copy(self._shared["run"], self._number)
            if order and order.epoch == self._fit.epoch:
                super()._begin(order.hyper, self._shared)
                self._take_over(order)
        result = super()._next_result()
        if is_copied_at(self._settings, self._fit.epoch) and not result["done"]:
            write_bytes(copied_state(self._shared["run"], self._number, self._fit.epoch), self._fit.checkpoint())
        return result

    def _take_over(self, order: Copy) -> None:
        place = copied_state(self._shared["run"], order.source, order.epoch)
        try:
            if not exists(place):
                raise SettingsError(f"{place} is gone")
            self._fit.restore(read_bytes(place))
        except SettingsError as err:
            self._restarted = f"could not take over the other trial's weights ({err}) and goes on from its own"
        self._reported = True

"""Adds up what a search has spent, over all its starts, and says which of the user's limits is used up.

From: SearchSettings and log entries (search.run_folder). To: a sentence, or None while there is something left.
Invariants: time while no search runs is not counted; device-hours are the seconds of logged epochs times the devices
each took, so an epoch that was cut off costs nothing here; money is device-hours times the user's own price.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from carray.search.space import SearchSettings

__all__ = ["Budget"]


class Budget:
    """Holds a search's limits and what of them is spent."""

    def __init__(
        self,
        search: SearchSettings,
        entries: Iterable[Mapping[str, Any]] = (),
        *,
        earlier_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take up the count where earlier starts left it.

        Args:
            search: The limits, and the price.
            entries: The log of earlier starts, in any order.
            earlier_seconds: Clock of earlier starts, where more is known than the log tells.
            clock: Gives seconds that only grow.
        """
        self._search, self._clock = search, clock
        self._earlier_seconds, self._started = earlier_seconds, clock()
        self._device_seconds = 0.0
        for entry in entries:
            self.add(entry)
            self._earlier_seconds = max(self._earlier_seconds, entry["clock_seconds"])

    @property
    def clock_seconds(self) -> float:
        """Give the search's own clock, seconds summed over its starts."""
        return self._earlier_seconds + self._clock() - self._started

    @property
    def device_hours(self) -> float:
        """Give the hours that devices spent on logged epochs."""
        return self._device_seconds / 3600

    def add(self, entry: Mapping[str, Any]) -> None:
        """Count one logged epoch: its seconds, times its devices."""
        self._device_seconds += entry["seconds"] * entry["devices"]

    def spent(self) -> dict[str, float]:
        """Give what is spent: minutes, device_hours and, where there is a price, money in its currency."""
        spent = {"minutes": self.clock_seconds / 60, "device_hours": self.device_hours}
        if self._search.price_per_device_hour is not None:
            spent["money"] = self.device_hours * self._search.price_per_device_hour
        return spent

    def spent_up(self) -> str | None:
        """Name the first limit that is reached, in words; None while none is."""
        spent, search = self.spent(), self._search
        limits = [
            ("time_budget_minutes", search.time_budget_minutes, spent["minutes"]),
            ("device_hours_budget", search.device_hours_budget, spent["device_hours"]),
            ("money_budget", search.money_budget, spent.get("money", 0.0)),
        ]
        for name, limit, used in limits:
            if limit is not None and used >= limit:
                return f"search.{name} of {limit:g} is used up ({used:.4g} spent)"
        return None

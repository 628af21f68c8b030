"""Budgets: what is spent adds up over starts, and the first limit that is reached is named."""

from __future__ import annotations

from typing import Any

import pytest

from carray.search.budget import Budget
from carray.search.space import SearchSettings


class Clock:
    """Is a clock that the test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def an_entry(*, seconds: float, devices: float = 1.0, clock_seconds: float = 0.0) -> dict[str, Any]:
    return {"seconds": seconds, "devices": devices, "clock_seconds": clock_seconds}


def test_without_a_limit_nothing_is_ever_used_up() -> None:
    assert Budget(SearchSettings(), [an_entry(seconds=1e9, devices=64)]).spent_up() is None


def test_the_clock_is_summed_over_starts_and_stands_still_between_them() -> None:
    search, clock = SearchSettings(time_budget_minutes=10), Clock()
    first = Budget(search, clock=clock)
    clock.now += 240
    assert first.clock_seconds == 240
    assert first.spent_up() is None
    clock.now += 86_400  # killed, and started again the next day
    second = Budget(search, [an_entry(seconds=1, clock_seconds=200)], clock=clock)
    clock.now += 390
    assert second.spent_up() is None
    clock.now += 11
    assert second.spent_up() == "search.time_budget_minutes of 10 is used up (10.02 spent)"


def test_a_start_that_noted_more_than_the_log_knows_is_believed() -> None:
    """The epochs that the end of the budget cut off left no entry, but their time is gone."""
    clock = Clock()
    budget = Budget(SearchSettings(), [an_entry(seconds=1, clock_seconds=200)], earlier_seconds=600, clock=clock)
    assert budget.clock_seconds == 600


def test_device_hours_and_money_add_up_over_entries() -> None:
    search = SearchSettings(device_hours_budget=3, money_budget=5, price_per_device_hour=2)
    budget = Budget(search, [an_entry(seconds=1800, devices=4)])
    assert budget.spent()["device_hours"] == pytest.approx(2)
    assert budget.spent()["money"] == pytest.approx(4)
    assert budget.spent_up() is None
    budget.add(an_entry(seconds=3600, devices=0.5))
    assert budget.spent_up() == "search.money_budget of 5 is used up (5 spent)"
    larger = search.model_copy(update={"money_budget": 50})
    again = Budget(larger, [an_entry(seconds=3600, devices=2.5), an_entry(seconds=3600, devices=0.5)])
    assert again.spent_up() == "search.device_hours_budget of 3 is used up (3 spent)"


def test_money_is_not_counted_without_a_price() -> None:
    assert "money" not in Budget(SearchSettings(), [an_entry(seconds=3600)]).spent()

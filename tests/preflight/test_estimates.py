"""What both estimates share: their table and JSON, and processes that measure at the same time."""

from __future__ import annotations

import os

import pytest

from carray.core.errors import BudgetError, SettingsError
from carray.core.store.files import absolute
from carray.preflight.estimates import (
    Estimate,
    Figure,
    Machines,
    Pair,
    Range,
    count_text,
    machine_figures,
    middle,
    run_in_parallel,
    seconds_text,
    spread,
    whole,
)


def test_results_come_in_order_from_processes_of_their_own():
    assert run_in_parallel(absolute, [("/a",), ("/b/../c",)]) == ["/a", "/c"]
    assert os.getpid() not in run_in_parallel(os.getpid, [(), ()])


def test_an_error_of_carrays_comes_through_as_what_it_is():
    with pytest.raises(SettingsError, match="scheme 'gs'"):
        run_in_parallel(absolute, [("/a",), ("gs://b",)])


def test_a_process_that_dies_is_a_sentence():
    with pytest.raises(BudgetError, match="one of 1 measuring processes died.*--probe-workers"):
        run_in_parallel(os._exit, [(1,)])


def test_a_figure_is_a_row_of_the_table_and_an_entry_of_the_json():
    taken, money = machine_figures(Machines(2, 4, hour_price=10.0), Range(1800, 7200), note="two", device_hours="hours")
    counts = [Figure("images", 3), Figure("gets", whole(1234.5), "GETs", count_text)]
    found = Estimate(["first"], [*counts, *taken, money], ["last"])
    assert found.as_json() == {
        **{"images": 3, "gets": [1234, 1235], "seconds": [1800.0, 7200.0]},
        **{"machine_hours": [1.0, 4.0], "hours": [4.0, 16.0], "machine_money": [10.0, 40.0]},
    }
    assert found["machine_hours"] == Range(1.0, 4.0)
    assert found.as_text().splitlines() == [
        "first",
        "",
        "                   from     to",
        "GETs              1,234  1,235",
        "wall-clock       30 min  2.0 h  two",
        "machine-hours         1      4",
        "core-hours            4     16",
        "money, machines   10.00  40.00",
        "",
        "last",
    ]


def test_what_takes_no_time_and_what_has_no_price_is_said():
    assert Figure("rung0", Range(0.0, 0.0), "rung 0", seconds_text).row() == ("rung 0", "", "", "none")
    _, money = machine_figures(Machines(), Range(1, 2), note="", device_hours="hours")
    assert money.plain() is None
    assert money.row()[-1] == "not priced: --price-per-machine-hour"


def test_ranges():
    assert Range(1, 2) + 1 == Range(2, 3)
    assert Range(1, 2) * Range(2, 3) == Range(2, 6)
    assert Range(1, 2).widened(2) == Range(0.5, 4)
    assert middle(list(range(101))) == Range(10, 90)
    assert spread([Pair(1.0, 2.0), Pair(2.0, 4.0)]) == Range(1.5, 4.0)

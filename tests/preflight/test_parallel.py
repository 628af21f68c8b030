"""Processes that measure side by side: what they return, what they raise, and that one may die."""

from __future__ import annotations

import os

import pytest

from carray.core.errors import BudgetError, SettingsError
from carray.core.store.files import absolute
from carray.preflight.estimates import run_in_parallel


def test_results_come_in_order_from_processes_of_their_own():
    assert run_in_parallel(absolute, [("/a",), ("/b/../c",)]) == ["/a", "/c"]
    assert os.getpid() not in run_in_parallel(os.getpid, [(), ()])


def test_an_error_of_carrays_comes_through_as_what_it_is():
    with pytest.raises(SettingsError, match="scheme 'gs'"):
        run_in_parallel(absolute, [("/a",), ("gs://b",)])


def test_a_process_that_dies_is_a_sentence():
    with pytest.raises(BudgetError, match="one of 1 measuring processes died.*--probe-workers"):
        run_in_parallel(os._exit, [(1,)])

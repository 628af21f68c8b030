"""What the benchmark of estimates decides by."""

from __future__ import annotations

import pytest

from jobs.bench.estimates import COLUMNS, _compared


@pytest.mark.parametrize(("seconds", "inside"), [(5.0, True), (10.0, True), (20.0, True), (4.9, False), (20.1, False)])
def test_a_job_lies_inside_its_estimate_or_not(seconds: float, inside: bool) -> None:
    row = _compared([5.0, 20.0], seconds)
    assert row["inside"] is inside
    assert set(row) <= set(COLUMNS)

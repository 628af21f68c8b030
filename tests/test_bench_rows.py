"""Tables of results keep their columns, and a job is inside its estimate or not."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.estimate import COLUMNS, compare
from jobs.bench.rows import append_rows, table_text


def test_rows_keep_to_the_columns_of_their_table(tmp_path: Path) -> None:
    table = tmp_path / "new" / "t.csv"
    append_rows(table, ["a", "b"], [{"a": 1}])
    append_rows(table, ["a", "b"], [{"b": 2}])
    assert table.read_text() == "a,b\n1,\n,2\n"
    with pytest.raises(SystemExit, match="other columns"):
        append_rows(table, ["a", "c"], [])
    with pytest.raises(SystemExit, match="no column c"):
        append_rows(table, ["a", "b"], [{"c": 1}])
    assert table_text([{"a": 1.23456}, {"a": None}], ["a", "b"]) == "a\n1.235\n"


@pytest.mark.parametrize(("seconds", "inside"), [(5.0, True), (10.0, True), (20.0, True), (4.9, False), (20.1, False)])
def test_a_job_is_inside_its_estimate_or_not(seconds: float, inside: bool) -> None:
    row = compare([5.0, 20.0], seconds, load_before=0.0, estimate_seconds=1.0)
    assert row["inside"] is inside
    assert set(row) <= set(COLUMNS)

"""Tables of results keep their columns, and a job is compared with its estimate."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.bench.estimate import compare
from jobs.bench.rows import ORIGIN, Program, append_rows, columns_of, table_text


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
    assert set(row) <= set(columns_of("estimate.csv"))


def test_a_row_says_which_command_repeats_it_without_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program("A benchmark.", "s3.csv")
    program.option("--data", type=Path)
    program.option("--times", type=int, default=3)
    program.option("--only", nargs="+", default=["a"])
    program.option("--small", action="store_true")
    program.option("--set", action="append", default=[])
    words = ["--data", str(tmp_path), "--only", "b", "c", "--small", "--set", "x=1", "--set", "y=2"]
    words += ["--results", str(tmp_path / "t.csv")]
    monkeypatch.setattr("sys.argv", ["job", *words])
    program.parse()
    assert program.command().split()[1:] == [
        "--data",
        "DATA",
        "--only",
        "b",
        "c",
        *"--small --set x=1 --set y=2".split(),
    ]
    program.record([{"arm": "carray", "images": 3}])
    header, row = (tmp_path / "t.csv").read_text().splitlines()
    assert header.split(",") == columns_of("s3.csv") and header.split(",")[: len(ORIGIN)] == ORIGIN
    assert "carray,3" in row and str(tmp_path) not in row

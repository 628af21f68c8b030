"""The made-up predictions of the query benchmark: what they hold, and that a question can be measured on them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from carray import queries
from carray.classify.predictions_folder import PREDICTION_SCHEMA
from carray.pages.comparison import compare_runs
from jobs.bench.query import made_up
from jobs.bench.query.__main__ import ARMS, measure
from jobs.bench.rows import ORIGIN, columns_of


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder = tmp_path_factory.mktemp("rows")
    runs = [made_up.write_run(folder / name, 20_000, run=run) for run, name in enumerate(("a", "b"))]
    return runs[0], runs[1], made_up.write_labels(folder / "labels.parquet", 20_000)


def test_rows_are_those_of_a_real_run(sides: tuple[str, str, str], tmp_path: Path) -> None:
    assert pq.read_schema(f"{sides[0]}/part-000000.parquet").remove_metadata() == PREDICTION_SCHEMA.remove_metadata()
    rows = queries.read_predictions(sides[0])
    assert rows["uri"].is_unique
    scored = rows[rows["status"] == "ok"]
    assert 0.985 < len(scored) / len(rows) < 0.995 and rows.loc[rows["status"] != "ok", "label"].isna().all()
    assert scored["score"].between(0, 1).all() and (scored["margin"] >= 0).all()
    assert (scored["top5_labels"].str[0] == scored["label"]).all() and scored["make"].notna().all()
    again = made_up.write_run(tmp_path / "again", 20_000, run=0)
    pd.testing.assert_frame_equal(queries.read_predictions(again), rows)


def test_two_runs_differ_as_two_classifiers_do(sides: tuple[str, str, str]) -> None:
    found = compare_runs(sides[0], sides[1])
    assert found["images"] == {"both": 20_000, "only_a": 0, "only_b": 0}
    assert 0.9 < found["agreement"]["rate"] < 0.99
    assert 0.002 < found["other_bytes"]["images"] / 20_000 < 0.01
    measured = queries.accuracy(sides[0], sides[2]).iloc[0]
    assert measured["images"] + measured["not_scored"] == 200
    assert 0.7 < measured["accuracy"] < 0.9


@pytest.mark.parametrize("name", ["by-make", "sql-through-arrow"])
def test_a_question_is_measured_from_outside(sides: tuple[str, str, str], name: str) -> None:
    row = measure(name, *sides)
    assert set(row) | {"question", "rows", *ORIGIN} == set(columns_of("query.csv"))
    assert row["answer_rows"] > 1 and 0 < row["answer_seconds"] < row["seconds"] and row["peak_memory_mb"] > 50


def test_every_question_is_measured() -> None:
    assert set(queries.QUESTIONS) - set(ARMS) == {"accuracy-by-split"}, "which is accuracy-by-class over other groups"

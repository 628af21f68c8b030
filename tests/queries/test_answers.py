"""Answers as a table, CSV, JSON and Parquet, with the odd values that foreign text may hold."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray import queries
from carray.core.errors import SettingsError
from carray.core.tables import table_metadata
from carray.queries.answers import choose_format
from carray.testing.predictions import row, write_predictions

EVIL = '=HYPERLINK("http://x","y")'
ODD = [EVIL, "\x1b[31mred", "a\nb", "ü,\"'", "-1+1", "plain", "x" * 200]


@pytest.fixture
def answer(tmp_path: Path) -> pd.DataFrame:
    rows = [row(f"s3://b/{i}", label=text, score=0.1 * i, year=None) for i, text in enumerate(ODD)]
    return queries.read_predictions(write_predictions(str(tmp_path / "odd"), [rows]))


def written(frame: pd.DataFrame, format: str) -> str:
    return queries.write_answer(frame, format=format, out=None, origin={}) or ""


def test_csv_comes_back_and_runs_no_formula(answer: pd.DataFrame, capsys: pytest.CaptureFixture[str]) -> None:
    back = pd.read_csv(io.StringIO(written(answer, "csv")))
    assert back["label"].tolist() == ["'" + text if text[0] in "=-" else text for text in ODD]
    assert back["uri"].tolist() == answer["uri"].tolist()
    assert back["phash"].tolist() == [1 - 2**63] * len(ODD)
    assert json.loads(back["top5_labels"][0]) == ["Audi A5 Coupe 2012"]
    assert "2 cells begin like a formula" in capsys.readouterr().err
    # A negative number is a number.
    assert written(pd.DataFrame({"margin": [-0.5]}), "csv") == "margin\n-0.5"


def test_json_is_one_array_of_exact_values(answer: pd.DataFrame) -> None:
    back = json.loads(written(answer, "json"))
    assert [found["label"] for found in back] == ODD
    first = back[0]
    assert first["phash"] == 1 - 2**63 and first["year"] is None and first["top5_scores"] == [0.9]
    assert first["scored_at"] == "2026-01-02T12:00:00+00:00"
    assert json.loads(written(answer.head(0), "json")) == []
    assert json.loads(written(pd.DataFrame({"x": [np.nan, 1.5]}), "json")) == [{"x": None}, {"x": 1.5}]


def test_a_table_shows_no_control_character(answer: pd.DataFrame) -> None:
    text = written(answer[["label"]], "table")
    assert len(text.splitlines()) == 1 + len(ODD)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[31mred" in text and "a\\nb" in text and "x" * 79 + "…" in text


def test_parquet_keeps_types_and_says_where_it_came_from(answer: pd.DataFrame, tmp_path: Path) -> None:
    out = str(tmp_path / "answer.parquet")
    assert queries.write_answer(answer, format="parquet", out=out, origin={"sql": "x"}) is None
    assert pd.read_parquet(out)["label"].tolist() == ODD
    assert table_metadata(out) == {"kind": "answer", "version": 1, "sql": "x"}


# Each of DuckDB's types, and how JSON says the value.
VALUES = {
    "true": True,
    **{f"7::{kind}": 7 for kind in ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")},
    "18446744073709551615::UBIGINT": 2**64 - 1,
    "sum(7)": 7,
    "170141183460469231731687303715884105727::HUGEINT": str(2**127 - 1),
    "340282366920938463463374607431768211455::UHUGEINT": str(2**128 - 1),
    **{"7::BIGNUM": "7", "1.5::DECIMAL(38, 10)": 1.5, "'nan'::FLOAT": None, "1 / 0": None, "-1 / 0": None, "0.5": 0.5},
    **{"'ü'": "ü", "'a' || chr(0)": "a\0", "NULL": None, "'101'::BIT": "101", "'{\"a\": 1}'::JSON": '{"a": 1}'},
    **{r"'\xAAb'::BLOB": r"\xAAb", "'a'::ENUM('a', 'b')": "a", "'POINT(1 2)'::GEOMETRY": "POINT (1 2)"},
    "'00000000-0000-0000-0000-000000000001'::UUID": "00000000-0000-0000-0000-000000000001",
    **{"DATE '2020-01-02'": "2020-01-02", "DATE '5881580-07-10'": "5881580-07-10", "'infinity'::DATE": "infinity"},
    **{"DATE '0044-03-15 (BC)'": "-0043-03-15", "'-infinity'::TIMESTAMP": "-infinity"},
    **{f"'2020-01-02 03:04:05'::TIMESTAMP{unit}": "2020-01-02T03:04:05" for unit in ("", "_S", "_MS")},
    "'2020-01-02 03:04:05'::TIMESTAMP_NS": "2020-01-02T03:04:05.000000000",
    "TIMESTAMP '290309-12-22 (BC) 00:00:00'": "-290308-12-22T00:00:00.000000",
    "TIMESTAMPTZ '2020-01-02 03:04:05+02'": "2020-01-02T01:04:05+00:00",
    **{"TIME '24:00:00'": "24:00:00", "TIMETZ '12:00:00+02'": "12:00:00+02", "'12:00'::TIME_NS": "12:00:00"},
    **{"INTERVAL 14 MONTH": "1 year 2 months", "union_value(n := 2)": "2", "1::VARIANT": "1", "row(1, 2)": "(1, 2)"},
    **{"[1, NULL]": [1, None], "[1, 2]::INTEGER[2]": [1, 2], "[]": [], "['inf'::DOUBLE]": [None], "[sum(7)]": [7]},
    **{"MAP {'a': 1}": {"a": 1}, "MAP {1: [INTERVAL 1 DAY]}": {"1": ["1 day"]}, "{'a': 1, 'b': {'c': 2}}": None},
    "[{'d': DATE '2020-01-02', 'b': 'x'::BLOB}]": [{"d": "2020-01-02", "b": "x"}],
}
VALUES["{'a': 1, 'b': {'c': 2}}"] = {"a": 1, "b": {"c": 2}}


@pytest.mark.parametrize("sql", VALUES)
def test_each_of_duckdbs_types_comes_out_in_every_format(predictions: str, tmp_path: Path, sql: str) -> None:
    frame = queries.query(predictions, f"SELECT {sql} AS v, {sql} AS v, NULL::INTEGER AS n")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(written(frame, "json"), parse_constant=refuse) == [
        {"v": VALUES[sql], "v_1": VALUES[sql], "n": None}
    ]
    assert written(frame, "table").splitlines()[0].split() == ["v", "v_1", "n"]
    assert pd.read_csv(io.StringIO(written(frame, "csv"))).shape == (1, 3)
    out = str(tmp_path / "answer.parquet")
    queries.write_answer(frame, format="parquet", out=out, origin={})
    assert pd.read_parquet(out).shape == (1, 3)


def test_a_join_of_two_tables_keeps_every_column(predictions: str) -> None:
    frame = queries.query(
        predictions, "SELECT a.uri, b.uri, 1 AS uri_1 FROM predictions a JOIN predictions b USING (uri)"
    )
    assert list(frame.columns) == ["uri", "uri_2", "uri_1"]
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    assert json.loads(written(twice, "json")) == [{"a": 1, "a_1": 2}]
    ordered = queries.query(predictions, "SELECT to_days(i::INTEGER) AS v FROM range(5000) r(i) ORDER BY i DESC")
    assert ordered["v"].tolist()[:2] == ["4999 days", "4998 days"]


def test_the_format_is_the_asked_one_or_the_files() -> None:
    assert choose_format(None, None) == "table"
    assert choose_format(None, "x.CSV") == "csv"
    assert choose_format("json", "x.txt") == "json"
    with pytest.raises(SettingsError, match="'xlsx'; there are table, csv, json, parquet"):
        choose_format("xlsx", None)
    with pytest.raises(SettingsError, match=r"ends in \.xlsx, which is not written; allowed are \.txt, \.csv"):
        choose_format(None, "o.xlsx")
    for format, out in (("csv", "o.json"), ("parquet", "o.txt"), ("table", "o.csv")):
        with pytest.raises(SettingsError, match=f"--format is '{format}', but --out '{out}' ends in"):
            choose_format(format, out)
    with pytest.raises(SettingsError, match="name a file with --out"):
        choose_format("parquet", None)

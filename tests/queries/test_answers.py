"""Answers as a table, CSV, JSON and Parquet, with the odd values that foreign text may hold."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from written_predictions import row, write_predictions

from carray import queries
from carray.core.errors import SettingsError
from carray.core.tables import table_metadata
from carray.queries.answers import choose_format

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
    assert back["phash"].tolist() == [2**63 + 1] * len(ODD)
    assert json.loads(back["top5_labels"][0]) == ["Audi A5 Coupe 2012"]
    assert "2 cells begin like a formula" in capsys.readouterr().err
    # A negative number is a number.
    assert written(pd.DataFrame({"margin": [-0.5]}), "csv") == "margin\n-0.5"


def test_json_is_one_array_of_exact_values(answer: pd.DataFrame) -> None:
    back = json.loads(written(answer, "json"))
    assert [found["label"] for found in back] == ODD
    first = back[0]
    assert first["phash"] == 2**63 + 1 and first["year"] is None and first["top5_scores"] == [0.9]
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


def test_the_format_is_the_asked_one_or_the_files() -> None:
    assert choose_format(None, None) == "table"
    assert choose_format(None, "x.CSV") == "csv"
    assert choose_format("json", "x.txt") == "json"
    with pytest.raises(SettingsError, match="'xlsx'; there are table, csv, json, parquet"):
        choose_format("xlsx", None)
    with pytest.raises(SettingsError, match="name a file with --out"):
        choose_format("parquet", None)

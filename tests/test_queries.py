from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray import queries
from carray.core.errors import SchemaError, SettingsError
from carray.core.storage import write_json
from carray.core.tables import table_from_rows, write_table
from carray.predictions.format import PREDICTION_SCHEMA

NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)


def _row(uri: str, **values: Any) -> dict[str, Any]:
    car = {"label": "Audi A5 Coupe 2012", "make": "Audi", "model": "A5", "body": "Coupe", "year": 2012}
    scores = {"score": 0.9, "margin": 0.8, "top5_labels": ["Audi A5 Coupe 2012"], "top5_scores": [0.9]}
    return (
        {"uri": uri, "status": "ok", "size_bytes": 100, "phash": 2**63 + 1, "scored_at": NOON} | car | scores | values
    )


SHARDS = [
    [
        _row("a"),
        _row("b", score=0.25, margin=0.1, phash=7),
        {"uri": "c", "status": "decode_error", "error_code": "truncated", "error": "image file is truncated"},
    ],
    [
        _row("d", label="unknown", make=None, model=None, body=None, year=None, score=0.4, margin=0.05),
        _row("e", label="BMW X5 SUV 2007", make="BMW", year=2007, phash=8),
        {"uri": "f", "status": "fetch_error", "error_code": "denied", "error": "the store refused the object"},
        {"uri": "g", "status": "decode_error", "error_code": "truncated", "error": "image file is truncated"},
    ],
]


def _write(folder: str) -> str:
    for i, rows in enumerate(SHARDS):
        table = table_from_rows(rows, PREDICTION_SCHEMA)
        write_table(table, f"{folder}/part-{i:06d}.parquet", kind="predictions", version=1)
    write_json(f"{folder}/_carray/done.json", {"rows": 7})
    return folder


@pytest.fixture
def predictions(tmp_path: Path) -> str:
    return _write(str(tmp_path / "predictions"))


def test_frame_holds_every_row_with_pandas_own_dtypes(predictions: str) -> None:
    frame = queries.read_predictions(predictions)
    assert frame["uri"].tolist() == list("abcdefg")
    assert frame.dtypes.to_dict() == pd.read_parquet(predictions).dtypes.to_dict()
    assert frame["year"].dtype == "Int16"
    assert frame["phash"].tolist()[0] == 2**63 + 1  # a float would have lost the last bit


def test_dtypes_do_not_depend_on_the_rows(predictions: str, tmp_path: Path) -> None:
    nothing = tmp_path / "nulls"
    write_table(table_from_rows([], PREDICTION_SCHEMA), f"{nothing}/part-000000.parquet", kind="predictions", version=1)
    empty = queries.read_predictions(str(nothing))
    assert empty.dtypes.to_dict() == queries.read_predictions(predictions).dtypes.to_dict()


def test_columns_and_filters_choose(predictions: str) -> None:
    frame = queries.read_predictions(predictions, ["score", "uri"], [("score", "<", 0.5), ("make", "==", "Audi")])
    assert frame.columns.tolist() == ["score", "uri"]
    assert frame["uri"].tolist() == ["b"]
    either = queries.read_predictions(predictions, ["uri"], [[("make", "==", "BMW")], [("status", "!=", "ok")]])
    assert either["uri"].tolist() == ["c", "e", "f", "g"]


@pytest.mark.parametrize(
    ("columns", "filters", "error", "words"),
    [
        (["scor"], None, SchemaError, "'scor'.*did you mean score"),
        (None, [("maker", "==", "Audi")], SchemaError, "'maker'.*did you mean make"),
        (None, [("score", "~", 1)], SettingsError, "~"),
        (None, [("score", "<", "high")], SettingsError, "high"),
        (None, "score < 1", SettingsError, "score < 1"),
    ],
)
def test_unknown_columns_and_odd_filters_are_said(
    predictions: str, columns: Any, filters: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        queries.read_predictions(predictions, columns, filters)


def test_what_is_no_folder_of_predictions_is_said(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="holds no Parquet file"):
        queries.read_predictions(str(tmp_path))
    (tmp_path / "x.parquet").write_bytes(b"not Parquet at all, but long enough to look at")
    with pytest.raises(SchemaError, match="not readable Parquet"):
        queries.read_predictions(str(tmp_path))
    pd.DataFrame({"colour": ["red"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=r"lacks the column uri, status.*colour"):
        queries.read_predictions(str(tmp_path))


def test_unfinished_run_is_read_with_a_warning(predictions: str, capsys: pytest.CaptureFixture[str]) -> None:
    queries.read_predictions(predictions)
    assert capsys.readouterr().err == ""
    Path(predictions, "_carray", "done.json").unlink()
    assert len(queries.read_predictions(predictions)) == 7
    assert "unfinished" in capsys.readouterr().err


def test_sql_answers_with_whole_numbers_and_utc(predictions: str) -> None:
    answer = queries.query(
        predictions, "SELECT make, sum(year) AS years, max(scored_at) AS at FROM predictions GROUP BY 1"
    )
    years = dict(zip(answer["make"].fillna(""), answer["years"], strict=True))
    assert years["Audi"] == 4024
    assert answer["years"].dtype == "Int64"
    assert answer["at"].max() == pd.Timestamp(NOON)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT maker FROM predictions", "maker"),
        ("SELECT * FROM elsewhere", "elsewhere"),
        ("SET threads = 1", "locked"),
        ("", "gives no table"),
    ],
)
def test_refused_sql_is_one_sentence(predictions: str, sql: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        queries.query(predictions, sql)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('{secret}')",
        "SELECT * FROM '{secret}'",
        "SELECT * FROM read_csv('{secret}')",
        "COPY predictions TO '{secret}'",
        "ATTACH '{secret}' AS other",
        "SET enable_external_access = true; SELECT * FROM read_text('{secret}')",
        "INSTALL httpfs",
    ],
)
def test_sql_reaches_no_other_file(predictions: str, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nhunter2\n")
    with pytest.raises(SettingsError):
        queries.query(predictions, sql.format(secret=secret))
    assert secret.read_text() == "word\nhunter2\n"


def test_sql_changes_no_file(predictions: str) -> None:
    before = {path: path.read_bytes() for path in Path(predictions).rglob("*") if path.is_file()}
    with pytest.raises(SettingsError):
        queries.query(predictions, "DELETE FROM predictions")
    assert {path: path.read_bytes() for path in Path(predictions).rglob("*") if path.is_file()} == before


def test_named_questions(predictions: str) -> None:
    makes = queries.by_make(predictions)
    assert makes["make"].fillna("none").tolist() == ["Audi", "BMW", "none"]
    assert makes["images"].tolist() == [2, 1, 1]
    assert makes["uncertain"].tolist() == [1, 0, 1]
    assert queries.by_year(predictions)["year"].tolist()[:2] == [2007, 2012]
    assert queries.uncertain(predictions)["uri"].tolist() == ["d", "b"]
    assert queries.failed(predictions)["uri"].tolist() == ["c", "g", "f"]
    assert queries.near_duplicates(predictions)[["uri", "images"]].values.tolist() == [["a", 2], ["d", 2]]


def test_every_named_question_answers_a_folder_without_a_usable_row(tmp_path: Path) -> None:
    table = table_from_rows([SHARDS[0][2]], PREDICTION_SCHEMA)
    write_table(table, str(tmp_path / "part-000000.parquet"), kind="predictions", version=1)
    lengths = {name: len(ask(str(tmp_path))) for name, ask in queries.QUESTIONS.items()}
    assert lengths == {"by-make": 0, "by-year": 0, "uncertain": 0, "failed": 1, "near-duplicates": 0}
    assert queries.summarize(str(tmp_path))["mean_score"] is None


def test_summary_adds_up(predictions: str) -> None:
    summary = queries.summarize(predictions, top=1)
    assert summary["rows"] == 7
    assert summary["by_status"] == {"ok": 4, "decode_error": 2, "fetch_error": 1}
    assert summary["error_codes"] == {"truncated": 2, "denied": 1}
    assert summary["mean_score"] == pytest.approx((0.9 + 0.25 + 0.4 + 0.9) / 4)
    assert summary["uncertain"] == 2
    assert summary["top_makes"] == {"Audi": 2}
    text = queries.summary_text(summary)
    assert "7 images" in text
    assert "truncated 2, denied 1" in text


def test_s3_answers_as_a_folder_does(predictions: str, s3: str) -> None:
    _write(f"{s3}/some/predictions")
    there, here = queries.read_predictions(f"{s3}/some/predictions"), queries.read_predictions(predictions)
    pd.testing.assert_frame_equal(there, here)
    assert queries.by_make(f"{s3}/some/predictions").equals(queries.by_make(predictions))

"""Frames of predictions: what they hold, what they read, and what is said of folders that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray import queries
from carray.classify.predictions_folder import PREDICTION_SCHEMA
from carray.core.errors import SchemaError, SettingsError
from carray.core.tables import table_from_rows, write_table
from carray.testing.predictions import write_predictions


def test_frame_holds_every_row_with_pandas_own_dtypes(predictions: str) -> None:
    frame = queries.read_predictions(predictions)
    assert frame["uri"].tolist() == list("abcdefg")
    assert frame.dtypes.to_dict() == pd.read_parquet(predictions).dtypes.to_dict()
    assert frame["year"].dtype == "Int16"
    assert frame["phash"].tolist()[0] == 1 - 2**63  # a float would have lost the last bit


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
    with pytest.raises(SchemaError, match=r"lacks the column uri, status, score.*colour"):
        queries.read_predictions(str(tmp_path))


def test_unfinished_run_is_read_with_a_warning(predictions: str, capsys: pytest.CaptureFixture[str]) -> None:
    queries.read_predictions(predictions)
    assert capsys.readouterr().err == ""
    Path(predictions, "_carray", "done.json").unlink()
    assert len(queries.read_predictions(predictions)) == 7
    assert "unfinished" in capsys.readouterr().err


def test_s3_answers_as_a_folder_does(predictions: str, s3: str) -> None:
    write_predictions(f"{s3}/some/predictions")
    there, here = queries.read_predictions(f"{s3}/some/predictions"), queries.read_predictions(predictions)
    pd.testing.assert_frame_equal(there, here)
    assert queries.by_make(f"{s3}/some/predictions").equals(queries.by_make(predictions))

"""Questions that need a second table: accuracy against labels, disagreements between runs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from carray import queries
from carray.core.errors import SchemaError, StorageError
from carray.evaluation.metrics import wilson_interval
from carray.testing.predictions import SHARDS, row, write_predictions

AUDI, BMW = "Audi A5 Coupe 2012", "BMW X5 SUV 2007"
TRUE = {"a": AUDI, "b": BMW, "d": "Fiat 500 Abarth 2012", "e": BMW, "c": AUDI, "nowhere": AUDI}


def write_labels(path: Path, labels: dict[str, str], **columns: list[str]) -> str:
    frame = pd.DataFrame({"uri": list(labels), "label": list(labels.values()), **columns})
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv"])
def test_accuracy_counts_what_it_leaves_out(placed: str, tmp_path: Path, suffix: str) -> None:
    frame = queries.accuracy(placed, write_labels(tmp_path / f"labels.{suffix}", TRUE))
    low, high = wilson_interval(2, 4)
    assert frame.to_dict("records") == [
        {
            **{"images": 4, "hits": 2, "accuracy": 0.5, "low": low, "high": high},
            # Fiat is of no prediction; c failed; one label is of no image; every scored image has a label.
            **{"never_predicted": 1, "not_scored": 1, "without_prediction": 1, "without_label": 0},
        }
    ]
    fewer = {"a": AUDI}
    assert queries.accuracy(placed, write_labels(tmp_path / f"few.{suffix}", fewer))["without_label"].item() == 3


def test_accuracy_by_class_and_by_split(placed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = write_labels(tmp_path / "m.parquet", TRUE, split=["train", "test", "test", "test", "val", "val"])
    classes = queries.accuracy_by_class(placed, labels).set_index("label")
    assert "6 of" not in capsys.readouterr().err
    assert classes.index.tolist() == ["Fiat 500 Abarth 2012", BMW, AUDI]
    assert classes.loc[BMW, ["images", "hits", "accuracy"]].tolist() == [2, 1, 0.5]
    assert classes.loc[AUDI, ["images", "hits", "not_scored", "without_prediction"]].tolist() == [1, 1, 1, 1]
    splits = queries.accuracy_by_split(placed, labels).set_index("split")
    assert splits["images"].to_dict() == {"test": 3, "train": 1, "val": 0}
    assert pd.isna(splits.loc["val", "accuracy"])
    assert capsys.readouterr().err == ""
    queries.accuracy(placed, labels)
    assert "warning: 1 of these images are of the split train" in capsys.readouterr().err


def test_labels_that_cannot_be_used_are_said(placed: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="absent.csv does not exist"):
        queries.accuracy(placed, str(tmp_path / "absent.csv"))
    (tmp_path / "other.csv").write_text("uri,kind\na,b\n")
    with pytest.raises(SchemaError, match="lacks the column label; its first line has uri, kind"):
        queries.accuracy(placed, str(tmp_path / "other.csv"))
    (tmp_path / "bad.parquet").write_bytes(b"no Parquet at all, but long enough to look at")
    with pytest.raises(SchemaError, match=r"bad\.parquet is not a readable Parquet file"):
        queries.accuracy(placed, str(tmp_path / "bad.parquet"))
    with pytest.raises(SchemaError, match="gives 1 uris more than one label, such as '.*/a'"):
        (tmp_path / "two.csv").write_text("uri,label\na,x\na,y\nb,x\nb,x\n")
        queries.accuracy(placed, str(tmp_path / "two.csv"))
    with pytest.raises(SchemaError, match="none of the 1 labelled uris .*'/photos/a'.* spell them alike"):
        queries.accuracy(placed, write_labels(tmp_path / "far.csv", {"/photos/a": AUDI}))
    with pytest.raises(SchemaError, match="holds no label"):
        (tmp_path / "none.csv").write_text("uri,label\na,\n")
        queries.accuracy(placed, str(tmp_path / "none.csv"))
    with pytest.raises(SchemaError, match="has no column split"):
        queries.accuracy_by_split(placed, write_labels(tmp_path / "l.csv", TRUE))


def test_labels_called_null_or_na_are_labels(tmp_path: Path) -> None:
    folder = write_predictions(
        str(tmp_path / "p"), [[row(f"{tmp_path}/a", label="NA"), row(f"{tmp_path}/b", label="null")]]
    )
    frame = queries.accuracy_by_class(folder, write_labels(tmp_path / "l.csv", {"a": "NA", "b": "null"}))
    assert frame["label"].tolist() == ["NA", "null"] and frame["hits"].tolist() == [1, 1]


def test_labels_are_spelled_as_prepare_spells_them(tmp_path: Path) -> None:
    """A table that was prepared measures a run of its bundle: paths, columns and labels mean the same in both."""
    rows = [row(f"{tmp_path}/{name}", label=label) for name, label in {"a": "Citroën C3", "b": "2", "c": "2"}.items()]
    folder = write_predictions(str(tmp_path / "p"), [rows])
    (tmp_path / "deep").mkdir()
    labels = tmp_path / "deep" / "l.csv"
    labels.write_text("file_name;Class;year\n../a;Citroe\u0308n\u00a0C3 ;2007\n../b;2.0;\n../c;;2012\n")
    assert queries.accuracy(folder, str(labels))["hits"].item() == 1, "with one text among them 2.0 is a text"
    labels.write_text("file_name;Class;year\n../a;;2007\n../b;2.0;\n../c;2.0;2012\n")
    assert queries.accuracy(folder, str(labels))["hits"].item() == 2, "whole numbers that a gap made floats"
    newest = queries.query(folder, "SELECT max(year) AS year FROM labels WHERE year > 2010", labels=str(labels))
    assert newest["year"].item() == 2012, "other columns are there, too, as numbers"


def test_disagreements_name_first_what_both_are_sure_of(predictions: str, tmp_path: Path) -> None:
    others = [row("a", label=BMW, score=0.7), row("b", label=BMW, score=0.9), row("d", label="unknown"), row("z")]
    other = write_predictions(str(tmp_path / "other"), [others])
    frame = queries.disagreements(predictions, other)
    assert frame[["uri", "label", "other_label"]].values.tolist() == [["a", AUDI, BMW], ["b", AUDI, BMW]]
    assert len(queries.disagreements(predictions, other, limit=1)) == 1
    assert queries.disagreements(predictions, write_predictions(str(tmp_path / "same"), SHARDS)).empty
    with pytest.raises(SchemaError, match="no uri in common"):
        queries.disagreements(predictions, write_predictions(str(tmp_path / "far"), [[row("far")]]))

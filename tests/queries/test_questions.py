"""The named questions: their answers, what they read, how they are asked by name, and those with a second table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from carray import queries
from carray.classify.predictions_folder import PREDICTION_SCHEMA
from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.tables import table_from_rows, write_table
from carray.evaluation.metrics import wilson_interval
from carray.testing.predictions import BROKEN, SHARDS, row, write_predictions

ALONE = {name: ask for name, ask in queries.QUESTIONS.items() if not name.startswith(("accuracy", "disagreements"))}


def test_named_questions(predictions: str) -> None:
    makes = queries.by_make(predictions)
    assert makes["make"].fillna("none").tolist() == ["Audi", "BMW", "none"]
    assert makes["images"].tolist() == [2, 1, 1]
    assert makes["uncertain"].tolist() == [1, 0, 1]
    assert queries.by_label(predictions)["label"].tolist() == ["Audi A5 Coupe 2012", "BMW X5 SUV 2007", "unknown"]
    assert queries.by_year(predictions)["year"].tolist()[:2] == [2007, 2012]
    assert queries.uncertain(predictions)["uri"].tolist() == ["d", "b"]
    assert queries.failed(predictions)["uri"].tolist() == ["c", "g", "f"]
    assert queries.near_duplicates(predictions)[["uri", "images"]].values.tolist() == [["a", 2], ["d", 2]]


def test_lists_end_where_they_are_told_to_with_the_most_telling_rows(tmp_path: Path) -> None:
    rows = [row(f"{i}", phash=i // 3, margin=1 - i / 9, score=0.3) for i in range(8)]
    folder = write_predictions(str(tmp_path), [rows[::2], rows[1::2]])
    assert queries.uncertain(folder, limit=2)["uri"].tolist() == ["7", "6"]
    assert len(queries.uncertain(folder, limit=None)) == 8
    assert queries.near_duplicates(folder, limit=4)["uri"].tolist() == ["0", "1", "2", "3"]
    assert len(queries.near_duplicates(folder, limit=None)) == 8
    with pytest.raises(SettingsError, match="limit is 0; give 1 or more"):
        queries.failed(folder, limit=0)


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_without_a_usable_row_is_answered(tmp_path: Path, name: str) -> None:
    folder = write_predictions(str(tmp_path), [[{"uri": "c", **BROKEN}]])
    assert len(queries.QUESTIONS[name](folder)) == (1 if name == "failed" else 0)


@pytest.mark.parametrize("name", ALONE)
def test_a_folder_without_a_row_is_answered(tmp_path: Path, name: str) -> None:
    assert queries.QUESTIONS[name](write_predictions(str(tmp_path), [[]])).empty


READS = {
    "by-make": {"status", "make", "score"},
    "by-label": {"status", "label", "score"},
    "by-year": {"status", "year", "score"},
    "uncertain": {"uri", "status", "label", "score", "margin", "top5_labels", "top5_scores"},
    "failed": {"uri", "status", "error_code", "error"},
    "near-duplicates": {"uri", "phash", "label", "score"},
}


@pytest.mark.parametrize("name", ALONE)
def test_a_question_reads_its_own_columns_and_no_other(predictions: str, name: str) -> None:
    """The bytes of every other column are destroyed, and the answer stays what it was."""
    expected = queries.QUESTIONS[name](predictions)
    for path in Path(predictions).glob("*.parquet"):
        destroy_columns(path, set(PREDICTION_SCHEMA.names) - READS[name])
    pd.testing.assert_frame_equal(queries.QUESTIONS[name](predictions), expected)
    with pytest.raises(SchemaError, match="not readable Parquet"):
        queries.query(predictions, "SELECT max(bundle_id), max(scored_at) FROM predictions")


def destroy_columns(path: Path, names: set[str]) -> None:
    data, metadata = bytearray(path.read_bytes()), pq.read_metadata(path)
    for group in range(metadata.num_row_groups):
        for place in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(place)
            if chunk.path_in_schema.split(".")[0] in names:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("by-mak", {}, "'by-mak' is no question; did you mean by-make"),
        ("duplicates", {}, "did you mean near-duplicates"),
        ("xyzzy", {}, "there are by-make.*or write SQL"),
        ("by-make", {"labels": "x"}, "by-make takes no labels; leave --labels out"),
        ("by-year", {"limit": 3}, "by-year takes no limit"),
        ("accuracy", {}, "accuracy needs a table of true labels; give it with --labels"),
        ("disagreements", {}, "disagreements needs another run; give it with --other"),
    ],
)
def test_what_cannot_be_asked_is_said(predictions: str, name: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        queries.ask_question(name, predictions, **given)


def test_a_question_by_name(predictions: str) -> None:
    pd.testing.assert_frame_equal(queries.ask_question("by_make", predictions), queries.by_make(predictions))
    assert len(queries.ask_question("failed", predictions, limit=1, labels=None)) == 1
    assert len(queries.ask_question("failed", predictions, limit=0)) == 3


def test_a_table_without_the_column_is_a_sentence(tmp_path: Path) -> None:
    pd.DataFrame({"uri": ["a"], "status": ["ok"], "score": [0.1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match="'make' is not a column"):
        queries.by_make(str(tmp_path))


def test_files_of_other_columns_are_a_sentence(predictions: str) -> None:
    """A later file that lacks a column of the first is no file of this run."""
    lacking = PREDICTION_SCHEMA.remove(PREDICTION_SCHEMA.get_field_index("make"))
    write_table(table_from_rows([], lacking), f"{predictions}/part-000009.parquet", kind="predictions", version=1)
    with pytest.raises(SchemaError, match=r"part-000009\.parquet"):
        queries.by_make(predictions)


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


def test_summary_of_failures_only_has_no_mean_score(tmp_path: Path) -> None:
    folder = write_predictions(str(tmp_path), [[{"uri": "c", **BROKEN}]])
    assert queries.summarize(folder)["mean_score"] is None
    assert "mean score  none" in queries.summary_text(queries.summarize(folder))


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

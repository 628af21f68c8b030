"""`carray query` as a user meets it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from carray import queries
from carray.__main__ import main
from carray.testing.predictions import row, write_predictions


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    def run_command(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["query", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run_command


def test_help_lists_every_question(run) -> None:
    words = re.findall(r"[\w-]+", run("--help")[1])
    assert set(queries.QUESTIONS) <= set(words)


def test_a_summary_a_question_and_sql(run, predictions: str) -> None:
    assert "7 images in" in run(predictions)[1]
    assert json.loads(run(predictions, "--format", "json")[1])["rows"] == 7
    code, out, _ = run(predictions, "by-make")
    assert code == 0 and out.split()[:4] == ["make", "images", "mean_score", "uncertain"]
    assert json.loads(run(predictions, "SELECT count(*) AS n FROM predictions", "--format", "json")[1]) == [{"n": 7}]
    assert run(predictions, "failed", "--limit", "1", "--format", "csv")[1].count("\n") == 2


def test_an_answer_goes_to_a_file(run, predictions: str, tmp_path: Path) -> None:
    for suffix in ("parquet", "csv", "json", "txt"):
        code, out, _ = run(predictions, "by-make", "--out", tmp_path / f"makes.{suffix}")
        assert code == 0
        assert json.loads(out) == {
            "out": str(tmp_path / f"makes.{suffix}"),
            "rows": 3,
            "columns": ["make", "images", "mean_score", "uncertain"],
        }
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "makes.parquet"), queries.by_make(predictions))
    assert (tmp_path / "makes.csv").read_text().startswith("make,images,")
    assert json.loads((tmp_path / "makes.json").read_text())[0]["make"] == "Audi"
    assert "Audi" in (tmp_path / "makes.txt").read_text()


def test_a_long_list_says_that_it_is_cut(run, tmp_path: Path) -> None:
    folder = write_predictions(str(tmp_path / "long"), [[row(f"{i:04d}", score=0.2) for i in range(1001)]])
    _, out, err = run(folder, "uncertain", "--format", "csv")
    assert len(out.splitlines()) == 1001 and "the first 1,000 rows; --limit 0 gives all" in err
    _, out, err = run(folder, "uncertain", "--format", "csv", "--limit", "0")
    assert len(out.splitlines()) == 1002 and "the first" not in err


def test_a_second_table(run, placed: str, tmp_path: Path) -> None:
    predictions = placed
    (tmp_path / "labels.csv").write_text("uri,label\na,Audi A5 Coupe 2012\n")
    code, out, _ = run(predictions, "accuracy", "--labels", tmp_path / "labels.csv", "--format", "json")
    assert code == 0 and json.loads(out)[0]["accuracy"] == 1.0
    assert json.loads(run(predictions, "disagreements", "--other", predictions, "--format", "json")[1]) == []
    sql = "SELECT p.uri FROM predictions p JOIN labels USING (uri)"
    _, out, _ = run(predictions, sql, "--labels", tmp_path / "labels.csv", "--format", "json")
    assert json.loads(out) == [{"uri": f"{tmp_path}/a"}]
    (tmp_path / "theirs.csv").write_text("place,first,second\na,x,Audi A5 Coupe 2012\n")
    named = ("--column", "uri=place", "--column", "label=second")
    code, out, _ = run(placed, "accuracy", "--labels", tmp_path / "theirs.csv", *named, "--format", "json")
    assert code == 0 and json.loads(out)[0]["accuracy"] == 1.0
    assert "--column is given without --labels" in run(placed, "by-make", *named)[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["by-mak"], "did you mean by-make?"),
        (["COPY predictions TO 'x.csv'"], "it is COPY"),
        (["SELECT * FROM '/etc/passwd'"], "/etc/passwd"),
        (["by-make", "--format", "xlsx"], "there are table, csv, json, parquet"),
        (["by-make", "--format", "parquet"], "name a file with --out"),
        (["--labels", "x.csv"], "--labels belongs to a question"),
        (["--format", "csv"], "--format csv belongs to a question"),
        (["by-make", "--other", "x"], "by-make takes no other"),
    ],
)
def test_a_mistake_is_one_sentence(run, predictions: str, arguments: list[str], words: str) -> None:
    code, out, err = run(predictions, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert words in err

"""Keys, labels and error texts are untrusted: terminals, logs and spreadsheets show them and do not interpret them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest

from carray import queries
from carray.__main__ import main
from carray.core.progress import print_result, say
from carray.core.text import readable
from carray.manifest.prepare import prepare
from carray.queries import summary_text

NASTY = "a\x1b[2J\x1b]0;owned\x07\r\nclassify: all is well\x9b31m\u2028\u202e\x7f.jpg"
OBEYED = ("\x1b", "\x07", "\r", "\x9b", "\u2028", "\u202e", "\x7f")


def test_a_line_of_the_log_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"reading {NASTY} failed")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert not any(letter in shown for letter in OBEYED)
    assert "\\x1b[2J" in shown


def test_a_result_is_one_line_of_json_that_a_terminal_does_not_obey(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"out": NASTY, "images": 3, "place": "Käfer 車"})
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and not any(letter in shown for letter in OBEYED)
    assert json.loads(shown) == {"out": NASTY, "images": 3, "place": "Käfer 車"}
    assert "Käfer 車" in shown


def test_a_mistake_that_repeats_foreign_text_is_one_plain_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pd.DataFrame({NASTY: ["a"]}).to_parquet(tmp_path / "table.parquet")
    with pytest.raises(SystemExit) as end:
        main(["prepare", f"{tmp_path}/table.parquet", "--out", f"{tmp_path}/m.parquet"])
    shown = capsys.readouterr().err
    assert end.value.code == 2 and shown.count("\n") == 1
    assert not any(letter in shown for letter in OBEYED)


def test_reports_for_a_terminal_keep_their_lines(tmp_path: Path, make_image) -> None:
    label = NASTY.removesuffix(".jpg")
    for number in range(4):
        for name in (label, "other"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name / f"{number}.jpg").write_bytes(make_image(7 * number + len(name)))
    (tmp_path / "images" / label / "odd.x\x1b[2Jy").write_bytes(b"")
    (tmp_path / "images" / label / "broken.jpg").write_bytes(b"")
    text = prepare(f"{tmp_path}/images", out=f"{tmp_path}/m.parquet").text()
    assert not any(letter in text for letter in OBEYED)
    assert not any(line.startswith("classify:") for line in text.splitlines())
    summary = {"rows": 1, "path": "p", "by_status": {"ok": 1}, "error_codes": {NASTY: 1}, "mean_score": 0.5}
    text = summary_text({**summary, "uncertain": 0, "top_makes": {NASTY: 1}, "top_labels": {NASTY: 1}})
    assert len(text.splitlines()) == 6 and not any(letter in text for letter in OBEYED)


def test_a_carriage_return_in_a_key_begins_no_row_of_a_csv() -> None:
    frame = pd.DataFrame({"key": ["a.jpg\r=1+1", "b.jpg"], "score": [0.5, 0.25]})
    text = queries.write_answer(frame, format="csv", out=None, origin={}) or ""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows == [["key", "score"], ["a.jpg\r=1+1", "0.5"], ["b.jpg", "0.25"]]


@pytest.mark.parametrize("start", ["=1+1", "+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"])
@pytest.mark.parametrize("kind", ["object", "string", "category"])
def test_no_cell_of_a_csv_is_a_formula(start: str, kind: str) -> None:
    frame = pd.DataFrame({"key": pd.Series([start, "plain"], dtype=kind), "score": [-0.5, 0.5]})
    text = queries.write_answer(frame, format="csv", out=None, origin={}) or ""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows == [["key", "score"], ["'" + start, "-0.5"], ["plain", "0.5"]]


def test_plain_text_of_every_script_is_shown_as_it_is() -> None:
    for text in ("Käfer 車", "عربى", "naïve — “quoted”", "🚗 100 %", "a/b\\c"):
        assert readable(text) == text

"""Tables with a column of URIs: what is read, under which names, and which sentence says what is wrong."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.sources import open_source
from carray.core.errors import CarrayError, SchemaError, SettingsError
from carray.core.store.files import write_bytes
from carray.core.uri_tables import UriTable, parse_columns
from carray.manifest.tables import read_source_table


def write(folder: Path, text: str, encoding: str = "utf-8", name: str = "t.csv") -> str:
    (folder / name).write_bytes(text.encode(encoding))
    return str(folder / name)


def prepared(place: str, **options: object) -> list[str]:
    """Give the URIs that `prepare` reads."""
    return list(read_source_table(place, **options).rows["uri"])  # type: ignore[arg-type]


def classified(place: str, *, uses_boxes: bool = False, **settings: object) -> list[str]:
    """Give the URIs that `classify` reads."""
    source = open_source(place, ClassifySettings(**settings), uses_boxes=uses_boxes)  # type: ignore[arg-type]
    found: list[str] = []
    source.list(
        lambda piece: found.extend(piece.batch["uri"].to_pylist()),
        gaps=[("", None)],
        threads=1,
        stop=threading.Event(),
    )
    return found


def both(place: str) -> list[str]:
    """Give the URIs that both read, which are the same."""
    assert prepared(place) == classified(place)
    return classified(place)


def refusal(read: object, *arguments: object, **options: object) -> str:
    with pytest.raises((SchemaError, SettingsError)) as caught:
        read(*arguments, **options)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("uri,label\na.jpg,x\nb c.jpg,y\n", "utf-8"),
        ("uri,label\na.jpg,x\nb c.jpg,y\n", "utf-8-sig"),
        ("uri,label\na.jpg,x\nb c.jpg,y\n", "utf-16"),
        ("uri;label;price\na.jpg;x;1,5\nb c.jpg;y;2,5\n", "utf-8"),
        ("uri\tlabel\na.jpg\tx\nb c.jpg\ty\n", "utf-8"),
        ('label, uri\nx, a.jpg\ny, "b c.jpg"\n', "utf-8"),
        ("uri,label\r\na.jpg,x\r\n\r\nb c.jpg,y", "utf-8"),
        ("uri,label,\na.jpg,x,\nb c.jpg,y,,\n", "utf-8"),
        ("URI,Label\na.jpg,x\nb c.jpg,y\n", "utf-8"),
        ("id,File Name,target\n1,a.jpg,x\n2,b c.jpg,y\n", "utf-8"),
        ("path,uri,label,class\nz,a.jpg,x,1\nz,b c.jpg,y,2\n", "utf-8"),
        ('uri,label\na.jpg,"x 19"" wheels"\nb c.jpg,y 19" wheels\n', "utf-8"),
        ("uri,label,note,note\na.jpg,x,1,2\nb c.jpg,y,,\n", "utf-8"),
        ("uri,label,size_bytes,etag,escaped,width\na.jpg,x,1 kB,5,no,wide\nb c.jpg,y,,,,\n", "utf-8"),
    ],
)
def test_tables_of_other_programs_are_read_alike_by_prepare_and_classify(
    tmp_path: Path, text: str, encoding: str
) -> None:
    assert both(write(tmp_path, text, encoding)) == [f"{tmp_path}/a.jpg", f"{tmp_path}/b c.jpg"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("uri,label\na.jpg,x\nb.jpg,Audi, A4\n", "line 3, has 3 fields where the first line names 2 columns"),
        ("uri,label\na.jpg,x\nb.jpg\n", "line 3, has 1 fields where the first line names 2 columns"),
        ('uri,label\n"a\nb.jpg",x\n\nc.jpg,y,z\n', "line 5, has 3 fields"),
        ('uri,label\na.jpg,x\nb.jpg,"y\nc.jpg,z\n', "line 3, has quotation marks that do not pair"),
        ('uri,label\na.jpg,"x\nb.jpg,y\nc.jpg,"z"\n', "line 2, has quotation marks that do not pair"),
        (f'uri,label\na.jpg,"{"x" * 200_000}', "line 2, has quotation marks that do not pair .field larger"),
        ("uri,label\na.jpg,x\n,y\n", "line 3, has no uri"),
        ("uri,label\n  ,y\n", "line 2, has no uri"),
        (
            "path,file_name,label\na,b,x\n",
            r"has 2 columns that may be uri \(path, file_name\); say which column it is: --column uri=",
        ),
        ("uri,label,uri\na,x,b\n", "has the column uri 2 times"),
        ("# made by hand\nuri,label\na,x\n", "lacks the column uri.*its first line has # made by hand"),
        ("a.jpg,x\nb.jpg,y\n", "lacks the column uri.*its first line has a.jpg, x"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("uri,label\nfile:/x/a.jpg,x\n", "line 2: 'file:/x/a.jpg' is an address of another kind"),
        ("uri,label\nC:\\x\\a.jpg,x\n", "line 2: .* is an address of another kind"),
        ("uri,label\na.jpg,x\nhttps://me:secret@host/a?b,x\n", "line 3: 'https://host'… has the scheme 'https'"),
    ],
)
def test_both_refuse_a_wrong_table_in_the_same_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    place = write(tmp_path, text)
    said = refusal(classified, place)
    assert re.search(sentence, said), said
    assert said.replace("column uri;", "") == refusal(prepared, place).replace("column uri, label;", "")


def test_another_encoding_is_said_with_its_line(tmp_path: Path) -> None:
    place = write(tmp_path, "uri,label\n" + "a.jpg,x\n" * 5_000 + "b.jpg,Citroën\n" + "c.jpg,x\n" * 9_000, "cp1252")
    assert "line 5002, is not UTF-8" in refusal(classified, place)


def test_a_line_is_counted_behind_the_first_batch_and_behind_line_ends_in_quotes(tmp_path: Path) -> None:
    rows = "".join(f'{i}.jpg,"two\r\nlines"\n\n' for i in range(40_000))
    assert "line 120002, has 3 fields" in refusal(classified, write(tmp_path, f"uri,note\n{rows}a,b,c\n"))
    pq.write_table(pa.table({"uri": ["a"] * 40_000 + [None]}), tmp_path / "t.parquet")
    assert "row 40001, has no uri" in refusal(classified, str(tmp_path / "t.parquet"))


def test_column_settles_what_is_ambiguous(tmp_path: Path) -> None:
    place = write(tmp_path, "path,file_name,kind,left\nz.jpg,a.jpg,Cat,1\n")
    named = parse_columns(["uri=file_name", "label=kind"])
    table = read_source_table(place, named=named).rows
    assert (table["uri"].item(), table["label"].item()) == (f"{tmp_path}/a.jpg", "Cat")
    assert classified(place, column=named) == [f"{tmp_path}/a.jpg"], "of label it says what is not needed"
    assert "lacks the column nope (for uri)" in refusal(classified, place, column={"uri": "nope"})
    assert "column is {'uri': 'x'}, but" in refusal(classified, str(tmp_path), column={"uri": "x"})
    for wrong in ("uri", "uri=", "=path", "phash=x"):
        assert "is not NAME=COLUMN with NAME one of uri, label" in refusal(parse_columns, [wrong])
    assert "names uri twice" in refusal(parse_columns, ["uri=a", "uri=b"])


def test_a_path_of_a_table_means_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    place = write(tmp_path, "uri,label\n~/a.jpg,x\n../b.jpg,x\n./c//d.jpg,x\n~e.jpg,x\n/f/../g.jpg,x\ns3://b/h//i,x\n")
    here = str(tmp_path)
    expected = ["/home/someone/a.jpg", f"{tmp_path.parent}/b.jpg", f"{here}/c/d.jpg", f"{here}/~e.jpg", "/g.jpg"]
    assert both(place) == [*expected, "s3://b/h//i"]


def test_a_path_of_a_table_on_s3_is_relative_to_it(s3: str) -> None:
    write_bytes(f"{s3}/deep/t.csv", b"uri,label\na//b.jpg,x\n../c.jpg,x\n./d.jpg,x\n")
    assert both(f"{s3}/deep/t.csv") == [f"{s3}/deep/a//b.jpg", f"{s3}/c.jpg", f"{s3}/deep/d.jpg"]


@pytest.mark.parametrize(
    ("columns", "box", "sentence"),
    [
        ("x1,y1,x2,y2", "0.5,0.5,50.5,50.5", "line 2, has '0.5' as x1; .* round it"),
        ("x1,y1,x2,y2", "0.1,0.1,0.9,0.9", "multiply fractions of the image by its width and height"),
        ("x1,y1,x2,y2", "1,2,wide,4", "line 2, has 'wide' as x2; .* correct it"),
        ("x1,y1,x2,y2", "1,2,3e9,4", "line 2, has '3e9' as x2; .* correct it"),
        ("x1,y1,x2,y2", "1,2,,4", "line 2, has an incomplete box"),
        ("x1,y1", "1,2", "lacks the column x2, y2"),
    ],
)
def test_a_wrong_box_stops_only_who_cuts_to_boxes(tmp_path: Path, columns: str, box: str, sentence: str) -> None:
    place = write(tmp_path, f"uri,label,{columns}\na.jpg,x,{box}\n")

    assert re.search(sentence, refusal(prepared, place, crop_boxes=True))
    assert re.search(sentence, refusal(classified, place, uses_boxes=True))
    assert both(place) == [f"{tmp_path}/a.jpg"]
    table = read_source_table(place)
    assert table.boxes_left_out and re.search(sentence, table.boxes_left_out)
    assert table.rows[["x1", "y1", "x2", "y2"]].isna().all(axis=None)


def test_splits_are_read_alike(tmp_path: Path) -> None:
    place = write(tmp_path, "uri,label,split\na.jpg,x,Train\nb.jpg,x,validation \nc.jpg,x, test\nd.jpg,x,\n")
    splits = read_source_table(place).rows["split"]
    assert [None if pd.isna(split) else split for split in splits] == ["train", "val", "test", None]
    assert classified(place, split="val") == [f"{tmp_path}/b.jpg"]
    unknown = write(tmp_path, "uri,label,split\na.jpg,x,train\nb.jpg,x,third\n", name="u.csv")
    assert "u.csv, line 3, has the split 'third'" in refusal(classified, unknown, split="val")
    assert len(classified(unknown)) == 2, "without --split nobody needs it"


def test_parquet_labels_are_text_whatever_their_type(tmp_path: Path) -> None:
    nan = float("nan")
    for kind, values, expected in [
        (pa.float64(), [1.0, nan, None, 2.5], ["1", None, None, "2.5"]),
        (pa.float32(), [1.0, 2.0, nan, 3.0], ["1", "2", None, "3"]),
        (pa.int8(), [1, 2, None, 3], ["1", "2", None, "3"]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", None, ""], ["a", "b", None, None]),
        (pa.large_string(), ["a", "", None, "b"], ["a", None, None, "b"]),
        (pa.bool_(), [True, False, None, True], ["true", "false", None, "true"]),
    ]:
        table = pa.table({"uri": list("abcd"), "label": pa.array(values, kind, from_pandas=False)})
        pq.write_table(table, tmp_path / "t.parquet")
        labels = read_source_table(str(tmp_path / "t.parquet")).rows["label"]
        assert [None if pd.isna(label) else label for label in labels] == expected, kind
    pq.write_table(pa.table({"uri": ["a"], "label": [["x"]], "image": [{"path": "p"}]}), tmp_path / "t.parquet")
    assert "has the column label of type list" in refusal(prepared, str(tmp_path / "t.parquet"))
    assert classified(str(tmp_path / "t.parquet")) == [f"{tmp_path}/a"], "classify needs no label"


def test_whole_numbers_that_a_gap_made_floats_are_whole_in_a_text_file_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"uri": list("abc"), "label": [1.0, np.nan, 2.0]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert read_source_table(str(tmp_path / "t.csv")).rows["label"].tolist() == ["1", pd.NA, "2"]
    assert read_source_table(write(tmp_path, "uri,label\na,1.0\nb,2.0\n")).rows["label"].tolist() == ["1.0", "2.0"]


def test_a_hint_is_taken_where_it_is_one(tmp_path: Path) -> None:
    place = write(tmp_path, "uri,etag,size_bytes,escaped\na%41.jpg,e,12,True\nb.jpg,,1.5,nonsense\n")
    batches = list(UriTable(place, hints=("etag", "size_bytes", "escaped")).batches())
    assert batches[0].hint("size_bytes", pa.int64()).to_pylist() == [12, None]
    assert batches[0].hint("etag", pa.string()).to_pylist() == ["e", None]
    assert batches[0].flags("escaped").to_pylist() == [True, False]


def test_no_malformed_table_is_a_traceback_or_read_in_two_ways(tmp_path: Path) -> None:
    """Hundreds of small tables of odd cells: prepare and classify read the same images, or say the same."""
    chance = random.Random(0)
    names = [
        "uri",
        "label",
        "split",
        "x1",
        "y1",
        "x2",
        "y2",
        "path",
        "Class",
        "size_bytes",
        "etag",
        "escaped",
        "",
        "note",
    ]
    cells = [
        "a.jpg",
        "b/../c",
        "~/d",
        "s3://b/k",
        "",
        " ",
        "x",
        '"x',
        'x"',
        '"a,b"',
        '"a\nb"',
        "1",
        "1.5",
        "nan",
        "é",
        "\\",
    ]
    read = 0
    for _ in range(300):
        width = chance.randint(1, 6)
        rows = [[chance.choice(cells) for _ in range(width + chance.choice([0] * 9 + [1, -1]))] for _ in range(3)]
        text = _joined([[*_header(names, width, chance)], *rows], chance)
        place = write(tmp_path, text, chance.choice(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "latin-1"]))
        answers = [_answer(read_uris, place) for read_uris in (prepared, classified)]
        if isinstance(answers[0], list) and isinstance(answers[1], list):
            assert list(dict.fromkeys(answers[0])) == answers[1], text
            read += 1
        else:
            assert not isinstance(answers[0], list), f"prepare reads what classify refuses: {text!r}, {answers}"
    assert read > 5


def _header(names: Sequence[str], width: int, chance: random.Random) -> list[str]:
    return [*(["uri", "label"] if chance.random() < 0.7 else []), *chance.choices(names, k=width)][:width]


def _joined(rows: Sequence[Sequence[str]], chance: random.Random) -> str:
    delimiter, end = chance.choice([",", ",", ",", ";", "\t"]), chance.choice(["\n", "\n", "\r\n", "\r"])
    return end.join(delimiter.join(row) for row in rows)


def _answer(read: object, place: str) -> list[str] | str:
    try:
        return read(place)  # type: ignore[operator, no-any-return]
    except CarrayError as err:
        assert "\n" not in str(err)
        return str(err)

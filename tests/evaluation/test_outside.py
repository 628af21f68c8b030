"""What counts as an outside image, of which kind and source."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.storage import write_bytes
from carray.evaluation.outside import list_outside, outside_fingerprint


def test_a_folder_is_one_kind_and_every_image_its_own_source(image_folder: Path) -> None:
    (image_folder / "notes.txt").write_text("no image")
    rows = list_outside(str(image_folder))
    assert len(rows) == 12
    assert set(rows["kind"]) == {"outside"}
    assert rows["source"].tolist() == rows["uri"].tolist() == sorted(rows["uri"])


def test_a_table_says_kinds_and_sources_and_lies_beside_its_images(tmp_path: Path) -> None:
    table = tmp_path / "outside.parquet"
    rows = {"uri": ["tiles/a.png", "/elsewhere/b.png", "s3://bucket/c.png"], "kind": ["photo", None, "drawn"]}
    pd.DataFrame(rows | {"source": ["cat", None, "page"]}).to_parquet(table)
    found = list_outside(str(table))
    assert found["uri"].tolist() == [f"{tmp_path}/tiles/a.png", "/elsewhere/b.png", "s3://bucket/c.png"]
    assert found["kind"].tolist() == ["photo", "outside", "drawn"]
    assert found["source"].tolist() == ["cat", "/elsewhere/b.png", "page"]
    pd.DataFrame({"uri": ["a.png"]}).to_parquet(table)
    assert list_outside(str(table)).iloc[0].tolist() == [f"{tmp_path}/a.png", False, "outside", f"{tmp_path}/a.png"]


def test_a_prefix_in_s3_is_a_folder(s3: str, make_image) -> None:
    for i in range(3):
        write_bytes(f"{s3}/out/{i}.png", make_image(i, format="PNG"))
    assert list_outside(f"{s3}/out")["uri"].tolist() == [f"{s3}/out/{i}.png" for i in range(3)]


def test_the_fingerprint_knows_order_from_content(image_folder: Path) -> None:
    rows = list_outside(str(image_folder))
    assert outside_fingerprint(rows) == outside_fingerprint(rows.iloc[::-1])
    assert outside_fingerprint(rows) != outside_fingerprint(rows.assign(kind="other"))
    assert outside_fingerprint(rows) != outside_fingerprint(rows.head(11))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"path": ["a.png"]}, "lacks the column uri"),
        ({"uri": ["a.png", None]}, "1 rows without a uri"),
        ({"uri": list("abcdefg"), "kind": list("abcdefg")}, "has 7 kinds"),
        ({"uri": ["a.png"], "kind": ["inside"]}, "none may be named 'inside'"),
        ({"uri": pd.Series([], dtype=str)}, "holds no image"),
    ],
)
def test_an_unusable_table_is_a_sentence(tmp_path: Path, columns: dict, words: str) -> None:
    pd.DataFrame(columns).to_parquet(tmp_path / "outside.parquet")
    with pytest.raises(SchemaError, match=words):
        list_outside(str(tmp_path / "outside.parquet"))


def test_other_places_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="holds no image"):
        list_outside(str(tmp_path))
    with pytest.raises(StorageError, match="absent"):
        list_outside(str(tmp_path / "absent"))
    with pytest.raises(SettingsError, match="in Parquet"):
        list_outside(str(tmp_path / "outside.csv"))

"""prepare --balance: the training images a class are capped by content, nothing vanishes, val and test stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carray.core.tables import table_metadata
from carray.manifest.manifest_file import read_manifest
from carray.manifest.prepare import prepare
from carray.manifest.splits import cap_classes


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """Give class folders of 40, 6 and 2 different images."""
    random = np.random.default_rng(0)
    for label, count in (("common", 40), ("few", 6), ("rare", 2)):
        for i in range(count):
            path = tmp_path / "in" / label / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def table(sha256: str, *, label: str = "a", split: str = "train") -> pd.DataFrame:
    """Give readable rows, one a letter of `sha256`."""
    box = dict.fromkeys(["x1", "y1", "x2", "y2"], pd.array([pd.NA] * len(sha256), dtype="Int32"))
    texts = {"sha256": list(sha256), "label": label, "split": split, "status": "ok", "error_code": None, "error": None}
    uris = [f"/{i}" for i in range(len(sha256))]
    return pd.DataFrame({"uri": uris, **texts, **box}).astype(dict.fromkeys(["uri", *texts], "string"))


def stays(rows: pd.DataFrame, groups: list[int], *, balance: int, earlier: list[str | None] | None = None) -> str:
    changed = cap_classes(rows, groups, balance=balance, earlier=earlier)
    return "".join(sorted(changed.loc[changed["split"].notna(), "sha256"]))


def test_only_training_images_over_the_cap_lose_their_split(lopsided, tmp_path):
    prepare(str(lopsided), out=str(tmp_path / "whole.parquet"))
    report = prepare(str(lopsided), out=str(tmp_path / "capped.parquet"), balance=4)
    whole, capped = (read_manifest(str(tmp_path / f"{name}.parquet")) for name in ("whole", "capped"))
    train = capped.of_split("train")["label"].value_counts()
    before = whole.of_split("train")["label"].value_counts()
    assert before["common"] > 4
    assert train.to_dict() == {label: min(4, count) for label, count in before.items()}
    held_out = whole.rows["split"].isin(["val", "test"])
    assert held_out.sum() > 5
    pd.testing.assert_series_equal(whole.rows["split"][held_out], capped.rows["split"][held_out])
    assert capped.fingerprint != whole.fingerprint
    aside = capped.rows[capped.rows["split"].isna()]
    assert len(capped.rows) == 48
    assert (report.set_aside, report.balance) == (len(aside), 4) == (before.sum() - train.sum(), 4)
    assert table_metadata(str(tmp_path / "capped.parquet"))["balance"] == 4


def test_what_is_set_aside_says_so_and_stays_measured(lopsided, tmp_path):
    report = prepare(str(lopsided), out=str(tmp_path / "m.parquet"), balance=4)
    rows = read_manifest(str(tmp_path / "m.parquet")).rows
    aside = rows[rows["split"].isna()]
    assert set(aside["status"]) == {"ok"}
    assert set(aside["error_code"]) == {"set_aside"}
    total = len(aside[aside["label"] == "common"]) + 4
    assert f"'common' has {total} images to train on; balance keeps 4" in set(aside["error"])
    assert aside[["sha256", "width", "phash", "label"]].notna().all(axis=None)
    assert rows.loc[rows["split"].notna(), ["error_code", "error"]].isna().all(axis=None)
    assert f"set aside    {len(aside)} images over 4 train images a class" in report.text()
    assert (report.ok, report.errors, report.unlabelled) == (48, {}, 0)
    assert report.set_aside == len(aside)
    held_out = rows.loc[rows["split"].isin(["val", "test"]) & (rows["label"] == "common")]
    assert report.images_per_class["max"] == 4 + len(held_out)


def test_the_choice_follows_content_not_names(lopsided, tmp_path):
    prepare(str(lopsided), out=str(tmp_path / "a.parquet"), balance=4)
    for number, path in enumerate(sorted(lopsided.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"renamed {number:03d}.png"))
    prepare(str(lopsided), out=str(tmp_path / "b.parquet"), balance=4)
    first, second = (read_manifest(str(tmp_path / f"{name}.parquet")) for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert first.rows["sha256"].tolist() != second.rows["sha256"].tolist()


def test_a_cap_that_nobody_reaches_changes_nothing(lopsided, tmp_path):
    prepare(str(lopsided), out=str(tmp_path / "a.parquet"))
    report = prepare(str(lopsided), out=str(tmp_path / "b.parquet"), balance=40)
    assert report.set_aside == 0
    assert "set aside    0 images over 40" in report.text()
    assert (
        read_manifest(str(tmp_path / "a.parquet")).fingerprint == read_manifest(str(tmp_path / "b.parquet")).fingerprint
    )


def test_extending_with_the_same_cap_keeps_what_trained(lopsided, tmp_path):
    prepare(str(lopsided), out=str(tmp_path / "old.parquet"), balance=4)
    random = np.random.default_rng(1)
    for i in range(30):
        pixels_HWC = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels_HWC).save(lopsided / "common" / f"new {i}.png")
    shutil.copy(lopsided / "common" / "00.png", lopsided / "common" / "copy.png")
    new = str(tmp_path / "new.parquet")
    report = prepare(str(lopsided), out=new, extend=str(tmp_path / "old.parquet"), balance=4)
    trained = [read_manifest(path).of_split("train") for path in (str(tmp_path / "old.parquet"), new)]
    old_sha256, new_sha256 = (set(rows.loc[rows["label"] == "common", "sha256"]) for rows in trained)
    assert old_sha256 == new_sha256
    assert report.set_aside > 30
    # Without the cap, they come back to train, or go where the hash puts them.
    prepare(str(lopsided), out=new, extend=str(tmp_path / "old.parquet"))
    assert read_manifest(new).rows["split"].notna().all()
    assert old_sha256 < set(read_manifest(new).of_split("train")["sha256"])


def test_lowest_hashes_stay_whatever_the_order():
    rows = table("dbac")
    assert stays(rows, [0, 1, 2, 3], balance=2) == "ab"
    assert stays(rows.iloc[::-1].reset_index(drop=True), [3, 2, 1, 0], balance=2) == "ab"


def test_different_pictures_stay_before_second_copies():
    assert stays(table("aabcd"), [0, 0, 1, 2, 3], balance=3) == "abc"
    assert stays(table("aabcd"), [0, 0, 0, 1, 2], balance=3) == "acd"
    assert stays(table("aab"), [0, 0, 1], balance=3) == "aab"


def test_classes_are_capped_each_on_its_own_and_other_splits_are_not():
    rows = pd.concat([table("abc"), table("def", label="b"), table("ghi", split="val")], ignore_index=True)
    assert stays(rows, list(range(9)), balance=1) == "adghi"


def test_images_that_trained_before_stay_before_new_ones():
    assert stays(table("abcd"), [0, 1, 2, 3], balance=2, earlier=[None, None, "train", "train"]) == "cd"
    assert stays(table("abcd"), [0, 1, 2, 3], balance=3, earlier=[None, None, "train", "train"]) == "acd"

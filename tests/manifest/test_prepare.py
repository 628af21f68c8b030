"""prepare: one row an image whatever its state, splits kept, and a report that says what is wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import write_bytes
from carray.core.tables import table_metadata
from carray.images.pixels import PixelSettings, decode
from carray.manifest.manifest_file import MANIFEST_SCHEMA, read_manifest
from carray.manifest.prepare import prepare
from carray.manifest.splits import SplitSettings
from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_dataset


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """Give class folders with 8 drawn images a class; not to be changed."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder, images_per_class=8)
    return folder


@pytest.fixture
def source(drawn, tmp_path) -> Path:
    """Give a copy of the drawn class folders that a test may change."""
    return Path(shutil.copytree(drawn, tmp_path / "source"))


def split_by_sha256(manifest: str) -> dict[str, str]:
    rows = read_manifest(manifest).rows
    return dict(zip(rows["sha256"], rows["split"], strict=True))


def test_rows_hold_what_the_files_hold(drawn, tmp_path):
    out = str(tmp_path / "new" / "manifest.parquet")
    report = prepare(str(drawn), out=out, workers=3)
    manifest = read_manifest(out)
    assert manifest.rows.columns.tolist() == MANIFEST_SCHEMA.names
    assert (len(manifest.rows), manifest.classes) == (48, sorted(DEMO_CLASSES))
    assert manifest.split_counts() == report.splits
    assert sum(report.splits.values()) == 48
    for row in manifest.rows.sample(5, random_state=0).itertuples():
        data = Path(row.uri).read_bytes()
        with Image.open(row.uri) as image:
            assert (row.width, row.height) == image.size
        assert row.size_bytes == len(data)
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        assert row.phash == decode(data, PixelSettings()).phash
        assert row.label == Path(row.uri).parent.name
    note = table_metadata(out)
    assert note["source"] == str(drawn)
    assert note["layout"] == "folder"
    assert note["split"] == {"val_fraction": 0.15, "test_fraction": 0.15, "salt": ""}
    assert note["created_at"] and note["carray"]


def test_same_source_gives_the_same_manifest_from_s3(drawn, s3, tmp_path):
    for path in drawn.rglob("*.jpg"):
        write_bytes(f"{s3}/cars/{path.relative_to(drawn)}", path.read_bytes())
    prepare(str(drawn), out=str(tmp_path / "local.parquet"))
    prepare(f"{s3}/cars", out=f"{s3}/manifest.parquet")
    local, remote = read_manifest(str(tmp_path / "local.parquet")), read_manifest(f"{s3}/manifest.parquet")
    assert local.fingerprint == remote.fingerprint
    same = ["label", "split", "status", "size_bytes", "width", "height", "sha256", "phash"]
    pd.testing.assert_frame_equal(local.rows[same], remote.rows[same])
    assert remote.rows["uri"].iloc[0] == f"{s3}/cars/{DEMO_CLASSES[1]}/0000.jpg"
    assert remote.rows["etag"].notna().all()


def test_broken_images_are_rows_with_their_reason(source, tmp_path):
    expected = draw_broken_files(source / "Odd Files 2000")
    (source / "Odd Files 2000" / "notes.txt").write_text("no image")
    (source / "Odd Files 2000" / "dangling.jpg").symlink_to(tmp_path / "nothing")
    report = prepare(str(source), out=str(tmp_path / "m.parquet"))
    rows = read_manifest(str(tmp_path / "m.parquet")).rows
    odd = rows[rows["label"] == "Odd Files 2000"]
    found = {os.path.basename(row.uri): "ok" if row.status == "ok" else row.error_code for row in odd.itertuples()}
    assert found == {**expected, "dangling.jpg": "not_found"}
    failed = odd[odd["status"] != "ok"]
    assert failed[["error", "status"]].notna().all(axis=None)
    assert failed["split"].isna().all()
    assert set(failed["status"]) == {"fetch_error", "decode_error"}
    assert report.errors == {"empty": 1, "truncated": 1, "unsupported": 1, "too_large": 1, "not_found": 1}
    assert report.candidates.skipped == {".txt": 1}
    assert (report.rows, report.ok) == (48 + len(expected) + 1, 48 + len(expected) - 4)
    assert "7.4% of the images cannot be read" in report.verdict


def test_hashes_stay_exact_beside_an_unreadable_image(source, tmp_path):
    """A null beside it must not turn a 64-bit integer into a float of 53 bits."""
    (source / DEMO_CLASSES[0] / "empty.jpg").touch()
    prepare(str(source), out=str(tmp_path / "manifest.parquet"))
    rows = read_manifest(str(tmp_path / "manifest.parquet")).rows.query("status == 'ok'")
    for row in rows.head(5).to_dict("records"):
        assert int(row["phash"]) == decode(Path(row["uri"]).read_bytes(), PixelSettings()).phash


def test_unreadable_source_is_a_manifest_all_the_same(tmp_path):
    for i in range(3):
        write_bytes(str(tmp_path / "in" / "Cat" / f"{i}.jpg"), b"nothing")
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert report.verdict == "Not usable for tune: none of its 3 images could be read."
    assert len(read_manifest(str(tmp_path / "m.parquet")).rows) == 3
    assert "unsupported 3" in report.text()


def test_crop_boxes_hash_the_box_and_refuse_a_box_outside(drawn, tmp_path):
    image = next((drawn / DEMO_CLASSES[0]).glob("*.jpg"))
    table = tmp_path / "t.csv"
    table.write_text(f"uri,label,x1,y1,x2,y2\n{image},A,0,0,80,80\n{image},B,90,40,200,140\n{image},C,5000,0,5100,9\n")
    whole = prepare(str(table), out=str(tmp_path / "whole.parquet"))
    cropped = prepare(str(table), out=str(tmp_path / "cropped.parquet"), crop_boxes=True)
    rows = read_manifest(str(tmp_path / "cropped.parquet"))
    assert rows.crop_boxes
    assert not read_manifest(str(tmp_path / "whole.parquet")).crop_boxes
    assert rows.rows["error_code"].fillna("").tolist() == ["", "", "bad_box"]
    assert rows.rows["phash"].iloc[0] != rows.rows["phash"].iloc[1]
    assert rows.rows["split"].iloc[0] == rows.rows["split"].iloc[1]
    assert (whole.ok, whole.exact_groups, len(whole.conflicting)) == (3, 1, 1)
    assert (cropped.ok, cropped.exact_groups, len(cropped.conflicting)) == (2, 0, 0)


def test_copies_and_shrunk_copies_share_a_split_and_are_reported(source, tmp_path):
    names = sorted((source / DEMO_CLASSES[0]).glob("*.jpg"))
    for i, path in enumerate(names):
        shutil.copy(path, path.with_name(f"copy {i}.jpg"))
        with Image.open(path) as image:
            image.resize((image.width * 2 // 3, image.height * 2 // 3)).save(path.with_name(f"small {i}.png"))
    shutil.copy(names[0], source / DEMO_CLASSES[1] / "stray.jpg")
    report = prepare(str(source), out=str(tmp_path / "m.parquet"))
    rows = read_manifest(str(tmp_path / "m.parquet")).rows
    splits = {os.path.basename(row.uri): row.split for row in rows.itertuples() if DEMO_CLASSES[0] in row.uri}
    for i, path in enumerate(names):
        assert splits[path.name] == splits[f"copy {i}.jpg"] == splits[f"small {i}.png"]
    assert (report.exact_groups, report.near_groups, report.crossing) == (8, 8, [])
    (conflict,) = report.conflicting
    assert set(conflict.values()) == set(DEMO_CLASSES[:2])
    assert len(conflict) == 3


def test_duplicates_across_a_given_test_split_stay_and_are_reported(drawn, tmp_path):
    for label in DEMO_CLASSES[:2]:
        for path in sorted((drawn / label).glob("*.jpg")):
            split = "test" if path.name < "0003" else "train"
            write_bytes(str(tmp_path / "in" / split / label / path.name), path.read_bytes())
    stray = tmp_path / "in" / "train" / DEMO_CLASSES[0] / "stray.jpg"
    shutil.copy(drawn / DEMO_CLASSES[0] / "0001.jpg", stray)
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert report.splits["test"] == 6
    assert report.exact_groups == 1
    (crossing,) = report.crossing
    assert set(crossing) == {str(stray), str(tmp_path / "in" / "test" / DEMO_CLASSES[0] / "0001.jpg")}
    assert crossing[str(stray)] in ("train", "val")
    assert "duplicates cross splits in 1 group, so scores flatter" in report.verdict


def test_extend_keeps_every_split_and_counts_what_is_gone(source, tmp_path):
    salted = SplitSettings(salt="first")
    prepare(str(source), out=str(tmp_path / "old.parquet"), split=salted)
    old = split_by_sha256(str(tmp_path / "old.parquet"))
    gone = next((source / DEMO_CLASSES[2]).glob("*.jpg"))
    with Image.open(gone) as image:
        image.save(gone.with_name("again.png"))
    gone.unlink()
    moved = next((source / DEMO_CLASSES[3]).glob("*.jpg"))
    moved.rename(moved.with_name("moved.jpg"))
    draw_dataset(source / "more", images_per_class=2, seed=9)
    report = prepare(str(source), out=str(tmp_path / "new.parquet"), extend=str(tmp_path / "old.parquet"))
    manifest = read_manifest(str(tmp_path / "new.parquet"))
    new = split_by_sha256(str(tmp_path / "new.parquet"))
    assert all(new[sha256] == split for sha256, split in old.items() if sha256 in new)
    assert len(old.keys() & new.keys()) == 47
    again = manifest.rows.loc[manifest.rows["uri"].str.endswith("again.png"), "split"].iloc[0]
    absent = (old.keys() - new.keys()).pop()
    assert again == old[absent]
    assert (report.extended, report.old_rows_absent) == (str(tmp_path / "old.parquet"), 1)
    assert "1 old row not in this source" in report.text()


def test_extending_something_else_is_refused_before_anything_is_opened(drawn, tmp_path):
    pd.DataFrame({"uri": ["a"], "label": ["b"]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(SchemaError, match="lacks the column escaped"):
        prepare(str(drawn), out=str(tmp_path / "m.parquet"), extend=str(tmp_path / "other.parquet"))
    with pytest.raises(StorageError, match="does not exist"):
        prepare(str(drawn), out=str(tmp_path / "m.parquet"), extend=str(tmp_path / "absent.parquet"))
    assert not (tmp_path / "m.parquet").exists()


def test_wrong_settings_are_one_sentence(drawn, tmp_path):
    with pytest.raises(SettingsError, match="balance is 0, but must be at least 1; leave it out"):
        prepare(str(drawn), out=str(tmp_path / "m.parquet"), balance=0)
    with pytest.raises(SettingsError, match="workers is 0, but must be at least 1"):
        prepare(str(drawn), out=str(tmp_path / "m.parquet"), workers=0)
    with pytest.raises(SettingsError, match="is a folder; name the manifest's file"):
        prepare(str(drawn), out=str(tmp_path))


def test_report_judges_rare_and_lopsided_classes(tmp_path):
    rng = np.random.default_rng(0)

    def write(label: str, count: int) -> None:
        for i in range(count):
            path = tmp_path / "in" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)

    for label, count in (("common", 45), ("few", 3), ("two", 2), ("single", 1)):
        write(label, count)
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert report.images_per_class == {"min": 1, "median": 2.5, "max": 45}
    assert report.classes["images"].to_dict() == {"common": 45, "few": 3, "single": 1, "two": 2}
    assert (report.classes["train"] > 0).all()
    assert report.classes.loc["few", "val"] > 0
    assert report.classes.loc["single", "val"] == 0
    assert "one image    single" in report.text()
    assert report.sizes["width"] == dict.fromkeys(["min", "p5", "median", "p95", "max"], 32.0)
    assert "the largest class has over 10 times" in report.verdict
    assert "1 class with one image" in report.verdict
    assert report.verdict == report.text().splitlines()[-1]
    assert report.unusable is None


def test_report_of_one_class_or_of_no_label_says_why_it_cannot_be_tuned(drawn, tmp_path):
    one = prepare(str(drawn), out=str(tmp_path / "a.parquet"), layout="images")
    assert "no readable image has a label" in one.verdict
    table = tmp_path / "t.csv"
    table.write_text("uri,label\n" + "".join(f"{path},car\n" for path in drawn.rglob("*.jpg")))
    assert "it has one class" in prepare(str(table), out=str(tmp_path / "b.parquet")).verdict


def test_names_that_are_not_utf8_are_read(drawn, tmp_path):
    folder = os.fsencode(tmp_path) + b"/in/100% Cat"
    os.makedirs(folder)
    data = next(drawn.rglob("*.jpg")).read_bytes()
    with open(folder + b"/caf\xe9.jpg", "wb") as file:
        file.write(data)
    prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    (row,) = read_manifest(str(tmp_path / "m.parquet")).rows.to_dict("records")
    assert (row["status"], row["label"], row["escaped"]) == ("ok", "100% Cat", True)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()


def test_real_photographs(cars, tmp_path):
    names = pd.Series(sorted(path.name for path in (cars / "cars_train").glob("*.jpg"))[:120])
    table = tmp_path / "t.csv"
    pd.DataFrame({"uri": str(cars) + "/cars_train/" + names, "label": ["a", "b"] * 60}).to_csv(table, index=False)
    report = prepare(str(table), out=str(tmp_path / "m.parquet"))
    assert (report.ok, report.near_groups) == (120, 0)
    assert report.splits["train"] > report.splits["val"] > 5


def labelled_table(drawn: Path, tmp_path: Path, labels: list[str], name: str = "t.csv", **columns: list[object]) -> str:
    """Write a table of as many drawn images as there are labels."""
    files = sorted(map(str, drawn.rglob("*.jpg")))[: len(labels)]
    pd.DataFrame({"uri": files, "label": labels, **columns}).to_csv(tmp_path / name, index=False)
    return str(tmp_path / name)


def test_labels_get_one_spelling_and_what_looks_wrong_is_named(drawn, tmp_path):
    spellings = ["Audi A4", "Audi A4 ", "\u00a0Audi  A4", "Audi\u00a0A4\n", "Citroën", "Citroe\u0308n", " ", ""]
    alike = ["audi a4", "None", "N/A", "01", "1", "1.0"]
    table = labelled_table(drawn, tmp_path, spellings + alike, split=["test"] * 14)
    report = prepare(table, out=str(tmp_path / "m.parquet"))
    manifest = read_manifest(str(tmp_path / "m.parquet"))
    assert manifest.classes == ["01", "1", "1.0", "Audi A4", "Citroën", "N/A", "None", "audi a4"]
    assert manifest.rows["label"].value_counts()[["Audi A4", "Citroën"]].tolist() == [4, 2]
    assert manifest.rows.loc[manifest.rows["label"].isna(), "split"].isna().tolist() == [True, True]
    assert (report.unlabelled, report.candidates.label_changes) == (2, {"blanks": 3, "unicode form": 1, "blank": 1})
    assert "normalised: " in report.text() and "blanks 3" in report.text()
    concerns = "; ".join(report.concerns)
    assert "2 groups of classes whose names look alike (01, 1, 1.0; Audi A4, audi a4)" in concerns
    assert "classes that look like a missing label (N/A, None)" in concerns


def test_folders_get_the_same_spelling_as_tables(drawn, tmp_path):
    images = sorted(drawn.rglob("*.jpg"))
    for image, label in zip(images, ["Cat", "Cat ", "CAT", "Citroën", "Citroe\u0308n"], strict=False):
        (tmp_path / "in" / label).mkdir(parents=True)
        shutil.copy(image, tmp_path / "in" / label)
    report = prepare(str(tmp_path / "in"), out=str(tmp_path / "m.parquet"))
    assert read_manifest(str(tmp_path / "m.parquet")).classes == ["CAT", "Cat", "Citroën"]
    assert "1 group of classes whose names look alike (CAT, Cat)" in report.verdict
    assert read_manifest(str(tmp_path / "m.parquet")).rows["status"].eq("ok").all(), "a label is no path"


@pytest.mark.parametrize(
    ("box", "counts", "concern"),
    [
        ((5, 5, 60, 40), {"images": 12, "clamped": 0, "one pixel": 0, "within 0 to 1": 0}, None),
        (
            (-5, 5, 6_000, 40),
            {"images": 12, "clamped": 12, "one pixel": 0, "within 0 to 1": 0},
            "12 boxes reached beyond",
        ),
        ((5, 5, 6, 40), {"images": 12, "clamped": 0, "one pixel": 12, "within 0 to 1": 0}, "12 boxes one pixel wide"),
        ((0, 0, 1, 1), {"images": 12, "clamped": 0, "one pixel": 12, "within 0 to 1": 12}, "probably fractions"),
        ((50, 50, 20, 20), {}, "12 boxes of no pixel of their image (x2 and y2 are the far corner"),
    ],
)
def test_boxes_that_look_wrong_are_counted(drawn, tmp_path, box, counts, concern):
    corners = {name: [corner] * 12 for name, corner in zip(["x1", "y1", "x2", "y2"], box, strict=True)}
    report = prepare(
        labelled_table(drawn, tmp_path, ["a", "b"] * 6, **corners), out=str(tmp_path / "m.parquet"), crop_boxes=True
    )
    assert report.boxes == counts
    if concern is None:
        assert "box" not in report.verdict
    else:
        assert concern in report.verdict


def test_a_box_that_is_not_needed_is_left_out_and_said(drawn, tmp_path):
    corners = {"x1": [0.5] * 12, "y1": [0] * 12, "x2": [9] * 12, "y2": [9] * 12}
    table = labelled_table(drawn, tmp_path, ["a", "b"] * 6, **corners)
    report = prepare(table, out=str(tmp_path / "m.parquet"))
    assert report.unusable is None and "boxes        left out: " in report.text() and "has '0.5' as x1" in report.text()
    with pytest.raises(SchemaError, match="t.csv, line 2, has '0.5' as x1"):
        prepare(table, out=str(tmp_path / "m.parquet"), crop_boxes=True)


def test_extending_says_which_images_changed_their_label(drawn, tmp_path):
    old, new = str(tmp_path / "old.parquet"), str(tmp_path / "new.parquet")
    prepare(labelled_table(drawn, tmp_path, ["a", "b", "c"] * 4), out=old)
    report = prepare(labelled_table(drawn, tmp_path, [" a", "c", "b"] * 4), out=new, extend=old)
    assert read_manifest(new).rows["label"].tolist() == ["a", "c", "b"] * 4, "the new table's labels hold"
    assert split_by_sha256(new) == split_by_sha256(old)
    assert len(report.changed_labels) == 8 and report.changed_labels[0].endswith(": b -> c")
    assert f"8 images labelled otherwise in {old}" in report.verdict
    assert prepare(labelled_table(drawn, tmp_path, ["a", "c", "b"] * 4), out=old, extend=new).changed_labels == []


def test_column_names_are_settled_by_hand(drawn, tmp_path):
    table = labelled_table(drawn, tmp_path, ["a", "b"] * 6, path=["nowhere"] * 12, kind=["x", "y"] * 6)
    prepare(table, out=str(tmp_path / "m.parquet"), column={"label": "kind"})
    assert read_manifest(str(tmp_path / "m.parquet")).classes == ["x", "y"]
    with pytest.raises(SettingsError, match="column is {'uri': 'path'}, but .* is no table"):
        prepare(str(drawn), out=str(tmp_path / "m.parquet"), column={"uri": "path"})

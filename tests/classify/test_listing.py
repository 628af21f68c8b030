"""Sources of images, and their cut into shards: every image once, nothing left out uncounted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from carray.bundle.bundle_folder import open_bundle
from carray.classify.plan import describe_run, plan_run
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import ShardCutter, read_notes, read_shard, shard_images, uncovered
from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import join, write_bytes
from carray.core.store.listing import Piece
from carray.manifest.manifest_file import MANIFEST_SCHEMA, write_manifest

PLAIN = ClassifySettings()


@pytest.fixture
def images(small_bundle, tmp_path):
    """Give a function that plans a run and reads its shards: source -> (its images, what was listed)."""

    def plan(source, settings=PLAIN, *, uses_boxes=False):
        out = str(tmp_path / f"plan-{len(list(tmp_path.iterdir()))}")
        wanted = describe_run(open_bundle(small_bundle), small_bundle, str(source), settings)
        _, totals = plan_run(out, wanted, settings, uses_boxes=uses_boxes)
        return [image for shard in range(totals.shards) for image in read_shard(out, shard)], totals

    return plan


def test_folder_counts_what_is_no_image(image_folder, images):
    for name in ("readme.txt", "x.TXT", "noext", "a/b.json"):
        (image_folder / name).write_bytes(b"x")
    found, listing = images(image_folder)
    assert len(found) == 12
    assert listing.skipped_by_suffix == {"txt": 2, "(none)": 1, "json": 1}
    everything, listing = images(image_folder, ClassifySettings(all_files=True))
    assert (len(everything), listing.skipped_by_suffix) == (16, {})


def test_table_with_relative_and_repeated_uris(tmp_path, image_folder, images):
    other = tmp_path / "elsewhere.jpg"
    uris = ["images/b/00.jpg", str(other), "images/b/../b/00.jpg", "s3://bucket/a//b.jpg", str(other), "NA"]
    pd.DataFrame({"uri": uris, "note": 1}).to_csv(tmp_path / "list.csv", index=False)
    pd.DataFrame({"uri": uris}).to_parquet(tmp_path / "list.parquet")
    expected = [f"{tmp_path}/images/b/00.jpg", str(other), "s3://bucket/a//b.jpg", f"{tmp_path}/NA"]
    for name in ("list.csv", "list.parquet"):
        found, listing = images(tmp_path / name)
        assert [image.uri for image in found] == expected, "a table is taken whole, whatever its suffixes"
        assert listing.repeated == 2


def test_table_on_s3_is_relative_to_its_prefix(s3, images):
    write_bytes(join(s3, "tables", "list.csv"), b"uri\na b.jpg\ns3://other/c.jpg\n")
    found, _ = images(join(s3, "tables", "list.csv"))
    assert [image.uri for image in found] == [join(s3, "tables", "a b.jpg"), "s3://other/c.jpg"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name\na.jpg\n", "lacks the column uri; its first line has name; .*--column uri=NAME"),
        ("uri,n\na.jpg,1\n,2\n", "line 3, has no uri"),
        ("uri\ns3://bucket\n", "line 2: .* is a bucket and not an image"),
        ("", "is empty; the first line of a table names its columns"),
    ],
)
def test_unusable_tables(tmp_path, text, reason, images):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(SchemaError, match=reason):
        images(tmp_path / "list.csv")


@pytest.fixture
def manifest(tmp_path):
    """Write four rows: two boxes of one image, one image without a box, one in another split."""
    rows = pd.DataFrame({"uri": ["/i/a.jpg", "/i/a.jpg", "/i/b.jpg", "/i/c%FF.jpg"]})
    rows = rows.reindex(columns=MANIFEST_SCHEMA.names)
    rows["split"] = ["test", "test", "test", "train"]
    rows["escaped"] = [False, False, False, True]
    for i, name in enumerate(["x1", "y1", "x2", "y2"]):
        rows[name] = pd.array([i, i + 10, None, None], dtype="Int32")
    write_manifest(rows, str(tmp_path / "manifest.parquet"), classes=["x"], crop_boxes=True)
    return tmp_path / "manifest.parquet"


def test_boxes_count_only_for_a_bundle_that_wants_them(manifest, images):
    found, listing = images(manifest, uses_boxes=True)
    assert [image.box for image in found] == [(0, 1, 2, 3), (10, 11, 12, 13), None, None]
    assert listing.repeated == 0
    found, listing = images(manifest, uses_boxes=False)
    assert [(image.uri, image.box) for image in found] == [(f"/i/{n}", None) for n in ("a.jpg", "b.jpg", "c%FF.jpg")]
    assert listing.repeated == 1
    assert [image.escaped for image in found] == [False, False, True]


def test_an_incomplete_box_is_no_box_at_all(tmp_path, images):
    (tmp_path / "list.tsv").write_text("\ufeffuri\tx1\ty1\tx2\ty2\na.jpg\t1\t2\t3\t4\nb.jpg\t1\t2\t3\t\n")
    with pytest.raises(SchemaError, match="line 3, has an incomplete box"):
        images(tmp_path / "list.tsv", uses_boxes=True)
    assert len(images(tmp_path / "list.tsv")[0]) == 2, "a bundle without boxes does not look at them"


def test_split(manifest, image_folder, tmp_path, images):
    found, _ = images(manifest, ClassifySettings(split="train"))
    assert [image.uri for image in found] == ["/i/c%FF.jpg"]
    with pytest.raises(SettingsError, match="split is 'test', but .* is no manifest"):
        images(image_folder, ClassifySettings(split="test"))
    (tmp_path / "list.csv").write_text("uri\na.jpg\n")
    with pytest.raises(SettingsError, match="has no column split"):
        images(tmp_path / "list.csv", ClassifySettings(split="test"))


def test_no_image_at_all(tmp_path, begin_run, manifest):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "a.txt").write_text("x")
    with pytest.raises(SettingsError, match=r"has no image to score, but 1 other files \(1 txt\); images end in jpg"):
        begin_run(tmp_path / "papers")
    with pytest.raises(SettingsError, match="has no image to score in split 'val'"):
        begin_run(manifest, split="val")


def test_absent_source(tmp_path, images):
    for name in ("absent", "absent.csv", "absent.parquet"):
        with pytest.raises(StorageError, match="absent"):
            images(tmp_path / name)


def cut_shards(out, count, *, page=1_000, settings=PLAIN, notes=None, workers=1):
    """Cut `count` numbered images, every seventh name that of no image, as pages of one range."""
    cutter = ShardCutter(out, settings, by_suffix=True, notes=notes or {}, begin=lambda: None, workers=workers)
    names = [f"s3://b/{i:06d}.{'jpg' if i % 7 else 'txt'}" for i in range(count)]
    after = ""
    for start in range(0, max(count, 1), page):
        keys = names[start : start + page]
        last = start + page >= count
        upto = None if last else keys[-1]
        cutter.take(Piece(0, pa.record_batch({"uri": pa.array(keys, pa.string())}), keys, after, upto, last))
        after = upto
    cutter.finish()
    return cutter, names


@pytest.mark.parametrize("count", [0, 1, 75, 76, 815, 12_000])
def test_every_image_is_in_exactly_one_shard(tmp_path, count):
    cutter, names = cut_shards(str(tmp_path), count)
    found = [image.uri for shard in range(cutter.shards) for image in read_shard(str(tmp_path), shard)]
    assert found == [name for name in names if name.endswith("jpg")]
    assert cutter.cut_images == len(found)
    assert cutter.skipped.total() == count - len(found)
    notes = read_notes(str(tmp_path))
    assert sum(note.images for note in notes.values()) == len(found)
    assert uncovered(notes.values()) == ([] if found else [("", None)])


@pytest.mark.parametrize(("workers", "sizes"), [(1, [64, 36]), (2, [50, 50]), (3, [34, 34, 32]), (64, [8] * 12 + [4])])
def test_a_short_listing_has_something_for_every_worker(tmp_path, workers, sizes):
    cutter, _ = cut_shards(str(tmp_path), 117, workers=workers)
    assert [len(read_shard(str(tmp_path), shard)) for shard in range(cutter.shards)] == sizes


def test_what_a_lost_shard_covered_is_what_is_left(tmp_path):
    """Notes say of every cut, in the middle of a page too, what lies behind it: images, and keys that are none."""
    cutter, names = cut_shards(str(tmp_path), 3_000)
    (tmp_path / "_carray" / "shards" / "000007.arrow").unlink()
    notes = read_notes(str(tmp_path))
    assert sorted(notes) == [i for i in range(cutter.shards) if i != 7]
    ((after, upto),) = uncovered(notes.values())
    missing = [name for name in names if after < name <= upto]
    assert len([name for name in missing if name.endswith("jpg")]) == 64
    skipped = sum(note.skipped.total() for note in notes.values())
    assert skipped + len([name for name in missing if name.endswith("txt")]) == cutter.skipped.total()


def test_shards_grow_slowly_and_stop_growing():
    sizes, listed = [], 0
    while listed < 100_000_000:
        sizes.append(shard_images(listed, PLAIN))
        listed += sizes[-1]
    assert sizes[:13] == [64] * 13, "815 images keep two workers busy to the end"
    assert sizes == sorted(sizes)
    assert max(sizes) == 10_000
    assert len(sizes) < 11_000
    assert all(size <= max(64, np.cumsum(sizes)[i] / 64) for i, size in enumerate(sizes[:500]))


def test_shards_are_read_as_they_were_written(begin_run, broken_folder, images):
    run, _, out = begin_run(broken_folder, shard_images_first=4, shard_images_max=4)
    assert (run.images, run.shards) == (15, 4)
    found = [image for shard in range(run.shards) for image in read_shard(out, shard)]
    assert found == images(broken_folder)[0]
    assert sum(image.escaped for image in found) == 1


def test_out_among_the_files_to_score(begin_run, image_folder):
    with pytest.raises(SettingsError, match="whose every file is to be scored"):
        begin_run(image_folder, out=str(image_folder / "out"), all_files=True)

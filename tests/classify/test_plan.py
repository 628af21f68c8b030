"""A plan that grows while its source is listed, and goes on after an interruption: nothing twice, nothing lost."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from urllib.parse import quote_plus

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

from carray.bundle.bundle_folder import open_bundle, write_info
from carray.classify import shards as cutting
from carray.classify.ledger import check_folder, read_run, read_totals
from carray.classify.plan import describe_run, open_plan, plan_run
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.score_shard import ShardScorer
from carray.classify.shards import read_shard
from carray.core.errors import BundleError, SchemaError, SettingsError, StorageError
from carray.core.store.files import write_bytes
from carray.testing.list_server import Bucket, list_environment, start_lister

SMALL = {"shard_images_first": 50, "shard_images_max": 400}


@pytest.fixture
def planned(small_bundle, tmp_path):
    """Give a function that opens a plan: source -> its context."""

    def begin(source, *, out=str(tmp_path / "out"), **settings):
        chosen = ClassifySettings(**{**SMALL, **settings})
        wanted = describe_run(open_bundle(small_bundle), small_bundle, str(source), chosen)
        return open_plan(out, wanted, chosen, uses_boxes=False)

    return begin


def images_of(out, totals):
    return [image for shard in range(totals.shards) for image in read_shard(out, shard)]


@pytest.fixture
def made_up(monkeypatch):
    """Start a bucket of 30,500 made-up keys; gives its URIs."""
    with start_lister(30_500, "uuid") as endpoint:
        for name, value in list_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(30_500, "uuid")
        yield [f"s3://bucket/{bucket.key(n)}" for n in range(30_500)]


def test_shards_can_be_read_before_the_listing_ends(made_up, planned, tmp_path, monkeypatch):
    out, seen = str(tmp_path / "out"), []
    take = cutting.ShardCutter.take

    def slow_take(self, piece):
        if self.shards:
            assert seen or plan.wait(0, timeout_seconds=10)
            seen.append(plan.shards)
            assert not plan.complete and read_shard(out, 0)
        take(self, piece)

    monkeypatch.setattr(cutting.ShardCutter, "take", slow_take)
    with planned("s3://bucket") as plan:
        assert plan.wait(0)
        first = read_shard(out, 0)
        totals = plan.totals()
        assert plan.complete and (plan.shards, plan.images) == (totals.shards, totals.images) == (totals.shards, 30_500)
        assert plan.wait(10**9), "it has ended, so there is nothing to wait for"
    assert len(seen) > 5
    found = images_of(out, totals)
    assert sorted(image.uri for image in found) == made_up
    assert found[: len(first)] == first
    assert (first[0].uri, first[0].etag, first[0].size_bytes) == (made_up[0], f"{0:032x}", 100)
    assert read_totals(out) == totals


@pytest.mark.parametrize("stop_after", [1, 40])
def test_an_interrupted_listing_goes_on(made_up, planned, tmp_path, monkeypatch, stop_after):
    out, write = str(tmp_path / "out"), cutting.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(cutting, "write_bytes", lambda uri, data: (time.sleep(0.01), write(uri, data)))
        with planned("s3://bucket", listing_threads=4) as plan:
            assert plan.wait(stop_after - 1)
    assert not plan.complete and read_totals(out) is None
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "_carray" / "shards").glob("*.arrow")}
    assert len(before) >= stop_after
    (tmp_path / "out" / "_carray" / "shards" / "000000.arrow").unlink()  # as if its write had not ended
    with planned("s3://bucket", listing_threads=3, shard_images_max=333) as plan:
        totals = plan.totals()
    assert sorted(image.uri for image in images_of(out, totals)) == made_up
    after = {path.name: path.read_bytes() for path in (tmp_path / "out" / "_carray" / "shards").glob("*.arrow")}
    assert len(after) == totals.shards and totals.images == 30_500
    assert {name: after[name] for name in before if name != "000000.arrow"} == {
        name: data for name, data in before.items() if name != "000000.arrow"
    }
    with planned("s3://nowhere") as plan:
        assert plan.totals() == totals, "what is complete is not listed again"


LISTER = """
    import sys
    from carray.classify.predictions_folder import ClassifySettings
    from carray.classify.ledger import RunRecord
    from carray.classify.plan import plan_run

    wanted = RunRecord.model_validate_json(sys.argv[2])
    plan_run(sys.argv[1], wanted, ClassifySettings(), uses_boxes=False)
"""


def test_a_killed_listing_goes_on(small_bundle, tmp_path, monkeypatch):
    out, chosen = str(tmp_path / "out"), ClassifySettings()
    with start_lister(120_000, "dated") as endpoint:
        for name, value in list_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        wanted = describe_run(open_bundle(small_bundle), small_bundle, "s3://bucket", chosen)
        command = [sys.executable, "-c", textwrap.dedent(LISTER), out, wanted.model_dump_json()]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            folder = tmp_path / "out" / "_carray" / "shards"
            while process.poll() is None and len(list(folder.glob("*.arrow"))) < 60:
                time.sleep(0.002)
            process.kill()
        left = len(list(folder.glob("*.arrow")))
        assert read_totals(out) is None and left >= 60
        _, totals = plan_run(out, wanted, chosen, uses_boxes=False)
    bucket = Bucket(120_000, "dated")
    assert totals.shards > left
    assert sorted(image.uri for image in images_of(out, totals)) == [
        f"s3://bucket/{bucket.key(n)}" for n in range(120_000)
    ]


def test_an_error_in_the_middle_reaches_whoever_waits(made_up, planned, tmp_path, monkeypatch):
    write, written = cutting.write_bytes, []

    def full(uri, data):
        if len(written) == 20:
            raise StorageError("the disk is full.")
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(cutting, "write_bytes", full)
    with planned("s3://bucket") as plan, pytest.raises(StorageError, match="the disk is full"):
        plan.totals()
    monkeypatch.undo()
    assert read_run(str(tmp_path / "out")) is not None


def test_a_mistyped_source_leaves_nothing_behind(planned, tmp_path, image_folder):
    with pytest.raises(StorageError), planned(tmp_path / "absent") as plan:
        plan.totals()
    assert not (tmp_path / "out").exists()
    with planned(image_folder) as plan:
        assert plan.totals().images == 12


@pytest.fixture
def table(tmp_path):
    """Write 70,000 rows, every hundredth a repetition of the first, and give the URIs that are left."""
    rows = pd.DataFrame({"uri": [f"s3://b/{0 if i % 100 == 99 else i:06d}.jpg" for i in range(70_000)]})
    rows["etag"], rows["size_bytes"] = [f"e{i}" for i in range(len(rows))], np.arange(len(rows))
    rows.to_parquet(tmp_path / "table.parquet", row_group_size=10_000)
    rows.to_csv(tmp_path / "table.csv", index=False)
    return rows.drop_duplicates("uri")


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_table_is_streamed_and_gone_on_with(planned, table, tmp_path, monkeypatch, form):
    out, source = str(tmp_path / "out"), tmp_path / f"table.{form}"
    write = cutting.write_bytes

    def interrupted(uri, data):
        if uri.endswith("000030.arrow"):
            raise StorageError("gone.")
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(cutting, "write_bytes", interrupted)
        with pytest.raises(StorageError, match="gone"), planned(source) as plan:
            plan.totals()
    with planned(source) as plan:
        totals = plan.totals()
    assert (totals.images, totals.repeated) == (69_300, 700)
    found = images_of(out, totals)
    assert [image.uri for image in found] == table["uri"].tolist()
    assert [image.size_bytes for image in found] == table["size_bytes"].tolist()
    assert [image.etag for image in found] == table["etag"].tolist()


@pytest.mark.parametrize("rows", [1, 29, 58, 100, 300])
def test_a_short_table_is_cut_for_several_workers(small_bundle, tmp_path, rows):
    source = tmp_path / "few.csv"
    source.write_text("uri\n" + "".join(f"s3://b/{i}.jpg\n" for i in range(rows)))
    settings = ClassifySettings()
    wanted = describe_run(open_bundle(small_bundle), small_bundle, str(source), settings)
    with open_plan(str(tmp_path / "out"), wanted, settings, uses_boxes=False, workers=2) as plan:
        totals = plan.totals()
    found = [image.uri for image in images_of(str(tmp_path / "out"), totals)]
    assert found == [f"s3://b/{i}.jpg" for i in range(rows)]


def test_a_table_that_changed_in_between_is_refused(planned, table, tmp_path):
    source = tmp_path / "table.parquet"
    with planned(source) as plan:
        plan.totals()
    os.unlink(tmp_path / "out" / "_carray" / "listing.json")
    os.utime(source, (1, 1))
    with pytest.raises(SettingsError, match="has changed since its listing into .* was interrupted"), planned(source):
        pass


def write_inventory(folder, form, rows, *, md5=None):
    """Write an inventory as S3 lays it out: a dated folder with the manifest, beside `data/`; two files."""
    names = {"Bucket": "bucket", "Key": "key", "IsLatest": "is_latest", "IsDeleteMarker": "is_delete_marker"}
    names |= {"Size": "size", "ETag": "e_tag"}
    files = []
    for i, half in enumerate([rows[:2], rows[2:]]):
        table = pa.table({names[name]: [row[name] for row in half] for name in names})
        path = folder / "data" / f"{i}.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "csv":
            with gzip.open(path, "wt", newline="") as file:
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows([list(row.values()) for row in half])
        elif form == "parquet":
            pq.write_table(table, path)
        else:
            pa.orc.write_table(table, path)
        found = md5 or hashlib.md5(path.read_bytes()).hexdigest()
        files.append({"key": f"inv/b/daily/data/{path.name}", "size": 1, "MD5checksum": found})
    manifest = {"sourceBucket": "b", "destinationBucket": "arn:aws:s3:::lists", "fileFormat": form.upper()}
    manifest |= {"fileSchema": ", ".join(names), "files": files}
    place = folder / "2026-01-01T00-00Z" / "manifest.json"
    write_bytes(str(place), json.dumps(manifest).encode())
    return place


@pytest.mark.parametrize("form", ["csv", "parquet", "orc"])
def test_an_inventory_lists_what_the_bucket_holds_now(planned, tmp_path, form):
    keys = ["a b/ü.jpg", 'c+d%20,"e".jpg', "old.jpg", "gone.jpg", "notes.txt", "NA.png"]
    rows = []
    for i, key in enumerate(keys):
        flags = {"IsLatest": key != "old.jpg", "IsDeleteMarker": key == "gone.jpg"}
        if form == "csv":
            flags = {name: str(flag).lower() for name, flag in flags.items()}
        name = quote_plus(key, safe="/") if form == "csv" else key
        rows.append({"Bucket": "b", "Key": name, **flags, "Size": 10 + i, "ETag": f"e{i}"})
    place = write_inventory(tmp_path, form, rows)
    with planned(place) as plan:
        totals = plan.totals()
    found = [(image.uri, image.etag, image.size_bytes) for image in images_of(str(tmp_path / "out"), totals)]
    assert found == [(f"s3://b/{keys[i]}", f"e{i}", 10 + i) for i in (0, 1, 5)]
    assert totals.skipped_by_suffix == {"txt": 1}


def test_inventories_that_are_none(planned, tmp_path):
    row = {"Bucket": "b", "Key": "a.jpg", "IsLatest": True, "IsDeleteMarker": False, "Size": 1, "ETag": "e"}
    place = write_inventory(tmp_path, "parquet", [row] * 3, md5="0" * 32)
    with pytest.raises(StorageError, match="but the inventory's manifest says 0000"), planned(place) as plan:
        plan.totals()
    place.write_text("{}")
    with pytest.raises(SchemaError, match="is no manifest of an S3 Inventory"), planned(place):
        pass
    with pytest.raises(SettingsError, match="split is 'test', but .* is no manifest"), planned(place, split="test"):
        pass


def test_plan_run_gives_what_is_there(planned, image_folder, small_bundle, tmp_path):
    chosen = ClassifySettings()
    wanted = describe_run(open_bundle(small_bundle), small_bundle, str(image_folder), chosen)
    run, totals = plan_run(str(tmp_path / "out"), wanted, chosen, uses_boxes=False)
    assert (run, totals.images) == (wanted, 12)
    later = wanted.model_copy(update={"created_at": "later"})
    assert plan_run(str(tmp_path / "out"), later, chosen, uses_boxes=False) == (run, totals)


@pytest.fixture
def bundle_of(small_bundle, tmp_path):
    """Give a function that copies the small bundle with another threshold: threshold -> its folder."""

    def copy(threshold):
        folder = str(tmp_path / f"bundle-{threshold}")
        shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
        write_info(folder, open_bundle(folder).model_copy(update={"accept_threshold": threshold}))
        return folder

    return copy


def test_one_run_has_one_threshold(bundle_of, image_folder, tmp_path):
    out, chosen = str(tmp_path / "out"), ClassifySettings()

    def wanted(threshold):
        bundle = bundle_of(threshold)
        return describe_run(open_bundle(bundle), bundle, str(image_folder), chosen)

    run, _ = plan_run(out, wanted(0.7), chosen, uses_boxes=False)
    assert run.accept_threshold == 0.7
    check_folder(out, wanted(0.7))
    for other in (0.8, None):
        with pytest.raises(SettingsError, match=f"holds another run .accept_threshold 0.7 instead of {other}."):
            check_folder(out, wanted(other))


def test_a_run_of_before_there_were_thresholds_goes_on_while_there_is_none(bundle_of, image_folder, tmp_path):
    out, chosen = str(tmp_path / "out"), ClassifySettings()
    bundle = bundle_of(None)
    wanted = describe_run(open_bundle(bundle), bundle, str(image_folder), chosen)
    plan_run(out, wanted, chosen, uses_boxes=False)
    place = tmp_path / "out" / "_carray" / "run.json"
    values = json.loads(place.read_text())
    del values["accept_threshold"]
    place.write_text(json.dumps(values))
    check_folder(out, wanted)
    bundle = bundle_of(0.5)
    with pytest.raises(SettingsError, match="accept_threshold None instead of 0.5"):
        check_folder(out, describe_run(open_bundle(bundle), bundle, str(image_folder), chosen))


def test_a_threshold_changed_under_a_run_stops_its_workers(bundle_of, image_folder, tmp_path):
    out, chosen, bundle = str(tmp_path / "out"), ClassifySettings(), bundle_of(0.7)
    wanted = describe_run(open_bundle(bundle), bundle, str(image_folder), chosen)
    run, _ = plan_run(out, wanted, chosen, uses_boxes=False)
    write_info(bundle, open_bundle(bundle).model_copy(update={"accept_threshold": 0.2}))
    with pytest.raises(BundleError, match="accepts labels from a score of 0.2, but the run was begun with 0.7"):
        ShardScorer(bundle, out=out, run=run, settings=chosen).score_shard(0)
    write_info(bundle, open_bundle(bundle).model_copy(update={"accept_threshold": 0.7}))
    ShardScorer(bundle, out=out, run=run, settings=chosen).score_shard(0)
    rows = pd.read_parquet(tmp_path / "out" / "part-000000.parquet")
    assert (rows["accept"] == (rows["score"] >= 0.7)).all() and rows["accept"].notna().all()


def test_a_held_listing_writes_nothing_until_its_run_is_settled(made_up, small_bundle, tmp_path):
    chosen, out = ClassifySettings(**SMALL), str(tmp_path / "held")
    wanted = describe_run(open_bundle(small_bundle), small_bundle, "s3://bucket", chosen)
    with open_plan(out, wanted, chosen, uses_boxes=False, hold=True) as plan:
        assert plan.is_long(30_000, timeout_seconds=60) and not plan.is_long(30_501, timeout_seconds=60)
        assert plan.shards == 0 and not Path(out).exists()
        settled = wanted.model_copy(update={"chosen_by": "measured"})
        plan.settle(settled)
        totals = plan.totals()
    assert read_run(out) == settled
    assert sorted(image.uri for image in images_of(out, totals)) == sorted(made_up)
    with open_plan(str(tmp_path / "left"), wanted, chosen, uses_boxes=False, hold=True):
        pass  # a job that is stopped before it has chosen
    assert not (tmp_path / "left").exists()

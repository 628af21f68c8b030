"""One shard: rows out are images in, whatever is broken; the pixels are training's; the dead are stepped over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from carray.bundle.bundle_folder import open_bundle
from carray.bundle.scorer import Scorer
from carray.classify import read_images, score_shard
from carray.classify.attempts import Attempt, AttemptFile
from carray.classify.ledger import count_rows, done_shards, entry_of_part, read_run, recover_ledger
from carray.classify.predictions_folder import PREDICTION_SCHEMA, ClassifySettings
from carray.core.errors import BudgetError, BundleError, StorageError
from carray.core.store.files import read_json
from carray.core.store.image_bytes import fetch_image
from carray.images.pixels import decode, view
from carray.images.read import ReadImage, read_image
from carray.queries import read_predictions
from carray.testing.fault_proxy import start_proxy


def test_every_file_is_a_row(score_all, broken_folder):
    rows = score_all(broken_folder, shard_images_first=5, batch_images=2).set_index("uri")
    assert len(rows) == len(os.listdir(broken_folder))
    seen = rows["status"].groupby(rows["error_code"].fillna("")).agg(["first", "size"]).to_dict("index")
    assert seen[""] == {"first": "ok", "size": 6}
    assert seen["not_found"] == {"first": "fetch_error", "size": 1}
    assert seen["empty"] == {"first": "decode_error", "size": 1}
    assert rows.loc[f"{broken_folder}/truncated.jpg", "error_code"] == "truncated"
    assert rows.loc[f"{broken_folder}/damaged.jpg", "error_code"] == "damaged"
    assert (rows["status"] == "decode_error").sum() == 8
    failed = rows[rows["status"] != "ok"]
    assert failed[["label", "score", "make", "phash", "width", "top5_labels"]].isna().all(axis=None)
    assert failed["error"].notna().all()
    assert rows.loc[f"{broken_folder}/empty.jpg", "size_bytes"] == 0


def test_rows_say_what_was_scored(score_all, image_folder, small_bundle):
    rows = score_all(image_folder)
    assert rows.columns.tolist() == PREDICTION_SCHEMA.names
    info = open_bundle(small_bundle)
    assert set(rows["label"]) <= set(info.classes)
    assert rows["score"].between(0.2, 1).all()
    assert rows["margin"].between(0, 1).all()
    assert [len(labels) for labels in rows["top5_labels"]] == [5] * 12
    assert np.allclose([scores.sum() for scores in rows["top5_scores"]], 1, atol=1e-5)
    assert (rows["width"] == 96).all() and (rows["height"] == 64).all()
    assert set(rows["bundle_id"]) == {info.bundle_id}
    assert set(rows["runtime"]) == {"fp32"}
    assert rows["accept"].isna().all()
    vehicles = rows[rows["label"] != "unknown"]
    assert (vehicles["year"] == vehicles["label"].str[-4:].astype(int)).all()


def test_scores_do_not_depend_on_batches_or_shards(score_all, begin_run, image_folder, small_bundle, tmp_path):
    apart = score_all(image_folder, out=str(tmp_path / "one"), batch_images=1, shard_images_first=1, shard_images_max=1)
    together = score_all(image_folder, out=str(tmp_path / "all"), batch_images=64)
    pd.testing.assert_frame_equal(apart.drop(columns="scored_at"), together.drop(columns="scored_at"), atol=1e-5)


def test_scored_pixels_are_the_decoded_ones(begin_run, image_folder, small_bundle, monkeypatch):
    """What reaches the network, not only what the reader gives, is the evaluation view."""
    _, scorer, _ = begin_run(image_folder, batch_images=5)
    batches, score = [], Scorer.score

    def keep(self, pixels_BHWC):
        batches.append(pixels_BHWC.copy())
        return score(self, pixels_BHWC)

    monkeypatch.setattr(Scorer, "_check_probes", lambda self: None)
    monkeypatch.setattr(Scorer, "score", keep)
    scorer.score_shard(0)
    settings = open_bundle(small_bundle).pixels
    uris = sorted(str(path) for path in image_folder.rglob("*.jpg"))
    expected_NHWC = np.stack([view(decode(fetch_image(uri).data, settings).pixels_HWC, settings) for uri in uris])
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert sorted(image.tobytes() for image in np.concatenate(batches)) == sorted(map(bytes, expected_NHWC))


def test_pixels_are_those_of_the_training_block(image_folder, small_bundle, tmp_path, monkeypatch):
    """The block that trials learn from and a worker's decode give the same bytes for the same files."""
    from carray.manifest.manifest_file import read_manifest
    from carray.manifest.prepare import prepare
    from carray.tensors.batches import view_batch
    from carray.tensors.block import ensure_block

    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    prepare(str(image_folder), out=str(tmp_path / "manifest.parquet"))
    manifest = read_manifest(str(tmp_path / "manifest.parquet"))
    settings = open_bundle(small_bundle).pixels
    block = ensure_block(manifest, settings)
    rows = manifest.by_content("train", "val")
    trained_NHWC = view_batch(block, np.arange(len(rows)), settings)
    assert len(rows) >= 6
    for uri, trained_HWC in zip(rows["uri"], trained_NHWC, strict=True):
        seen = read_image(uri, settings, as_input=True)
        assert seen.pixels_HWC.tobytes() == trained_HWC.tobytes()


def test_all_readers_see_the_same_rows(score_all, broken_folder, tmp_path):
    import duckdb

    ours = score_all(broken_folder, shard_images_first=5, shard_images_max=5)
    out = str(tmp_path / "out")
    pandas = pd.read_parquet(out)
    pd.testing.assert_frame_equal(pandas, ours)
    assert pandas["year"].dtype == "Int16"
    assert pandas["phash"].dtype == "Int64"
    assert pandas["size_bytes"].dtype == "Int64"
    arrow = pyarrow.dataset.dataset(out, format="parquet").to_table()
    duck = duckdb.sql(f"SELECT uri, status, year, phash FROM '{out}/*.parquet' ORDER BY uri").fetchall()
    in_order = pandas.sort_values("uri")
    assert [row[0] for row in duck] == in_order["uri"].tolist() == sorted(arrow["uri"].to_pylist())
    assert [row[3] for row in duck] == [None if pd.isna(v) else int(v) for v in in_order["phash"]]
    assert {path.name for path in (tmp_path / "out" / "_carray").rglob("*") if path.suffix == ".parquet"} == set()


def test_schema_is_the_same_when_all_rows_failed(score_all, begin_run, tmp_path, image_folder):
    (image_folder / "a" / "bad").mkdir()
    (image_folder / "a" / "bad" / "x.jpg").write_bytes(b"")
    score_all(image_folder, shard_images_first=1, shard_images_max=1)
    schemas = {pq.read_schema(path).remove_metadata().to_string() for path in (tmp_path / "out").glob("*.parquet")}
    assert schemas == {PREDICTION_SCHEMA.remove_metadata().to_string()}


def test_optional_columns_are_in_every_file(score_all, broken_folder, tmp_path):
    """pandas silently drops a column that only later files have, so files without one good image have them too."""
    import duckdb

    wanted = ["ood_score", "model_score", "embedding"]
    rows = score_all(broken_folder, outputs=wanted, shard_images_first=1)
    files = sorted((tmp_path / "out").glob("*.parquet"))
    assert len(files) > 5
    for file in files:
        assert pq.read_schema(file).names == [*PREDICTION_SCHEMA.names, "embedding", "model_score", "ood_score"]
    good = rows["status"] == "ok"
    assert rows.loc[~good, ["embedding", "model_score", "ood_score"]].isna().all(axis=None)
    embedding = rows.loc[good, "embedding"].iloc[0]
    assert embedding.dtype == np.float32 and embedding.shape == (8,)
    assert rows["ood_score"].dtype == np.float32 and np.isfinite(rows.loc[good, "ood_score"]).all()
    named = rows[good & rows["make"].notna()]
    assert (named["model_score"] >= named["score"] - 1e-6).all()
    read = duckdb.sql(f"select embedding from '{tmp_path}/out/part-*.parquet' where status = 'ok'").fetchall()
    assert len(read[0][0]) == 8


def test_ledger_counts_reasons(begin_run, broken_folder):
    _, scorer, out = begin_run(broken_folder)
    entry = scorer.score_shard(0)
    assert (entry.rows, entry.ok, entry.fetch_errors, entry.decode_errors) == (15, 6, 1, 8)
    assert sum(entry.error_codes.values()) == 9
    assert read_json(f"{out}/_carray/ledger/000000.json") == entry.model_dump()
    assert os.listdir(f"{out}/_carray/attempts") == []


def test_retry_reads_only_what_failed_to_be_fetched(begin_run, image_folder):
    missing = image_folder / "a" / "late.jpg"
    missing.symlink_to(image_folder / "not-yet.jpg")
    (image_folder / "a" / "broken.jpg").write_bytes(b"no image")
    _, scorer, out = begin_run(image_folder)
    scorer.score_shard(0)
    before = read_predictions(out).set_index("uri")
    assert before.loc[str(missing), "error_code"] == "not_found"
    (image_folder / "not-yet.jpg").write_bytes((image_folder / "a" / "01.jpg").read_bytes())
    (image_folder / "a" / "03.jpg").unlink()
    entry = scorer.score_shard(0, retry_failed=True)
    assert (entry.scored, entry.rows, entry.ok, entry.fetch_errors, entry.decode_errors) == (1, 14, 13, 0, 1)
    after = read_predictions(out).set_index("uri")
    assert after.loc[str(missing), "label"] == after.loc[str(image_folder / "a" / "01.jpg"), "label"]
    kept = before.index != str(missing)
    pd.testing.assert_frame_equal(before[kept], after[kept])


def test_a_bug_stops_the_shard_and_names_the_image(begin_run, image_folder, monkeypatch):
    _, scorer, out = begin_run(image_folder)

    bytes_05 = (image_folder / "a" / "05.jpg").read_bytes()

    def broken(fetched, settings, *, box, as_input):
        if fetched.data == bytes_05:
            raise ZeroDivisionError("ours")
        return ReadImage(np.zeros((40, 40, 3), np.uint8))

    monkeypatch.setattr(read_images, "decode_fetched", broken)
    with pytest.raises(RuntimeError, match=r"reading '.*05\.jpg' failed with ZeroDivisionError: ours"):
        scorer.score_shard(0)
    assert os.listdir(f"{out}/_carray/attempts") == [], "the worker lives: nothing to remember"
    assert not os.path.exists(f"{out}/part-000000.parquet")


def test_another_bundle_under_the_same_name_is_refused(begin_run, image_folder):
    _, _, out = begin_run(image_folder)
    run = read_run(out)
    other = run.model_copy(update={"bundle_id": "0" * 16})
    with pytest.raises(BundleError, match="but the run was begun with 0000"):
        score_shard.ShardScorer(run.bundle, out=out, run=other, settings=ClassifySettings()).score_shard(0)


WORKER = """
    import json, os, sys
    from carray.classify import read_images, score_shard
    from carray.classify.predictions_folder import ClassifySettings
    from carray.classify.ledger import read_run

    out, bundle, deadly, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
    read_images.WINDOW_IMAGES, read_images.NOTE_IMAGES = 2, 4
    decode = read_images.ImageReader._decode

    def die(self, image, fetched, held):
        if os.path.basename(image.uri) in deadly:
            os._exit(9)
        return decode(self, image, fetched, held)

    read_images.ImageReader._decode = die
    scorer = score_shard.ShardScorer(bundle, out=out, run=read_run(out), settings=ClassifySettings(**settings))
    print(scorer.score_shard(0).model_dump_json())
    print(sorted(set(sys.modules) & {"torch", "timm", "ray"}))
"""


def run_worker(out, bundle, deadly=(), **settings):
    """Score shard 0 in a process of its own, in which decoding a deadly image is the end."""
    arguments = [out, bundle, json.dumps(list(deadly)), json.dumps(settings)]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORKER), *arguments], capture_output=True, text=True, check=False
    )


def test_images_that_kill_their_worker_twice_become_rows(begin_run, image_folder, small_bundle):
    _, _, out = begin_run(image_folder)
    deaths = 0
    while (last := run_worker(out, small_bundle, ["02.jpg", "05.jpg"])).returncode == 9:
        deaths += 1
        assert AttemptFile(out, 0).read().deaths == deaths - 1
        assert deaths <= 4
    assert last.returncode == 0, last.stderr
    rows = read_predictions(out)
    lost = rows[rows["error_code"] == "worker_lost"]
    assert sorted(os.path.basename(uri) for uri in lost["uri"]) == ["02.jpg", "05.jpg"]
    assert (lost["status"] == "decode_error").all()
    assert (rows["status"] == "ok").sum() == 10
    assert AttemptFile(out, 0).read() is None


def test_a_worker_imports_neither_torch_nor_ray(begin_run, image_folder, small_bundle):
    _, _, out = begin_run(image_folder)
    done = run_worker(out, small_bundle)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_worker_that_dies_without_end_is_not_an_image_s_fault(begin_run, image_folder):
    _, scorer, out = begin_run(image_folder)
    AttemptFile(out, 0).write(Attempt(shard=0, pid=1, images=[], deaths=50))
    with pytest.raises(BudgetError, match=r"part-000000\.parquet lost its worker 51 times \(at most 50 is allowed\)"):
        scorer.score_shard(0)


def test_a_death_together_with_the_driver_is_nobody_s_fault():
    """A worker of another driver, or machine, may have been killed with it: the image in hand is tried again."""
    note = Attempt(shard=0, pid=1, driver="first", images=[3], alone=True, deaths=1)
    own, other = note.after_death("first"), note.after_death("second")
    assert (own.lost, own.suspects, own.deaths) == ([3], [3], 2)
    assert (other.lost, other.suspects, other.deaths, other.driver) == ([], [3], 1, "second")


def test_a_machine_that_was_lost_makes_no_image_guilty():
    note = Attempt(shard=0, pid=1, driver="d", images=[3], alone=True, deaths=1)
    lost = note.after_death("d", machine_lost=True)
    assert (lost.lost, lost.suspects, lost.deaths) == ([], [3], 2)


def test_an_image_in_hand_when_its_machine_was_lost_twice_is_scored(begin_run, image_folder, small_bundle):
    _, _, out = begin_run(image_folder)
    AttemptFile(out, 0).write(
        Attempt(shard=0, pid=1, machine="gone", driver="d", images=[3], alone=True, suspects=[3], deaths=1)
    )
    settings = ClassifySettings()
    new = partial(score_shard.ShardScorer, small_bundle, out=out, run=read_run(out), settings=settings, driver="d")
    assert new(is_lost=lambda machine: machine == "gone").score_shard(0).ok == 12
    os.unlink(f"{out}/part-000000.parquet")
    assert recover_ledger(out, 1) == {}
    AttemptFile(out, 0).write(Attempt(shard=0, pid=1, machine="there", driver="d", images=[3], alone=True, deaths=1))
    entry = new(is_lost=lambda machine: machine == "gone").score_shard(0)
    assert (entry.ok, entry.error_codes) == (11, {"worker_lost": 1}), (
        "the same, but of a process on a machine that lives"
    )


def test_a_worker_that_was_given_up_before_it_began_blames_no_image_of_the_next(begin_run, image_folder, small_bundle):
    _, _, out = begin_run(image_folder)
    AttemptFile(out, 0).write(Attempt(shard=0, pid=1, machine="there", driver="d", images=[3], alone=True, deaths=1))
    late = score_shard.ShardScorer(
        small_bundle,
        out=out,
        run=read_run(out),
        settings=ClassifySettings(),
        driver="d",
        machine="cut off",
        is_lost=lambda machine: machine == "cut off",
    )
    assert late.score_shard(0).ok == 12


def test_a_worker_that_was_given_up_leaves_what_another_finished(begin_run, image_folder, small_bundle, monkeypatch):
    """Its machine was cut off in the middle of a shard, which another scores; then it is back."""
    _, lost, out = begin_run(image_folder)
    here, there = threading.Event(), threading.Event()
    score_images = score_shard.ShardScorer._score_images

    def cut_off(self, *arguments):
        score_images(self, *arguments)
        if self is lost:
            here.set()
            assert there.wait(60)

    monkeypatch.setattr(score_shard.ShardScorer, "_score_images", cut_off)
    entries = []
    zombie = threading.Thread(target=lambda: entries.append(lost.score_shard(0)))
    zombie.start()
    assert here.wait(60)
    other = score_shard.ShardScorer(small_bundle, out=out, run=read_run(out), settings=ClassifySettings())
    entry = other.score_shard(0)
    part = Path(out, "part-000000.parquet").read_bytes()
    there.set()
    zombie.join(60)
    assert entries == [entry] == [done_shards(out, 1)[0]] == [entry_of_part(f"{out}/part-000000.parquet")]
    assert Path(out, "part-000000.parquet").read_bytes() == part
    assert os.listdir(f"{out}/_carray/attempts") == []


def test_a_worker_that_was_given_up_leaves_the_note_of_the_next(tmp_path):
    lost, other = AttemptFile(str(tmp_path), 0), AttemptFile(str(tmp_path), 0)
    mine = Attempt(shard=0, pid=1, worker="lost", images=[1, 2])
    lost.write(mine)
    next_one = other.read().after_death("").model_copy(update={"worker": "other", "images": [1], "alone": True})
    other.write(next_one)
    lost.write(mine.model_copy(update={"images": [3]}))
    lost.remove()
    assert AttemptFile(str(tmp_path), 0).read() == next_one


def test_a_file_whose_worker_died_before_it_entered_it_is_entered(begin_run, image_folder):
    totals, scorer, out = begin_run(image_folder)
    entry = scorer.score_shard(0)
    os.unlink(f"{out}/_carray/ledger/000000.json")
    assert recover_ledger(out, 1) == {0: entry} == done_shards(out, 1)
    os.unlink(f"{out}/_carray/ledger/000000.json")
    AttemptFile(out, 0).write(Attempt(shard=0, pid=1, images=[3]))
    part = Path(out, "part-000000.parquet").read_bytes()
    assert scorer.score_shard(0) == entry, "the next worker finds it, too"
    assert Path(out, "part-000000.parquet").read_bytes() == part
    assert count_rows(out, totals)["ok"] == 12


def test_a_retry_whose_worker_died_before_it_entered_it_counts(begin_run, image_folder):
    (image_folder / "a" / "late.jpg").symlink_to(image_folder / "not-yet.jpg")
    totals, scorer, out = begin_run(image_folder)
    assert scorer.score_shard(0).fetch_errors == 1
    (image_folder / "not-yet.jpg").write_bytes((image_folder / "a" / "01.jpg").read_bytes())
    retried = scorer.score_shard(0, retry_failed=True)
    assert (retried.retry, retried.fetch_errors) == (1, 0)
    os.unlink(f"{out}/_carray/ledger/000000.retry-001.json")
    assert done_shards(out, 1)[0].fetch_errors == 1
    assert count_rows(out, totals)["fetch_errors"] == 0
    assert done_shards(out, 1) == {0: retried}


def test_a_file_that_is_not_its_entry_s_is_refused(begin_run, image_folder, tmp_path):
    totals, scorer, out = begin_run(image_folder)
    scorer.score_shard(0)
    _, other, elsewhere = begin_run(image_folder, out=str(tmp_path / "other"))
    (image_folder / "a" / "01.jpg").unlink()
    other.score_shard(0)
    os.replace(f"{elsewhere}/part-000000.parquet", f"{out}/part-000000.parquet")
    with pytest.raises(StorageError, match=r"part-000000\.parquet is not the file of its ledger entry"):
        count_rows(out, totals)
    os.unlink(f"{out}/part-000000.parquet")
    assert recover_ledger(out, 1) == {}
    assert scorer.score_shard(0).fetch_errors == 1
    assert count_rows(out, totals)["rows"] == 12


def test_a_run_of_the_version_before_is_counted_and_retried(begin_run, image_folder):
    """Its files carry no ledger entry."""
    (image_folder / "a" / "late.jpg").symlink_to(image_folder / "not-yet.jpg")
    totals, scorer, out = begin_run(image_folder)
    part, entry = f"{out}/part-000000.parquet", scorer.score_shard(0)
    schema = pq.read_schema(part)
    note = {name: value for name, value in json.loads(schema.metadata[b"carray"]).items() if name != "entry"}
    table = pq.read_table(part).replace_schema_metadata(schema.metadata | {b"carray": json.dumps(note).encode()})
    pq.write_table(table, part)
    old = {name: value for name, value in entry.model_dump(mode="json").items() if name != "retry"}
    Path(f"{out}/_carray/ledger/000000.json").write_text(json.dumps(old))
    assert recover_ledger(out, 1) == {0: entry}
    assert count_rows(out, totals)["fetch_errors"] == 1
    (image_folder / "not-yet.jpg").write_bytes((image_folder / "a" / "01.jpg").read_bytes())
    retried = scorer.score_shard(0, retry_failed=True)
    assert (retried.retry, retried.rows, retried.ok, retried.scored) == (1, 13, 13, 1)
    assert count_rows(out, totals)["ok"] == 13


def test_two_retries_of_one_shard_leave_one_of_them(begin_run, image_folder, small_bundle, monkeypatch):
    (image_folder / "a" / "late.jpg").symlink_to(image_folder / "not-yet.jpg")
    totals, scorer, out = begin_run(image_folder)
    scorer.score_shard(0)
    (image_folder / "not-yet.jpg").write_bytes((image_folder / "a" / "01.jpg").read_bytes())
    other = score_shard.ShardScorer(small_bundle, out=out, run=read_run(out), settings=ClassifySettings())
    score_images, entries = score_shard.ShardScorer._score_images, []

    def late(self, *arguments):
        score_images(self, *arguments)
        if self is scorer:
            entries.append(other.score_shard(0, retry_failed=True))

    monkeypatch.setattr(score_shard.ShardScorer, "_score_images", late)
    entries.append(scorer.score_shard(0, retry_failed=True))
    assert entries[0] == entries[1] == done_shards(out, 1)[0]
    assert (entries[0].retry, count_rows(out, totals)["ok"]) == (1, 13)


def test_a_shard_with_suspects_has_the_worker_for_itself():
    beside, seen = score_shard.SharedLock(), []

    def work(name, *, alone):
        with beside.hold(alone=alone):
            seen.append(f"{name} begins")
            time.sleep(0.05)
            seen.append(f"{name} ends")

    with beside.hold(alone=False):
        alone = threading.Thread(target=work, args=("alone",), kwargs={"alone": True})
        alone.start()
        second = threading.Thread(target=work, args=("beside",), kwargs={"alone": False})
        second.start()
        second.join(5)
        seen.append("first ends")
    alone.join(5)
    assert seen == ["beside begins", "beside ends", "first ends", "alone begins", "alone ends"]


def test_several_threads_score_the_same(score_all, image_folder, tmp_path):
    one = score_all(image_folder, out=str(tmp_path / "one"))
    three = score_all(image_folder, out=str(tmp_path / "three"), threads=3)
    pd.testing.assert_frame_equal(one.drop(columns="scored_at"), three.drop(columns="scored_at"), atol=1e-5)


def test_a_shard_costs_six_requests(begin_run, image_folder, s3_server, s3, monkeypatch):
    """Its note is looked for and written, its keys read, its file and its entry written, its note deleted."""
    asked = []
    with start_proxy(s3_server.endpoint) as proxy:
        rules_for = proxy.rules_for

        def count(method, path):
            asked.append((method, path.rpartition("/out/")[2]))
            return rules_for(method, path)

        monkeypatch.setattr(proxy, "rules_for", count)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        _, scorer, _ = begin_run(image_folder, out=f"{s3}/out", shard_images_first=4)
        scorer.score_shard(0)  # the first also notes that the bundle is being opened
        asked.clear()
        scorer.score_shard(1)
    note, entry = "_carray/attempts/000001.json", "_carray/ledger/000001.json"
    assert asked == [
        *(("GET", note), ("GET", "_carray/shards/000001.arrow"), ("PUT", note)),
        *(("PUT", "part-000001.parquet"), ("PUT", entry), ("DELETE", note)),
    ]

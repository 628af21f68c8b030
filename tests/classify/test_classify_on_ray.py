"""The whole job on a real Ray: bucket to bucket, resume, refusal, deaths, and one CPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.dataset as pads
import pytest

from carray.classify.classify_on_ray import classify
from carray.classify.predictions_folder import ClassifySettings, record_place
from carray.classify.sources import Source
from carray.core.errors import BudgetError, BundleError, SettingsError, StorageError
from carray.core.store.files import exists, join, list_files, read_bytes, read_json, write_bytes
from carray.core.store.lease import hold_run
from carray.queries import read_predictions

FOUR = {"shard_images_first": 4, "shard_images_max": 4}


def settings(**values):
    return ClassifySettings(**{**FOUR, **values})


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def ray_logs():
    import ray

    return Path(ray._private.worker._global_node.get_logs_dir_path())


def test_bucket_to_bucket(ray_cluster, small_bundle, s3, s3_server, make_image, tmp_path):
    names = ["a b.jpg", "ü/%41#?.jpg", "new\nline.jpg", "in/d.jpg/", "notes.txt"]
    for i, name in enumerate(names):
        # The server takes a key with a trailing slash for a folder, which holds no bytes: still a row, and it says so.
        body = b"" if name.endswith("/") else make_image(i)
        s3_server.client().put_object(Bucket=s3.removeprefix("s3://"), Key=f"cars/{name}", Body=body)
    bundle = join(s3, "bundles", "b1")
    for name in ("weights.safetensors", "model.onnx", "probes.safetensors", "bundle.json"):
        write_bytes(join(bundle, name), read_bytes(join(small_bundle, name)))
    outcome = classify(bundle, join(s3, "cars"), out=join(s3, "scored"), settings=settings(shard_images_first=2))
    rows = read_predictions(join(s3, "scored"))
    assert sorted(rows["uri"]) == sorted(join(s3, "cars", name) for name in names[:4])
    counts = {name: outcome[name] for name in ("images", "rows", "ok", "decode_errors", "skipped_by_suffix")}
    assert counts == {"images": 4, "rows": 4, "ok": 3, "decode_errors": 1, "skipped_by_suffix": {"txt": 1}}
    assert read_json(join(s3, "scored", "_carray", "done.json")) == outcome
    pandas = pd.read_parquet(join(s3, "scored"))
    pd.testing.assert_frame_equal(
        pandas.sort_values("uri", ignore_index=True), rows.sort_values("uri", ignore_index=True)
    )
    secret = s3_server.secret_key.encode()
    records = [read_bytes(uri) for uri in list_files(join(s3, "scored", "_carray"))]
    logs = [path.read_bytes() for path in ray_logs().rglob("*") if path.is_file()]
    assert len(records) == 3 and len(logs) > 5
    assert not [data for data in records + logs if secret in data]


def test_resume_computes_only_what_is_missing(ray_cluster, small_bundle, image_folder, out, capfd):
    (image_folder / "a" / "broken.jpg").write_bytes(b"no image")
    first = classify(small_bundle, str(image_folder), out=out, settings=settings())
    assert (first["images"], first["ok"], first["decode_errors"]) == (13, 12, 1)
    before = read_predictions(out)
    parts = {path: path.stat().st_mtime_ns for path in Path(out).glob("*.parquet")}
    assert len(parts) == 4
    # Whoever reads the whole folder, by whatever pattern, finds the rows and none of the books.
    assert [path for path in Path(out).rglob("*.parquet") if path not in parts] == []
    for pattern in ("*.parquet", "**/*.parquet"):
        assert duckdb.sql(f"SELECT count(*) FROM '{out}/{pattern}'").fetchall() == [(13,)]
    assert len(pd.read_parquet(out)) == pads.dataset(out).count_rows() == 13
    again = classify(small_bundle, str(image_folder), out=out, settings=settings(workers=1, batch_images=2))
    assert "nothing to do" in capfd.readouterr().err
    same = ("run_id", "images", "rows", "ok", "decode_errors")
    assert [again[name] for name in same] == [first[name] for name in same]
    Path(out, "part-000001.parquet").unlink()
    Path(out, "_carray", "ledger", "000002.json").unlink()
    for path in image_folder.rglob("*.txt"):
        path.unlink()
    third = classify(small_bundle, str(image_folder), out=out, settings=settings(shard_images_first=1))
    assert [third[name] for name in same] == [first[name] for name in same]
    rewritten = {path.name for path, stamp in parts.items() if path.stat().st_mtime_ns != stamp}
    assert rewritten == {"part-000001.parquet"}
    assert exists(join(out, "_carray", "ledger", "000002.json")), "entered again from its file"
    pd.testing.assert_frame_equal(before.drop(columns="scored_at"), read_predictions(out).drop(columns="scored_at"))


def test_retry_failed_and_objects_gone_since_the_listing(ray_cluster, small_bundle, image_folder, out, tmp_path):
    table = tmp_path / "list.csv"
    names = [str(path.relative_to(tmp_path)) for path in sorted(image_folder.rglob("*.jpg"))]
    table.write_text("uri\n" + "\n".join([*names, names[0], "images/gone.jpg"]) + "\n")
    first = classify(small_bundle, str(table), out=out, settings=settings())
    assert (first["images"], first["repeated"], first["fetch_errors"]) == (13, 1, 1)
    rows = read_predictions(out).set_index("uri")
    assert rows.loc[str(image_folder / "gone.jpg"), ["status", "error_code"]].tolist() == ["fetch_error", "not_found"]
    (image_folder / "gone.jpg").write_bytes((image_folder / "b" / "00.jpg").read_bytes())
    plain = classify(small_bundle, str(table), out=out, settings=settings())
    assert plain["fetch_errors"] == 1, "a plain run again does only what is missing"
    retried = classify(small_bundle, str(table), out=out, settings=settings(retry_failed=True))
    assert (retried["images"], retried["rows"], retried["ok"], retried["fetch_errors"]) == (13, 13, 13, 0)
    rows = read_predictions(out).set_index("uri")
    assert rows.loc[str(image_folder / "gone.jpg"), "label"] == rows.loc[str(image_folder / "b" / "00.jpg"), "label"]


def test_another_run_s_folder_is_refused(ray_cluster, small_bundle, image_folder, out, tmp_path):
    classify(small_bundle, str(image_folder), out=out, settings=settings())
    for source, values, reason in [
        (image_folder / "a", {}, "source '.*/images' instead of '.*/images/a'"),
        (image_folder, {"all_files": True}, "all_files False instead of True"),
    ]:
        with pytest.raises(SettingsError, match=rf"holds another run \({reason}\); give another folder") as caught:
            classify(small_bundle, str(source), out=out, settings=settings(**values))
        assert len(caught.value.problems) == 1
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    pd.DataFrame({"x": [1]}).to_parquet(foreign / "x.parquet")
    with pytest.raises(SettingsError, match="already holds 1 Parquet files that are of no run"):
        classify(small_bundle, str(image_folder), out=str(foreign), settings=settings())
    pd.DataFrame({"x": [1]}).to_parquet(Path(out, "x.parquet"))
    with pytest.raises(StorageError, match=r"1 are missing or foreign, the first is '.*/x\.parquet'"):
        classify(small_bundle, str(image_folder), out=out, settings=settings())


def test_a_file_with_fewer_rows_than_its_ledger_says_is_found(small_bundle, ray_cluster, image_folder, out):
    classify(small_bundle, str(image_folder), out=out, settings=settings())
    part = Path(out, "part-000000.parquet")
    pd.read_parquet(part).iloc[:2].to_parquet(part)
    with pytest.raises(StorageError, match="has 10 rows in its files and 12 in its ledger for 12 images"):
        classify(small_bundle, str(image_folder), out=out, settings=settings())


def test_wrong_credentials_and_damaged_bundle_are_sentences(
    ray_cluster, small_bundle, s3, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"^listing s3://.*credentials"):
        classify(small_bundle, s3, out=str(tmp_path / "out"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in Path(small_bundle).iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.onnx").write_bytes(b"not what was packed")
    with pytest.raises(BundleError, match=r"^\S*model\.onnx has sha256 .* the file is damaged"):
        classify(str(damaged), str(image_folder), out=str(tmp_path / "out2"))
    assert not exists(str(tmp_path / "out2" / "_carray" / "done.json"))


def test_a_worker_killed_in_the_middle_costs_no_row(ray_cluster, small_bundle, make_image, tmp_path, out):
    folder = tmp_path / "many"
    folder.mkdir()
    slow = make_image(0, width=1500, height=1000, format="PNG")
    for i in range(24):
        (folder / f"{i:02d}.png").write_bytes(slow)
    killed = []

    def kill_one() -> None:
        attempts = Path(out, "_carray", "attempts")
        while not killed and not exists(join(out, "_carray", "done.json")):
            for note in attempts.glob("*.json") if attempts.is_dir() else ():
                try:
                    attempt = json.loads(note.read_text())
                except (OSError, ValueError):
                    continue
                if attempt["images"]:
                    os.kill(attempt["pid"], signal.SIGKILL)
                    killed.append(attempt["shard"])
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = classify(small_bundle, str(folder), out=out, settings=settings(shard_images_first=8, shard_images_max=8))
    killer.join()
    assert killed, "the test did kill a worker"
    rows = read_predictions(out)
    assert rows["uri"].tolist() == [f"{folder}/{i:02d}.png" for i in range(24)]
    assert (outcome["rows"], outcome["ok"]) == (24, 24), "one death is nobody's fault"
    assert list_files(join(out, "_carray", "attempts")) == [], "not even what a killed worker was writing"


def test_a_rotten_input_stops_the_job_and_says_why(ray_cluster, small_bundle, image_folder, out):
    for i in range(300):
        (image_folder / "b" / f"rotten-{i:03d}.jpg").write_bytes(b"no image")
    sentence = r"images failed \(\d+\.\d%, at most 50\.0% is .*: unsupported [\d,]+ \(as '.*/b/rotten-\d+\.jpg'\); mend"
    with pytest.raises(BudgetError, match=sentence):
        classify(small_bundle, str(image_folder), out=out, settings=settings(max_failed_fraction=0.5))
    assert not exists(join(out, "_carray", "done.json"))
    allowed = classify(small_bundle, str(image_folder), out=out, settings=settings(max_failed_fraction=0.97))
    assert (allowed["rows"], allowed["ok"], allowed["decode_errors"]) == (312, 12, 300)
    with pytest.raises(BudgetError, match="300 of 312 images failed"):
        classify(small_bundle, str(image_folder), out=out, settings=settings(max_failed_fraction=0.5))


def test_only_what_is_new_is_scored(ray_cluster, small_bundle, image_folder, out, tmp_path, make_image):
    first = classify(small_bundle, str(image_folder), out=out, settings=settings())
    later = classify(small_bundle, str(image_folder), out=str(tmp_path / "same"), settings=settings(since=out))
    assert (later["images"], later["rows"], later["known"]) == (12, 0, 12)
    assert later["run_id"] != first["run_id"]
    assert pd.read_parquet(tmp_path / "same").columns.tolist() == pd.read_parquet(out).columns.tolist()
    (image_folder / "a" / "new.jpg").write_bytes(make_image(70))
    newer = classify(small_bundle, str(image_folder), out=str(tmp_path / "newer"), settings=settings(since=out))
    assert (newer["images"], newer["rows"], newer["known"]) == (13, 1, 12)
    assert read_predictions(str(tmp_path / "newer"))["uri"].tolist() == [str(image_folder / "a" / "new.jpg")]


def test_a_second_driver_is_refused_while_the_first_lives(ray_cluster, small_bundle, image_folder, out, monkeypatch):
    monkeypatch.setattr("carray.core.store.lease.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("carray.core.store.lease.PATIENCE_SECONDS", 1.0)
    with (
        hold_run(out, record_place(out, "driver.json"), what="test"),
        pytest.raises(BudgetError, match="is working on .*only one driver can"),
    ):
        classify(small_bundle, str(image_folder), out=out, settings=settings())
    assert classify(small_bundle, str(image_folder), out=out, settings=settings())["ok"] == 12


@pytest.mark.slow
def test_sigterm_ends_the_job_in_order(ray_cluster, small_bundle, make_image, tmp_path, out):
    folder = tmp_path / "many"
    folder.mkdir()
    slow = make_image(0, width=1500, height=1000, format="PNG")
    for i in range(200):
        (folder / f"{i:03d}.png").write_bytes(slow)
    command = [sys.executable, "-m", "carray", "classify", small_bundle, str(folder), "--out", out]
    command += ["--set", "shard_images_first=4", "--set", "shard_images_max=4"]
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    until = time.monotonic() + 120
    while len(list_files(join(out, "_carray", "ledger"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    driver.terminate()
    printed, said = driver.communicate(timeout=60)
    assert driver.returncode == 143, said
    assert "carray: stopped by SIGTERM; finished shards stay" in said and "Traceback" not in said
    assert re.match(
        rf"carray: \d+ shards are finished and stay, of \d+( listed so far)?; .* OUT={out}$", said.splitlines()[-1]
    )
    assert "run_id" not in printed, "no outcome, though Ray may have said something"
    assert list_files(join(out, "_carray", "attempts")) == []
    assert not exists(join(out, "_carray", "driver.json"))
    before = len(list_files(join(out, "_carray", "ledger")))
    assert 2 <= before < 50
    outcome = classify(small_bundle, str(folder), out=out, settings=settings())
    assert (outcome["rows"], outcome["ok"]) == (200, 200)


ALONE = """
    import json, sys
    import ray
    from carray.core.ray.connect import start_ray
    from carray.classify.predictions_folder import ClassifySettings, record_place
    from carray.classify.classify_on_ray import classify

    bundle, source, out = sys.argv[1:]
    with start_ray(num_cpus=1) as running:
        assert running.private and running.cpus == 1, running
        chosen = ClassifySettings(shard_images_first=4, shard_images_max=4, threads=2, workers=3)
        print(json.dumps(classify(bundle, source, out=out, settings=chosen)))
    assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_one_cpu_is_enough(small_bundle, image_folder, out):
    """More workers and threads are asked for than one CPU can hold; the job neither waits for ever nor refuses."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ALONE), small_bundle, str(image_folder), out],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] == 12
    assert "Ray: started a private one on this machine, 1 CPUs, authentication by token" in done.stderr
    assert "Traceback" not in done.stderr


def test_scoring_begins_before_the_listing_ends(ray_cluster, small_bundle, image_folder, out, monkeypatch):
    """The listing's last piece waits for the first rows: a job that listed first would wait for ever."""
    first, until = Path(out, "part-000000.parquet"), time.monotonic() + 120
    list_pieces = Source.list

    def slowly(self, take, **more):
        def give(piece):
            while piece.last and not first.exists():
                assert time.monotonic() < until, "nothing was scored while the listing went on"
                time.sleep(0.05)
            take(piece)

        list_pieces(self, give, **more)

    monkeypatch.setattr(Source, "list", slowly)
    monkeypatch.setattr("carray.core.store.listing._PIECE_KEYS", 4)
    outcome = classify(small_bundle, str(image_folder), out=out, settings=settings())
    assert (outcome["images"], outcome["ok"]) == (12, 12)

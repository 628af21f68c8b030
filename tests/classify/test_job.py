"""The whole job, on processes of this machine: resume, retry, refusals, what is new, one driver at a time."""

from __future__ import annotations

import time
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.dataset as pads
import pytest

from carray.classify.job import classify
from carray.classify.predictions_folder import ClassifySettings, record_place
from carray.classify.sources import Source
from carray.core.errors import BudgetError, BundleError, SettingsError, StorageError
from carray.core.store.files import exists, join, read_json
from carray.core.store.lease import hold_run
from carray.queries import read_predictions

FOUR = {"shard_images_first": 4, "shard_images_max": 4, "workers": 1}  # starting each takes two seconds of a CPU


def settings(**values):
    return ClassifySettings(**{"engine": "local", **FOUR, **values})


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def test_resume_computes_only_what_is_missing(small_bundle, image_folder, out, capfd):
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


def test_auto_takes_what_is_faster_here_in_a_long_job_and_keeps_it(
    certified_bundle, image_folder, out, tmp_path, monkeypatch, capfd
):
    """The bundle says that int8 is faster, and this machine that fp32 is."""
    monkeypatch.setattr("carray.classify.local.LocalEngine.measure", lambda *_: {"fp32": 80.0, "int8": 70.0})
    short = classify(certified_bundle, str(image_folder), out=str(tmp_path / "short"), settings=settings())
    record = read_json(record_place(str(tmp_path / "short"), "run.json"))
    assert (short["runtime"], record["chosen_by"], record["images_per_second"]) == (
        *("int8", "packed"),
        {"fp32": 1.0, "int8": 9.0},
    )
    monkeypatch.setattr("carray.classify.job._MEASURED_FROM_IMAGES", 12)
    long = classify(certified_bundle, str(image_folder), out=out, settings=settings())
    assert "runtime: auto takes fp32, by images a second of one core measured here: fp32 80, int8 70" in (
        capfd.readouterr().err
    )
    record = read_json(record_place(out, "run.json"))
    assert (record["runtime"], record["run_id"], record["chosen_by"]) == ("fp32", long["run_id"], "measured")
    assert record["images_per_second"] == {"fp32": 80.0, "int8": 70.0}
    assert set(read_predictions(out)["runtime"]) == {"fp32"}
    named = classify(
        certified_bundle, str(image_folder), out=str(tmp_path / "named"), settings=settings(runtime="fp32")
    )
    assert named["run_id"] == long["run_id"], "how a runtime was chosen decides no row"
    Path(out, "part-000001.parquet").unlink()
    monkeypatch.setattr("carray.classify.local.LocalEngine.measure", lambda *_: {"fp32": 1.0, "int8": 2.0})
    again = classify(certified_bundle, str(image_folder), out=out, settings=settings())
    assert (again["runtime"], again["rows"]) == ("fp32", 12)
    assert read_json(record_place(out, "run.json")) == record


def test_a_job_whose_measuring_is_lost_takes_the_bundle_s_rates(certified_bundle, image_folder, out, monkeypatch):
    monkeypatch.setattr("carray.classify.local.LocalEngine.measure", lambda *_: {})
    monkeypatch.setattr("carray.classify.job._MEASURED_FROM_IMAGES", 1)
    assert classify(certified_bundle, str(image_folder), out=out, settings=settings())["runtime"] == "int8"
    assert read_json(record_place(out, "run.json"))["chosen_by"] == "packed"


def test_gpus_that_no_library_here_can_use_leave_it_to_the_processors(
    small_bundle, image_folder, out, monkeypatch, capfd
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert classify(small_bundle, str(image_folder), out=out, settings=settings())["ok"] == 12
    said = capfd.readouterr().err
    assert "CPUs score, not the 2 GPUs: runtime auto needs onnxruntime's CUDA provider" in said
    assert "1 workers of 1 CPU," in said


def test_retry_failed_and_objects_gone_since_the_listing(small_bundle, image_folder, out, tmp_path):
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


def test_another_run_s_folder_is_refused(small_bundle, image_folder, out, tmp_path):
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


def test_a_file_with_fewer_rows_than_its_ledger_says_is_found(small_bundle, image_folder, out):
    classify(small_bundle, str(image_folder), out=out, settings=settings())
    part = Path(out, "part-000000.parquet")
    pd.read_parquet(part).iloc[:2].to_parquet(part)
    with pytest.raises(StorageError, match="has 10 rows in its files and 12 in its ledger for 12 images"):
        classify(small_bundle, str(image_folder), out=out, settings=settings())


def test_wrong_credentials_and_damaged_bundle_are_sentences(small_bundle, s3, image_folder, tmp_path, monkeypatch):
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


def test_a_rotten_input_stops_the_job_and_says_why(small_bundle, image_folder, out):
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


def test_only_what_is_new_is_scored(small_bundle, image_folder, out, tmp_path, make_image):
    first = classify(small_bundle, str(image_folder), out=out, settings=settings())
    later = classify(small_bundle, str(image_folder), out=str(tmp_path / "same"), settings=settings(since=out))
    assert (later["images"], later["rows"], later["known"]) == (12, 0, 12)
    assert later["run_id"] != first["run_id"]
    assert pd.read_parquet(tmp_path / "same").columns.tolist() == pd.read_parquet(out).columns.tolist()
    (image_folder / "a" / "new.jpg").write_bytes(make_image(70))
    newer = classify(small_bundle, str(image_folder), out=str(tmp_path / "newer"), settings=settings(since=out))
    assert (newer["images"], newer["rows"], newer["known"]) == (13, 1, 12)
    assert read_predictions(str(tmp_path / "newer"))["uri"].tolist() == [str(image_folder / "a" / "new.jpg")]


def test_a_second_driver_is_refused_while_the_first_lives(small_bundle, image_folder, out, monkeypatch):
    monkeypatch.setattr("carray.core.store.lease.BEAT_SECONDS", 0.1)
    monkeypatch.setattr("carray.core.store.lease.PATIENCE_SECONDS", 1.0)
    with (
        hold_run(out, record_place(out, "driver.json"), what="test"),
        pytest.raises(BudgetError, match="is working on .*only one driver can"),
    ):
        classify(small_bundle, str(image_folder), out=out, settings=settings())
    assert classify(small_bundle, str(image_folder), out=out, settings=settings())["ok"] == 12


def test_scoring_begins_before_the_listing_ends(small_bundle, image_folder, out, monkeypatch):
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


def test_what_a_killed_worker_left_half_written_is_deleted(small_bundle, image_folder, tmp_path):
    out = tmp_path / "out"
    (out / "_carray" / "ledger").mkdir(parents=True)
    for left in (out / ".writing-a", out / "_carray" / "ledger" / ".writing-b"):
        left.write_bytes(b"x")
    classify(small_bundle, str(image_folder), out=str(out), settings=ClassifySettings(workers=1))
    assert list(out.rglob(".writing-*")) == []

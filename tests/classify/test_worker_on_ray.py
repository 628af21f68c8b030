"""The whole job on a real Ray: bucket to bucket, one CPU, and a run that the other engine began or ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

from carray.classify.job import classify
from carray.classify.predictions_folder import ClassifySettings
from carray.core.errors import BundleError
from carray.core.store.files import join, list_files, read_bytes, read_json, write_bytes
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
    assert outcome["engine"] == "ray", "there is a Ray, so auto takes it"
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


def without_times(out):
    return read_predictions(out).drop(columns="scored_at")


def test_the_engines_give_the_same_rows_and_resume_each_other(ray_cluster, small_bundle, broken_folder, tmp_path):
    on_ray, local, mixed = (str(tmp_path / name) for name in ("ray", "local", "mixed"))
    first = classify(small_bundle, str(broken_folder), out=on_ray, settings=settings(engine="ray"))
    second = classify(small_bundle, str(broken_folder), out=local, settings=settings(engine="local"))
    assert (first["engine"], second["engine"], second["rows"]) == ("ray", "local", 15)
    assert first["run_id"] == second["run_id"]
    pd.testing.assert_frame_equal(without_times(on_ray), without_times(local), check_exact=True)
    for engine, other in (("ray", "local"), ("local", "ray")):
        out = mixed + engine
        classify(small_bundle, str(broken_folder), out=out, settings=settings(engine=engine))
        kept = Path(out, "part-000000.parquet").stat().st_mtime_ns
        Path(out, "part-000001.parquet").unlink()
        again = classify(small_bundle, str(broken_folder), out=out, settings=settings(engine=other))
        assert (again["engine"], again["rows"]) == (other, 15)
        assert Path(out, "part-000000.parquet").stat().st_mtime_ns == kept
        pd.testing.assert_frame_equal(without_times(on_ray), without_times(out), check_exact=True)


def test_runtimes_are_measured_on_a_machine_of_the_ray(ray_cluster, certified_bundle, image_folder, out, monkeypatch):
    monkeypatch.setattr("carray.classify.job._MEASURED_FROM_IMAGES", 1)
    outcome = classify(certified_bundle, str(image_folder), out=out, settings=settings(engine="ray"))
    record = read_json(join(out, "_carray", "run.json"))
    assert record["chosen_by"] == "measured" and set(record["images_per_second"]) == {"fp32", "int8"}
    assert outcome["runtime"] == max(record["images_per_second"], key=record["images_per_second"].get)


def test_a_worker_s_refusal_keeps_its_kind(ray_cluster, small_bundle, image_folder, tmp_path):
    for path in Path(small_bundle).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"not what was packed")
    with pytest.raises(BundleError, match=r"^\S*model\.onnx has sha256 .* the file is damaged"):
        classify(str(tmp_path), str(image_folder), out=str(tmp_path / "out"), settings=settings(engine="ray"))


ALONE = """
    import json, sys
    import ray
    from carray.core.ray.connect import start_ray
    from carray.classify.predictions_folder import ClassifySettings, record_place
    from carray.classify.job import classify

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

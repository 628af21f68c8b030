"""Keys, class names and records never become paths: what is written lies below --out."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from carray.bundle.bundle_folder import open_bundle, read_bundle_file
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.sources import open_source
from carray.core.errors import BundleError, CarrayError
from carray.core.store.files import absolute, write_json
from carray.evaluation.evaluate import evaluate
from carray.manifest.prepare import prepare
from carray.manifest.tables import read_source_table
from carray.pages.bucket import write_page

CLIMBING = ["../../climbed", "/climbed", "..", "a/../../climbed", "..\\climbed", "%2e%2e%2fclimbed"]


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_names_that_climb_write_nothing_outside(tmp_path: Path, make_image, small_bundle: str) -> None:
    """Labels and keys go through a manifest, an evaluation and a report, each with its own place to write."""
    place = tmp_path / "deep" / "deeper"
    (place / "images").mkdir(parents=True)
    names = [f"{number}{name.replace('/', '!')}.jpg" for number, name in enumerate(CLIMBING)]
    labels = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", *CLIMBING[2:]]
    for number, name in enumerate(names):
        (place / "images" / name).write_bytes(make_image(number))
    pd.DataFrame({"uri": [f"images/{name}" for name in names], "label": labels, "split": "test"}).to_csv(
        place / "table.csv", index=False
    )
    before = everything(tmp_path)
    prepare(f"{place}/table.csv", out=f"{place}/out/manifest.parquet")
    rows = pd.read_parquet(place / "out" / "manifest.parquet")
    rows.assign(status="ok", score=0.5, margin=0.1, make=rows["label"], error_code=None, error=None).to_parquet(
        place / "predictions.parquet"
    )
    with pytest.raises(CarrayError):  # the bundle has never heard of these classes
        evaluate(small_bundle, f"{place}/out/manifest.parquet", split="test", out=f"{place}/out/evaluation")
    try:
        write_page(f"{place}/predictions.parquet", out=f"{place}/out/report.html")
    except CarrayError as err:
        assert "column" in str(err)
    written = everything(tmp_path) - before
    assert {path for path in written if place / "out" not in (path, *path.parents)} <= {place / "predictions.parquet"}
    assert not any("climbed" in path.name for path in written)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/passwd", "bundle.json/../../x"])
def test_a_bundle_names_no_file_outside_itself(small_bundle: str, tmp_path: Path, name: str) -> None:
    """What a description lists is looked up by carray's own names; others are never opened."""
    import shutil

    bundle = Path(shutil.copytree(small_bundle, tmp_path / "bundle"))
    (tmp_path / "outside.json").write_text("{}")
    values = json.loads((bundle / "bundle.json").read_text())
    values["files"].pop("model.onnx")
    values["files"][name] = values["files"]["weights.safetensors"]
    (bundle / "bundle.json").write_text(json.dumps(values))
    info = open_bundle(str(bundle))
    with pytest.raises(BundleError, match=r"has no model\.onnx"):
        read_bundle_file(str(bundle), info, "model.onnx")


def test_a_local_uri_is_spelled_without_climbing_before_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "table.csv").write_text("uri,label\n../images/a.jpg,x\n")
    assert read_source_table(f"{tmp_path}/deep/table.csv").rows["uri"].tolist() == [f"{tmp_path}/images/a.jpg"]
    assert absolute(f"{tmp_path}/a/../b") == f"{tmp_path}/b"
    assert absolute("s3://bucket/a/../b") == "s3://bucket/a/../b"  # a store knows no folders: this is a key


@pytest.mark.parametrize("key", ["../../secret.csv", "/etc/passwd", "..", "data/../../secret.csv"])
def test_an_inventory_reads_no_file_beside_its_own(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (tmp_path / "secret.csv").write_text('"bucket","stolen.jpg"\n')
    (tmp_path / "inventory" / "day").mkdir(parents=True)
    manifest = {
        **{"sourceBucket": "bucket", "destinationBucket": "arn:aws:s3:::store", "fileFormat": "CSV"},
        **{"fileSchema": "Bucket, Key", "files": [{"key": key}]},
    }
    write_json(f"{tmp_path}/inventory/day/manifest.json", manifest)
    source = open_source(f"{tmp_path}/inventory/day/manifest.json", ClassifySettings(), uses_boxes=False)
    monkeypatch.setattr("carray.core.store.files.TRIES", 1)
    with pytest.raises(CarrayError) as caught:
        source.list(lambda piece: None, gaps=[("", None)], threads=1, stop=threading.Event())
    assert "s3://store/" in str(caught.value)  # the store is asked, which gives what the role may read

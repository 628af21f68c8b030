"""A bundle and predictions that an earlier version made, of drawn cars: read and used by this one.

tests/data/earlier holds `bundle`, a tiny CNN of six drawn classes with an int8 model, and `predictions`, its scores of
`draw_dataset(images_per_class=3, seed=1)` and `draw_broken_files` under s3://drawn-cars/2026; two images were missing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

import carray
from carray.__main__ import main
from carray.bundle.scorer import Scorer
from carray.manifest.prepare import prepare
from carray.queries import query
from carray.testing.drawing import draw_broken_files, draw_dataset
from carray.testing.object_store import S3Server

EARLIER = Path(__file__).parent / "data" / "earlier"
BUNDLE, PREDICTIONS = EARLIER / "bundle", EARLIER / "predictions"
PREFIX = "s3://drawn-cars/2026/"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw the images that the predictions are of."""
    folder = tmp_path_factory.mktemp("bucket")
    draw_dataset(folder, images_per_class=3, seed=1)
    draw_broken_files(folder / "broken")
    return folder


@pytest.mark.parametrize("runtime", ["fp32", "int8", "torch-bf16"])
def test_every_runtime_computes_the_packed_logits(runtime: str) -> None:
    probes = load_file(BUNDLE / "probes.safetensors")
    packed_NK = probes["logits_int8" if runtime == "int8" else "logits_fp32"]
    logits_NK, embedding_ND = Scorer(str(BUNDLE), runtime=runtime).score(probes["pixels_NHWC"])
    assert embedding_ND.shape == (16, 16)
    tolerance = {"fp32": 1e-3, "int8": 0.05, "torch-bf16": 0.1}[runtime]
    assert np.abs(logits_NK - packed_NK).max() < tolerance * packed_NK.std()


def test_what_it_says_of_itself_is_read() -> None:
    info = carray.Classifier.load(str(BUNDLE)).info
    assert (info.accept_threshold, info.acceptance and info.acceptance.target_precision) == (0.629, 0.8)
    assert info.certificates["int8"].reason == "top-1 drops 0.88 points, above 0.5"
    assert len(info.classes) == 6


def test_images_get_the_scores_of_before(bucket: Path) -> None:
    before = carray.read_predictions(str(PREDICTIONS)).set_index("uri")
    before = before[before["status"] == "ok"]
    names = [uri.removeprefix(PREFIX) for uri in before.index]
    now = carray.Classifier.load(str(BUNDLE), runtime="fp32").predict([bucket / name for name in names])
    assert now["label"].tolist() == before["label"].tolist()
    assert now["accept"].tolist() == before["accept"].tolist()
    assert np.allclose(now["score"], before["score"], atol=0.01)
    assert np.allclose(np.stack(now["top5_scores"]), np.stack(before["top5_scores"]), atol=0.01)


def test_it_is_evaluated_on_images_of_today(bucket: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "images", images_per_class=8, seed=2)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "manifest.parquet"))
    arguments = [str(BUNDLE), "--manifest", str(tmp_path / "manifest.parquet"), "--split", "train"]
    with pytest.raises(SystemExit, match="0"):
        main(["evaluate", *arguments, "--out", str(tmp_path / "evaluation")])
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics["scored"] > 30
    assert 0.3 < metrics["top1"] <= 1
    assert metrics["seen_before"] is None
    assert metrics["certificate"]["agreement"] > 0.8


def test_earlier_predictions_answer_questions() -> None:
    predictions = carray.read_predictions(str(PREDICTIONS))
    assert len(predictions) == 37
    counts = predictions["status"].value_counts().to_dict()
    assert counts == {"ok": 31, "decode_error": 4, "fetch_error": 2}
    assert set(predictions.loc[predictions["status"] == "fetch_error", "error_code"]) == {"not_found"}
    found = query(
        str(PREDICTIONS), "select make, count(*) as images from predictions where status = 'ok' group by make"
    )
    assert found["images"].sum() == 31
    assert {"make_score", "ood_score"} <= set(predictions.columns)


def test_failed_rows_of_earlier_predictions_are_scored_again(
    s3: str, s3_server: S3Server, bucket: Path, tmp_path: Path
) -> None:
    files = [path for path in bucket.rglob("*") if path.is_file()]
    s3_server.create_bucket("drawn-cars", {f"2026/{path.relative_to(bucket)}": path for path in files})
    out = tmp_path / "predictions"
    shutil.copytree(PREDICTIONS, out)
    before = carray.read_predictions(str(out)).set_index("uri")
    outputs = ["--set", "outputs=[make_score,ood_score]"]
    with pytest.raises(SystemExit, match="0"):
        main(["classify", str(BUNDLE), PREFIX.rstrip("/"), "--out", str(out), "--retry-failed", *outputs])
    after = carray.read_predictions(str(out)).set_index("uri").loc[before.index]
    assert after["status"].value_counts().to_dict() == {"ok": 33, "decode_error": 4}
    others = before["status"] != "fetch_error"
    pd.testing.assert_frame_equal(after.loc[others], before.loc[others])
    assert set(after["run_id"]) == set(before["run_id"])
    kinds = {pq.read_schema(path).field("phash").type for path in out.glob("*.parquet")}
    assert kinds == {pa.uint64()}  # as the run's other files have it

"""The expected figures are exact: the bundle's own predictions become the labels, some of them moved on by one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from carray.bundle.bundle_folder import TRAINED_ON, Acceptance, open_bundle, write_bundle, write_info
from carray.bundle.certificates import Views, add_int8
from carray.bundle.scorer import Classifier
from carray.bundle.trained_on import pack_trained_on
from carray.core.errors import BudgetError, SchemaError, SettingsError
from carray.core.store.files import list_files, read_bytes, write_bytes
from carray.evaluation import evaluate as module
from carray.evaluation.evaluate import summary_text
from carray.evaluation.evaluation_folder import TABLES
from carray.manifest.manifest_file import MANIFEST_SCHEMA, read_manifest, write_manifest
from carray.pages.evaluation import write_page

IMAGES, WRONG = 10, 3
evaluate = partial(module.evaluate, write_page=write_page)


@pytest.fixture
def images(tmp_path: Path, make_image: Callable[..., bytes]) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.jpg" for i in range(IMAGES)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(make_image(i, width=80, height=60))
    return paths


def _write_manifest(bundle: str, paths: list[Path], uri: Path, *, labels: list[str] | None = None) -> str:
    """Label images by the bundle's own predictions, all but the first WRONG of them, which get the next class."""
    classes = open_bundle(bundle).classes
    predicted = Classifier.load(bundle).predict(paths)["label"].tolist()
    moved = [classes[(classes.index(name) + (i < WRONG)) % len(classes)] for i, name in enumerate(predicted)]
    rows = pd.DataFrame(
        {
            "uri": [str(path) for path in paths],
            "escaped": False,
            "label": labels or moved,
            "split": "test",
            "status": "ok",
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        }
    ).reindex(columns=MANIFEST_SCHEMA.names)
    write_manifest(rows, str(uri), classes=classes if labels is None else sorted(set(labels)), crop_boxes=False)
    return str(uri)


@pytest.fixture
def manifest(small_bundle: str, images: list[Path], tmp_path: Path) -> str:
    return _write_manifest(small_bundle, images, tmp_path / "manifest.parquet")


def test_evaluation_gives_the_known_figures_and_every_file(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = evaluate(small_bundle, manifest, out=str(out))
    assert found["top1"] == 1 - WRONG / IMAGES
    assert found["top1_low"] < found["top1"] < found["top1_high"]
    assert found["top5"] == 1.0  # of five classes
    assert (found["images"], found["scored"], found["unreadable"]) == (IMAGES, IMAGES, 0)
    assert found["levels"]["exact"]["accuracy"] == found["top1"]
    assert found["levels"]["body"]["images"] <= found["levels"]["make"]["images"] <= IMAGES
    assert sum(kind["images"] for kind in found["confusion_kinds"].values()) == WRONG
    assert found["seen_before"] is None
    assert json.loads((out / "metrics.json").read_text()) == found
    assert sorted(path.name for path in out.iterdir()) == [
        "calibration.parquet",
        "confused_pairs.parquet",
        "confusion.png",
        "confusion_kinds.parquet",
        "coverage.parquet",
        "examples.parquet",
        "levels.parquet",
        "metrics.json",
        "per_class.parquet",
        "predictions.parquet",
        "report.html",
    ]
    for name, schema in TABLES.items():
        assert pd.read_parquet(out / f"{name}.parquet").columns.tolist() == schema.names
    assert pd.read_parquet(out / "per_class.parquet")["support"].sum() == IMAGES
    assert pd.read_parquet(out / "confused_pairs.parquet")["images"].sum() == WRONG
    assert "70.0%" in summary_text(found)


def test_without_its_page_an_evaluation_is_unfinished(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    def fail(out: str, metrics: object) -> None:
        raise ValueError("the page")

    with pytest.raises(ValueError, match="the page"):
        module.evaluate(small_bundle, manifest, out=str(tmp_path / "out"), write_page=fail)
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert evaluate(small_bundle, manifest, out=str(tmp_path / "out"))["images"] == IMAGES


def test_predictions_are_those_of_the_classifier(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    evaluate(small_bundle, manifest, out=str(tmp_path / "out"))
    rows = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    expected = Classifier.load(small_bundle).predict(images)
    assert rows["uri"].tolist() == expected["uri"].tolist()
    assert rows["label"].tolist() == expected["label"].tolist()
    assert rows["score"].tolist() == pytest.approx(expected["score"].tolist(), abs=1e-6)
    assert (rows["label"] != rows["truth"]).tolist() == [i < WRONG for i in range(IMAGES)]


def test_unreadable_images_are_rows_and_in_no_accuracy(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path, make_image: Callable[..., bytes]
) -> None:
    images[0].unlink()
    images[5].write_bytes(make_image(99))
    found = evaluate(small_bundle, manifest, out=str(tmp_path / "out"))
    assert (found["images"], found["scored"], found["unreadable"]) == (IMAGES, IMAGES - 2, 2)
    assert found["unreadable_codes"] == {"not_found": 1, "changed": 1}
    assert found["top1"] == 1 - (WRONG - 1) / (IMAGES - 2)
    rows = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert len(rows) == IMAGES
    assert rows["status"].value_counts().to_dict() == {"ok": IMAGES - 2, "fetch_error": 2}
    assert rows.loc[rows["status"] != "ok", "label"].isna().all()
    assert "2 images could not be read" in summary_text(found)


def test_damaged_image_is_a_decode_error(small_bundle: str, images: list[Path], tmp_path: Path) -> None:
    uri = _write_manifest(small_bundle, images, tmp_path / "m.parquet")
    rows = pd.read_parquet(uri)
    images[3].write_bytes(images[3].read_bytes()[:200])
    rows.loc[3, "sha256"] = hashlib.sha256(images[3].read_bytes()).hexdigest()
    write_manifest(rows, uri, classes=open_bundle(small_bundle).classes, crop_boxes=False)
    evaluate(small_bundle, uri, out=str(tmp_path / "out"))
    assert pd.read_parquet(tmp_path / "out" / "predictions.parquet").loc[3, "status"] == "decode_error"


def test_nothing_readable_is_an_error_not_a_zero(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    shutil.rmtree(images[0].parent)
    with pytest.raises(BudgetError, match=f"none of the {IMAGES} images"):
        evaluate(small_bundle, manifest, out=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_labels_unknown_to_the_bundle_are_refused(small_bundle: str, images: list[Path], tmp_path: Path) -> None:
    uri = _write_manifest(small_bundle, images, tmp_path / "m.parquet", labels=["Trabant 601 Sedan 1964"] * IMAGES)
    with pytest.raises(SchemaError, match="Trabant 601 Sedan 1964"):
        evaluate(small_bundle, uri, out=str(tmp_path / "out"))


def test_empty_split_is_refused_by_name(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="'val'"):
        evaluate(small_bundle, manifest, split="val", out=str(tmp_path / "out"))


def test_same_evaluation_again_reads_what_is_there(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    first = evaluate(small_bundle, manifest, out=str(tmp_path / "out"))
    shutil.rmtree(images[0].parent)  # were it measured again, this would fail
    assert evaluate(small_bundle, manifest, out=str(tmp_path / "out")) == first


def test_a_half_written_folder_is_measured_again(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate(small_bundle, manifest, out=str(out))
    (out / "metrics.json").unlink()
    (out / "levels.parquet").write_bytes(b"half")
    (out / "report.html").unlink()
    assert evaluate(small_bundle, manifest, out=str(out)) == first
    assert len(pd.read_parquet(out / "levels.parquet")) == 5
    assert "70.0 % of 10 test images right" in (out / "report.html").read_text()


def test_an_evaluation_of_another_threshold_is_another_evaluation(
    small_bundle: str, manifest: str, tmp_path: Path
) -> None:
    bundle = str(shutil.copytree(small_bundle, tmp_path / "bundle"))
    assert evaluate(bundle, manifest, out=str(tmp_path / "out"))["acceptance"]["threshold"] is None
    promised = Acceptance(target_precision=0.6, confidence=0.95, split="val", images=50, coverage=1.0)
    write_info(bundle, open_bundle(bundle).model_copy(update={"accept_threshold": 0.0, "acceptance": promised}))
    with pytest.raises(SettingsError, match=r"another evaluation .*accept_threshold None"):
        evaluate(bundle, manifest, out=str(tmp_path / "out"))
    found = evaluate(bundle, manifest, out=str(tmp_path / "again"))["acceptance"]
    assert (found["accepted"], found["precision"], found["verdict"]) == (IMAGES, 1 - WRONG / IMAGES, "kept")
    assert pd.read_parquet(tmp_path / "again" / "predictions.parquet")["accept"].all()


def test_one_image_is_an_honest_page(small_bundle: str, images: list[Path], tmp_path: Path) -> None:
    uri = _write_manifest(small_bundle, images[:1], tmp_path / "one.parquet")
    found = evaluate(small_bundle, uri, out=str(tmp_path / "out"))
    assert (found["scored"], found["top1"], found["classes_with_images"]) == (1, 0.0, 1)
    assert found["macro_f1_low"] is found["loss_high"] is found["aurc_low"] is None
    words = (tmp_path / "out" / "report.html").read_text()
    assert "0.0 % of 1 test image right" in words
    assert "one image tells no interval" in words
    assert "All images are of one class of 5" in words
    assert "0.0%" in summary_text(found)


def test_a_split_of_one_class_says_what_it_cannot_tell(small_bundle: str, images: list[Path], tmp_path: Path) -> None:
    uri = _write_manifest(small_bundle, images, tmp_path / "m.parquet")
    rows = pd.read_parquet(uri)
    rows["label"] = "unknown"
    write_manifest(rows, uri, classes=open_bundle(small_bundle).classes, crop_boxes=False)
    found = evaluate(small_bundle, uri, out=str(tmp_path / "out"))
    assert found["levels"]["make"] == {"images": 0, "accuracy": None, "low": None, "high": None}
    words = " ".join((tmp_path / "out" / "report.html").read_text().split())
    assert "All images are of one class of 5" in words
    assert "cannot be told: no class's name tells it" in words
    assert "4 classes have no image here" in words


def test_a_split_that_the_bundle_learned_from_is_marked(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    bundle = str(shutil.copytree(small_bundle, tmp_path / "bundle"))
    info, fingerprint = open_bundle(bundle), read_manifest(manifest).fingerprint
    refit = {"manifest_fingerprint": fingerprint, "refit": True, "refit_splits": ["train", "test"]}
    write_info(bundle, info.model_copy(update={"search": refit}))
    assert evaluate(bundle, manifest, out=str(tmp_path / "out"))["seen_before"] == "training"
    assert "was trained on these images" in (tmp_path / "out" / "report.html").read_text()


def test_images_that_were_trained_on_are_counted_whatever_their_manifest(
    small_bundle: str, manifest: str, tmp_path: Path
) -> None:
    bundle, rows = str(shutil.copytree(small_bundle, tmp_path / "bundle")), read_manifest(manifest).rows
    write_bundle(bundle, open_bundle(bundle), {TRAINED_ON: pack_trained_on(rows["sha256"].iloc[:2])})
    found = evaluate(bundle, manifest, out=str(tmp_path / "out"))
    assert (found["seen_before"], found["images_trained_on"]) == ("training", 2)
    assert f"was trained on 2 of these {IMAGES} images" in (tmp_path / "out" / "report.html").read_text()


def test_the_order_of_rows_changes_no_figure(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    table, uri = read_manifest(manifest), str(tmp_path / "shuffled.parquet")
    write_manifest(table.rows.sample(frac=1, random_state=1), uri, classes=table.classes, crop_boxes=False)
    first, second = (evaluate(small_bundle, place, out=f"{place}-out") for place in (manifest, uri))
    for name, value in first.items():
        if name != "manifest":
            close = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert second[name] == close, name


def test_the_certificate_stands_beside_what_these_images_say(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    """The certificate is made up: so good that these images may fall short of it."""
    bundle, out = str(shutil.copytree(small_bundle, tmp_path / "bundle")), tmp_path / "out"
    assert evaluate(bundle, manifest, out=str(out))["certificate"] is None
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (120, 40, 40, 3), dtype=np.uint8)
    add_int8(bundle, Views(pixels_NHWC[:20], pixels_NHWC, np.zeros(120, dtype=np.int64)), keep=True)
    info = open_bundle(bundle)
    promised = info.certificates["int8"].model_copy(update={"holds": True, "reason": "", "before_refit": True})
    write_info(bundle, info.model_copy(update={"certificates": {"int8": promised}}))
    for runtime, place in (("fp32", out), ("int8", tmp_path / "by-int8")):
        found = evaluate(bundle, manifest, out=str(place), runtime=runtime)
        scorers = [Classifier.load(bundle, runtime=name).predict(images)["label"] for name in ("fp32", "int8")]
        certificate = found["certificate"]
        assert certificate["runtime"] == "int8"
        assert certificate["agreement"] == pytest.approx((scorers[0] == scorers[1]).mean())
        assert certificate["promised"]["agreement"] == promised.agreement
        assert found["top1"] == certificate["top1_fp32" if runtime == "fp32" else "top1"]
        assert certificate["verdict"] in ("kept", "within chance", "broken")
        words = " ".join((place / "report.html").read_text().split())
        assert "The certificate of int8 was made on 120 images of split val, with the network before its refit" in words
        assert "its certificate says" in summary_text(found)


def test_folder_of_another_evaluation_is_refused(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    evaluate(small_bundle, manifest, out=str(tmp_path / "out"))
    other = _write_manifest(small_bundle, images[:5], tmp_path / "other.parquet")
    with pytest.raises(SettingsError, match="another evaluation"):
        evaluate(small_bundle, other, out=str(tmp_path / "out"))


def test_boxes_are_cut_exactly_when_the_bundle_was_trained_on_them(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path
) -> None:
    """A box that leaves nothing of the image shows whether it was looked at."""
    rows = pd.read_parquet(manifest).assign(x1=5000, y1=5000, x2=5001, y2=5001)
    uri = str(tmp_path / "boxes.parquet")
    write_manifest(rows, uri, classes=open_bundle(small_bundle).classes, crop_boxes=True)
    assert evaluate(small_bundle, uri, out=str(tmp_path / "whole"))["unreadable"] == 0
    boxed = tmp_path / "boxed-bundle"
    shutil.copytree(small_bundle, boxed)
    info = json.loads((boxed / "bundle.json").read_text()) | {"uses_boxes": True}
    (boxed / "bundle.json").write_text(json.dumps(info))
    with pytest.raises(BudgetError, match="box"):
        evaluate(str(boxed), uri, out=str(tmp_path / "cut"))


def test_everything_may_lie_in_s3(small_bundle: str, images: list[Path], tmp_path: Path, s3: str) -> None:
    for path in [*images, *Path(small_bundle).iterdir()]:
        write_bytes(f"{s3}/{path.parent.name}/{path.name}", path.read_bytes())
    local = _write_manifest(small_bundle, images, tmp_path / "m.parquet")
    rows = pd.read_parquet(local)
    rows["uri"] = [f"{s3}/images/{path.name}" for path in images]
    write_manifest(rows, f"{s3}/m.parquet", classes=open_bundle(small_bundle).classes, crop_boxes=False)
    found = evaluate(f"{s3}/{Path(small_bundle).name}", f"{s3}/m.parquet", out=f"{s3}/out")
    assert found["top1"] == 1 - WRONG / IMAGES
    assert json.loads(read_bytes(f"{s3}/out/metrics.json")) == found
    assert len(list_files(f"{s3}/out")) == len(TABLES) + 3
    assert b"data:image/jpeg" in read_bytes(f"{s3}/out/report.html")

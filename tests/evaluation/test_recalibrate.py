"""Another precision for a finished bundle: written where it can be shown, refused in one sentence where it cannot."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from carray.__main__ import main
from carray.bundle.bundle_folder import TRAINED_ON, open_bundle, write_bundle, write_info
from carray.bundle.scorer import Classifier, Scorer, prediction_text
from carray.bundle.trained_on import pack_trained_on
from carray.core.errors import BudgetError, SchemaError, SettingsError
from carray.evaluation.recalibrate import recalibrate
from carray.manifest.manifest_file import MANIFEST_SCHEMA, read_manifest, write_manifest

IMAGES, WRONG = 70, 3


@pytest.fixture(scope="module")
def labelled(small_bundle: str, tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> str:
    """Write a manifest whose labels are the bundle's own, but of the three images that it is least sure of."""
    folder = tmp_path_factory.mktemp("labelled")
    paths = [folder / f"{i}.jpg" for i in range(IMAGES)]
    for i, path in enumerate(paths):
        path.write_bytes(make_image(i, width=80, height=60))
    found = Classifier.load(small_bundle).predict(paths)
    classes = open_bundle(small_bundle).classes
    least = set(found["score"].nsmallest(WRONG).index)
    labels = [classes[(classes.index(name) + (i in least)) % 5] for i, name in enumerate(found["label"])]
    rows = pd.DataFrame(
        {
            "uri": [str(path) for path in paths],
            "escaped": False,
            "label": labels,
            "split": "val",
            "status": "ok",
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
        }
    ).reindex(columns=MANIFEST_SCHEMA.names)
    write_manifest(rows, str(folder / "m.parquet"), classes=classes, crop_boxes=False)
    return str(folder / "m.parquet")


@pytest.fixture
def bundle(small_bundle: str, labelled: str, tmp_path: Path) -> str:
    """Copy the small bundle, as if it had been trained on the manifest's split train."""
    folder = str(shutil.copytree(small_bundle, tmp_path / "bundle"))
    search = {"manifest_fingerprint": read_manifest(labelled).fingerprint}
    write_info(folder, open_bundle(folder).model_copy(update={"search": search}))
    return folder


def test_a_threshold_is_written_and_the_id_stays(bundle: str, labelled: str) -> None:
    before = open_bundle(bundle)
    info = recalibrate(bundle, labelled, target_precision=0.9)
    assert info == open_bundle(bundle)
    assert info.bundle_id == before.bundle_id and info.files == before.files
    assert info.accept_threshold is not None and info.acceptance is not None
    found = info.acceptance
    assert (found.target_precision, found.split, found.images) == (0.9, "val", IMAGES)
    assert found.manifest_fingerprint == read_manifest(labelled).fingerprint
    assert found.precision_low is not None and found.precision_low >= 0.9
    assert Scorer(bundle).info == info


def test_what_is_promised_is_what_classification_accepts(bundle: str, labelled: str) -> None:
    info = recalibrate(bundle, labelled, target_precision=0.9)
    rows = read_manifest(labelled).rows
    found = Classifier.load(bundle, runtime="fp32").predict(rows["uri"])
    accepted = found["score"] >= info.accept_threshold
    assert found["accept"].tolist() == accepted.tolist()
    assert prediction_text(found).count("  accepted\n") == accepted.sum()
    assert prediction_text(found).count("not accepted") == (~accepted).sum()
    assert info.acceptance is not None and accepted.sum() == info.acceptance.accepted
    assert (found["label"] == rows["label"])[accepted].mean() == info.acceptance.precision


def test_a_target_that_cannot_be_shown_leaves_the_bundle_as_it_was(bundle: str, labelled: str) -> None:
    recalibrate(bundle, labelled, target_precision=0.9)
    before = Path(bundle, "bundle.json").read_bytes()
    with pytest.raises(
        SettingsError, match=r"target_precision is 0.99, but 70 images are too few.*299 are needed.*keeps its threshold"
    ):
        recalibrate(bundle, labelled, target_precision=0.99)
    assert Path(bundle, "bundle.json").read_bytes() == before


@pytest.mark.parametrize("target", [0.0, 1.0, 98.0, -1.0])
def test_what_is_no_precision_is_refused(bundle: str, labelled: str, target: float) -> None:
    with pytest.raises(SettingsError, match=f"target_precision is {target:g}, but"):
        recalibrate(bundle, labelled, target_precision=target)


@pytest.mark.parametrize(("refit", "refused"), [(True, True), (False, False)])
def test_images_that_the_bundle_learned_from_promise_nothing(
    bundle: str, labelled: str, refit: bool, refused: bool
) -> None:
    info = open_bundle(bundle)
    note = {**info.search, "refit": refit, "refit_splits": ["train", "val"]}
    write_info(bundle, info.model_copy(update={"search": note}))
    if refused:
        with pytest.raises(SettingsError, match="has learned from split 'val'"):
            recalibrate(bundle, labelled, target_precision=0.9)
    else:
        assert recalibrate(bundle, labelled, target_precision=0.9).accept_threshold is not None


def test_images_that_the_network_was_trained_on_are_left_out(
    small_bundle: str, labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, rows = str(shutil.copytree(small_bundle, tmp_path / "knows")), read_manifest(labelled).rows
    write_bundle(copy, open_bundle(copy), {TRAINED_ON: pack_trained_on(rows["sha256"].iloc[:5])})
    info = recalibrate(copy, labelled, target_precision=0.8)
    assert info.acceptance is not None and info.acceptance.images == IMAGES - 5
    assert f"5 of {IMAGES} images are left out" in capsys.readouterr().err
    write_bundle(copy, open_bundle(copy), {TRAINED_ON: pack_trained_on(rows["sha256"])})
    with pytest.raises(SettingsError, match="has learned from split 'val'"):
        recalibrate(copy, labelled, target_precision=0.8)


def test_images_of_another_manifest_are_taken_with_a_warning(
    small_bundle: str, labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = str(shutil.copytree(small_bundle, tmp_path / "other"))
    recalibrate(copy, labelled, target_precision=0.9)
    assert "is not the manifest that bundle" in capsys.readouterr().err


def test_unreadable_and_missing_images_are_said(
    bundle: str, labelled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SchemaError, match="'test'"):
        recalibrate(bundle, labelled, target_precision=0.9, split="test")
    rows = read_manifest(labelled).rows
    uri = str(tmp_path / "m.parquet")
    rows.loc[rows.index[:2], "uri"] = ["/nowhere/1.jpg", "/nowhere/2.jpg"]
    write_manifest(rows, uri, classes=open_bundle(bundle).classes, crop_boxes=False)
    info = recalibrate(bundle, uri, target_precision=0.9)
    assert info.acceptance is not None and info.acceptance.images == IMAGES - 2
    assert "2 images could not be read" in capsys.readouterr().err
    rows["uri"] = [f"/nowhere/{i}.jpg" for i in range(IMAGES)]
    write_manifest(rows, uri, classes=open_bundle(bundle).classes, crop_boxes=False)
    with pytest.raises(BudgetError, match="none of the 70 images"):
        recalibrate(bundle, uri, target_precision=0.9)


def test_the_command_ends_in_one_json_document(bundle: str, labelled: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", bundle, "--manifest", labelled, "--target-precision", "0.9"])
    assert not ended.value.code
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    assert result["accept_threshold"] == open_bundle(bundle).accept_threshold
    assert result["acceptance"]["target_precision"] == 0.9
    assert "are accepted" in captured.err

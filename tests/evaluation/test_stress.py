"""The whole measurement on a small bundle, whose own predictions are the labels: every figure is known beforehand."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carray.bundle.bundle_folder import open_bundle
from carray.bundle.scorer import Classifier
from carray.core.errors import BudgetError, SchemaError, SettingsError
from carray.core.store.files import list_files, write_bytes
from carray.core.tables import table_metadata
from carray.evaluation import corruptions as robust
from carray.evaluation import evaluate as evaluating
from carray.evaluation import stress as stressing
from carray.evaluation.corruptions import Corruption
from carray.evaluation.stress import summary_text
from carray.manifest.manifest_file import MANIFEST_SCHEMA, write_manifest
from carray.pages.evaluation import write_page
from carray.queries import read_predictions

IMAGES, WRONG, TRAINING = 10, 3, 8
evaluate = partial(evaluating.evaluate, write_page=write_page)
stress = partial(stressing.stress, write_page=write_page)


@pytest.fixture
def images(tmp_path: Path, make_image: Callable[..., bytes]) -> list[Path]:
    paths = [tmp_path / "images" / f"{i}.jpg" for i in range(IMAGES + TRAINING)]
    paths[0].parent.mkdir()
    for i, path in enumerate(paths):
        path.write_bytes(make_image(i, width=80, height=60))
    return paths


@pytest.fixture
def manifest(small_bundle: str, images: list[Path], tmp_path: Path) -> str:
    """Label images by the bundle's own predictions, all but the first WRONG, which get the next class."""
    classes = open_bundle(small_bundle).classes
    predicted = Classifier.load(small_bundle).predict(images)["label"].tolist()
    rows = pd.DataFrame(
        {
            "uri": [str(path) for path in images],
            "escaped": False,
            "label": [classes[(classes.index(name) + (i < WRONG)) % 5] for i, name in enumerate(predicted)],
            "split": ["test"] * IMAGES + ["train"] * TRAINING,
            "status": "ok",
            "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in images],
        }
    ).reindex(columns=MANIFEST_SCHEMA.names)
    write_manifest(rows, str(tmp_path / "manifest.parquet"), classes=classes, crop_boxes=False)
    return str(tmp_path / "manifest.parquet")


@pytest.fixture
def outside(tmp_path: Path, make_image: Callable[..., bytes]) -> str:
    """Write seven noisy pictures in two kinds, one of them broken."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.png").write_bytes(make_image(100 + i, format="PNG"))
    (folder / "6.png").write_bytes(b"no image")
    rows = {"uri": [f"{i}.png" for i in range(7)], "kind": ["tiles"] * 5 + ["drawn"] * 2, "source": list("aabbccd")}
    pd.DataFrame(rows).to_parquet(folder / "outside.parquet")
    return str(folder / "outside.parquet")


def test_the_first_row_is_the_plain_accuracy_and_all_rows_are_of_the_same_images(
    small_bundle: str, manifest: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = stress(small_bundle, manifest, out=str(out), images=None)["robustness"]
    table = pd.read_parquet(out / "robustness.parquet")
    assert table.columns.tolist() == robust.ROBUSTNESS_SCHEMA.names
    assert list(zip(table["corruption"], table["severity"], strict=True)) == robust.VARIANTS
    evaluated = evaluate(small_bundle, manifest, out=str(tmp_path / "evaluation"))
    for name in ("top1", "top1_low", "top1_high"):
        assert table[name].iloc[0] == evaluated[name] == pytest.approx(evaluated[name])
    assert found["top1"] == 1 - WRONG / IMAGES
    assert set(table["images"]) == {IMAGES}
    # JPEGs this small are decoded at full size, so that the control changes nothing.
    assert table.loc[1, ["lost", "gained"]].tolist() == [0, 0]
    assert np.allclose(table["top1"], 0.7 - (table["lost"] - table["gained"]) / IMAGES)
    assert json.loads((out / "robustness.json").read_text()) == found
    assert table_metadata(str(out / "robustness.parquet"))["bundle_id"] == found["bundle_id"]
    assert not (out / "outside.json").exists()


def test_corruptions_reach_the_network(small_bundle: str, manifest: str, tmp_path: Path, monkeypatch) -> None:
    """With black pictures in the corruptions' place every image gets one and the same label."""
    black = Corruption("black", "all", lambda picture: picture.point(lambda _: 0))
    monkeypatch.setattr(robust, "CORRUPTIONS", [black] * len(robust.CORRUPTIONS))
    stress(small_bundle, manifest, out=str(tmp_path / "out"), images=None)
    table, truth = pd.read_parquet(tmp_path / "out" / "robustness.parquet"), pd.read_parquet(manifest).head(IMAGES)
    Image.new("RGB", (80, 60)).save(tmp_path / "black.png")
    label = Classifier.load(small_bundle).predict([tmp_path / "black.png"])["label"].iloc[0]
    assert table["top1"].iloc[1:].tolist() == [(truth["label"] == label).mean()] * (len(table) - 1)


def test_unreadable_images_are_counted_and_in_no_row(
    small_bundle: str, manifest: str, images: list[Path], tmp_path: Path, make_image: Callable[..., bytes]
) -> None:
    images[0].unlink()
    images[5].write_bytes(make_image(99))
    found = stress(small_bundle, manifest, out=str(tmp_path / "out"), images=None)["robustness"]
    assert (found["images"], found["unreadable"]) == (IMAGES - 2, 2)
    assert found["unreadable_codes"] == {"not_found": 1, "changed": 1}
    assert found["top1"] == 1 - (WRONG - 1) / (IMAGES - 2)


def test_a_drawn_few_are_the_same_few_and_the_outside_is_compared_with_them(
    small_bundle: str, manifest: str, outside: str, tmp_path: Path
) -> None:
    found = stress(small_bundle, manifest, out=str(tmp_path / "a"), images=6, outside=outside)
    shuffled = pd.read_parquet(manifest).sample(frac=1, random_state=0)
    write_manifest(
        shuffled, str(tmp_path / "shuffled.parquet"), classes=open_bundle(small_bundle).classes, crop_boxes=False
    )
    again = stress(small_bundle, str(tmp_path / "shuffled.parquet"), out=str(tmp_path / "b"), images=6, outside=outside)
    other = stress(small_bundle, manifest, out=str(tmp_path / "c"), images=6, seed=1, outside=outside)
    assert found["robustness"]["images"] == again["robustness"]["images"] == found["outside"]["inside_images"] == 6
    assert found["robustness"]["top1"] == again["robustness"]["top1"]
    assert found["outside"]["kinds"] == again["outside"]["kinds"] != other["outside"]["kinds"]
    assert other["robustness"]["seed"] == 1


def test_ood_score_is_measured_by_kind_and_is_the_one_that_classification_writes(
    small_bundle: str, manifest: str, outside: str, images: list[Path], tmp_path: Path, ray_cluster: object
) -> None:
    from sklearn.metrics import roc_auc_score

    from carray.classify.job import classify
    from carray.classify.predictions_folder import ClassifySettings

    out = tmp_path / "out"
    results = stress(small_bundle, manifest, out=str(out), images=None, outside=outside)
    found = results["outside"]
    assert json.loads((out / "outside.json").read_text()) == found
    assert (found["inside_images"], found["inside_unreadable"]) == (IMAGES, 0)
    drawn, tiles = found["kinds"]["drawn"], found["kinds"]["tiles"]
    assert (drawn["images"], drawn["scored"], drawn["sources"]) == (2, 1, 1)
    assert (tiles["images"], tiles["scored"], tiles["sources"], tiles["auroc_low"]) == (5, 5, 3, None)
    settings = ClassifySettings(outputs=["ood_score"])
    folders = (str(images[0].parent), str(Path(outside).parent))
    frames = []
    for number, folder in enumerate(folders):
        classify(small_bundle, folder, out=f"{tmp_path}/predictions-{number}", settings=settings)
        frames.append(read_predictions(f"{tmp_path}/predictions-{number}", ["uri", "ood_score"]))
    scores = pd.concat(frames).set_index("uri")["ood_score"]
    inside = scores[[str(path) for path in images[:IMAGES]]].tolist()
    of_tiles = scores[[f"{folders[1]}/{i}.png" for i in range(5)]].tolist()
    expected = roc_auc_score([0] * len(inside) + [1] * len(of_tiles), inside + of_tiles)
    assert tiles["auroc"] == pytest.approx(expected)
    assert f"5 outside images (tiles, 3 sources): AUROC of ood_score {tiles['auroc']:.3f}" in summary_text(results)


def test_what_stands_is_read_and_what_is_missing_is_added(
    small_bundle: str, manifest: str, outside: str, images: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = stress(small_bundle, manifest, out=str(out), images=None)
    written = (out / "robustness.parquet").stat().st_mtime_ns
    both = stress(small_bundle, manifest, out=str(out), images=None, outside=outside)
    assert both["robustness"] == first["robustness"]
    assert (out / "robustness.parquet").stat().st_mtime_ns == written
    shutil.rmtree(images[0].parent)  # were anything measured again, this would fail
    assert stress(small_bundle, manifest, out=str(out), images=None, outside=outside) == both


def test_another_measurement_in_the_folder_is_refused(
    small_bundle: str, manifest: str, outside: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    stress(small_bundle, manifest, out=out, images=4, outside=outside)
    with pytest.raises(SettingsError, match=r"robustness.json is of another measurement .*drawn 4"):
        stress(small_bundle, manifest, out=out, images=5)
    shutil.copy(Path(outside).parent / "0.png", Path(outside).parent / "7.png")
    with pytest.raises(SettingsError, match=r"outside.json is of another measurement .*outside_fingerprint"):
        stress(small_bundle, manifest, out=out, images=4, outside=str(Path(outside).parent))


def test_the_folder_of_another_evaluation_is_refused(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    evaluate(small_bundle, manifest, out=out, split="train")
    with pytest.raises(SettingsError, match="another evaluation .*split train"):
        stress(small_bundle, manifest, out=out, images=4)
    shutil.rmtree(out)
    evaluate(small_bundle, manifest, out=out)
    assert stress(small_bundle, manifest, out=out, images=4)["robustness"]["images"] == 4


def test_the_page_of_the_evaluation_shows_it(small_bundle: str, manifest: str, outside: str, tmp_path: Path) -> None:
    page = tmp_path / "out" / "report.html"
    evaluate(small_bundle, manifest, out=str(page.parent))
    assert 'id="robustness"' not in page.read_text()
    stress(small_bundle, manifest, out=str(page.parent), images=4, outside=outside)
    assert 'id="robustness"' in page.read_text() and 'id="outside"' in page.read_text()


def test_the_page_shows_no_measurement_of_other_images(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    stress(small_bundle, manifest, out=str(tmp_path), split="train", images=4)
    evaluate(small_bundle, manifest, out=str(tmp_path))
    assert 'id="robustness"' not in (tmp_path / "report.html").read_text()


def test_nothing_readable_is_an_error_not_a_zero(
    small_bundle: str, manifest: str, outside: str, images: list[Path], tmp_path: Path
) -> None:
    for path in Path(outside).parent.glob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(BudgetError, match=r"scoring outside: no image can be read \(7 unsupported\)"):
        stress(small_bundle, manifest, out=str(tmp_path / "out"), images=2, outside=outside)
    shutil.rmtree(images[0].parent)
    with pytest.raises(BudgetError, match=r"none of the 10 images of split 'test' can be read \(10 not_found\)"):
        stress(small_bundle, manifest, out=str(tmp_path / "out2"), images=None)
    assert not (tmp_path / "out2" / "robustness.json").exists()


def test_labels_unknown_to_the_bundle_are_refused(small_bundle: str, manifest: str, tmp_path: Path) -> None:
    rows = pd.read_parquet(manifest).assign(label="Trabant 601 Sedan 1964")
    write_manifest(rows, manifest, classes=["Trabant 601 Sedan 1964"], crop_boxes=False)
    with pytest.raises(SchemaError, match="Trabant 601 Sedan 1964"):
        stress(small_bundle, manifest, out=str(tmp_path / "out"))


def test_boxes_are_cut_before_pictures_are_corrupted(small_bundle: str, images: list[Path], tmp_path: Path) -> None:
    """A bundle of boxes sees the boxed part alone: beside it everything may be painted over, in every variant."""
    info = open_bundle(small_bundle).model_copy(update={"uses_boxes": True})
    original = np.array(Image.open(io.BytesIO(images[0].read_bytes())))
    painted = np.zeros_like(original)
    painted[8:40, 8:40] = original[8:40, 8:40]
    seen = []
    for name, pixels in (("original", original), ("painted", painted)):
        path = tmp_path / f"{name}.png"
        Image.fromarray(pixels).save(path)
        row = {"uri": str(path), "escaped": False, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        boxed = robust._variants(row | {"x1": 8, "y1": 8, "x2": 40, "y2": 40}, info)
        assert not np.array_equal(boxed, robust._variants(row, info))
        seen.append(boxed)
    assert len(seen[0]) == len(robust.VARIANTS)
    assert np.array_equal(*seen)


def test_everything_may_lie_in_s3(small_bundle: str, manifest: str, outside: str, tmp_path: Path, s3: str) -> None:
    for path in Path(outside).parent.iterdir():
        write_bytes(f"{s3}/outside/{path.name}", path.read_bytes())
    found = stress(small_bundle, manifest, out=f"{s3}/out", images=4, outside=f"{s3}/outside/outside.parquet")
    assert found["outside"]["outside"] == f"{s3}/outside/outside.parquet"
    assert sorted(uri.rsplit("/", 1)[1] for uri in list_files(f"{s3}/out")) == [
        *("outside.json", "robustness.json", "robustness.parquet"),
    ]

"""The benchmark's outside images: what they are, that a seed gives the same, and rows from a small bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from carray.bundle.bundle_folder import open_bundle
from carray.bundle.scorer import Classifier
from carray.evaluation.outside import list_outside
from carray.manifest.manifest_file import MANIFEST_SCHEMA, write_manifest
from jobs.bench import evaluate
from jobs.bench.evaluate import SIDE, make_outside, measure
from jobs.bench.rows import ORIGIN, append_rows, origin

DRAWN, TILES = 8, 3
"""Fewer than the benchmark's own."""


@pytest.fixture(scope="module", autouse=True)
def fewer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "DRAWN", DRAWN)
        patch.setattr(evaluate, "TILES", TILES)
        yield


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory, fewer: None) -> Path:
    pytest.importorskip("skimage", reason="the photographs are scikit-image's (extra `dev`)")
    return make_outside(tmp_path_factory.mktemp("outside"))


def test_tiles_share_their_photographs_source_and_drawings_have_their_own(outside: Path) -> None:
    rows = list_outside(str(outside))
    kinds = rows.groupby("kind")["source"].agg(["size", "nunique"])
    assert kinds.loc["drawn"].tolist() == [4 * DRAWN, 4 * DRAWN]
    for kind in ("photographs", "instruments"):
        assert kinds.loc[kind, "size"] == (1 + TILES) * kinds.loc[kind, "nunique"]
    # A motorcycle is the hardest there is, and must not be left out for it.
    assert rows["source"].str.contains("motorcycle_left").sum() == 1 + TILES
    assert not rows["source"].str.contains("motorcycle_right").any()
    for uri in rows["uri"]:
        with Image.open(uri) as image:
            assert min(image.size) == SIDE


def test_a_seed_gives_the_same_images(outside: Path, tmp_path: Path) -> None:
    again, other = make_outside(tmp_path / "again"), make_outside(tmp_path / "other", seed=1)

    def digests(table: Path) -> list[str]:
        return [hashlib.sha256((table.parent / uri).read_bytes()).hexdigest() for uri in pd.read_parquet(table)["uri"]]

    assert digests(again) == digests(outside)
    # Whole photographs are those of every seed; the tiles and most drawings are not.
    assert len(set(digests(other)) & set(digests(outside))) < 40
    assert len(set(digests(outside))) == len(digests(outside))


def test_rows_of_both_tables_can_be_appended(outside: Path, small_bundle: str, tmp_path: Path, make_image) -> None:
    paths = [tmp_path / f"{i}.jpg" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(make_image(i))
    rows = {
        "uri": [str(path) for path in paths],
        "escaped": False,
        "label": Classifier.load(small_bundle).predict(paths)["label"],
        "split": ["test"] * 5 + ["train"] * 3,
        "status": "ok",
        "sha256": [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths],
    }
    manifest = tmp_path / "manifest.parquet"
    frame = pd.DataFrame(rows).reindex(columns=MANIFEST_SCHEMA.names)
    write_manifest(frame, str(manifest), classes=open_bundle(small_bundle).classes, crop_boxes=False)
    tables = measure(Path(small_bundle), manifest, outside=outside, out=tmp_path / "out", images=4, seed=0)
    for name, found in tables.items():
        append_rows(tmp_path / f"{name}.csv", [*ORIGIN, *found[0]], [origin("test") | row for row in found])
        table = pd.read_csv(tmp_path / f"{name}.csv")
        assert len(table) == len(found)
        assert set(table["bundle_id"]) == {open_bundle(small_bundle).bundle_id}
    assert tables["robustness"][0]["top1"] == 1.0
    assert {row["kind"] for row in tables["outliers"]} == {"photographs", "instruments", "drawn"}

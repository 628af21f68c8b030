from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from carray.evaluation.evaluate import IMAGES_A_PAIR, LONG_SIDE, PAIRS, take_examples
from carray.evaluation.score import ScoredSplit

INFO: Any = SimpleNamespace(uses_boxes=False)
BOXED: Any = SimpleNamespace(uses_boxes=True)


@pytest.fixture
def scored(tmp_path: Path, make_image: Callable[..., bytes]) -> ScoredSplit:
    """Write six images of class a, of which five were taken for b, the surer the later."""
    rows, predictions = [], []
    for i in range(6):
        path = tmp_path / f"{i}.jpg"
        path.write_bytes(make_image(i, width=300, height=150))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows.append({"uri": str(path), "escaped": False, "sha256": digest, "x1": 0, "y1": 0, "x2": 50, "y2": 100})
        found = {"uri": str(path), "truth": "a", "status": "ok", "label": "b" if i else "a", "score": 0.5 + i / 20}
        predictions.append(found)
    return ScoredSplit(rows, predictions, np.zeros(6, dtype=np.int64), np.zeros((6, 2), dtype=np.float32))


PAIR = pd.DataFrame({"truth": ["a"], "label": ["b"], "images": [5], "fraction": [5 / 6]})


def test_the_surest_mistakes_are_shown_in_their_own_shape(scored: ScoredSplit) -> None:
    rows = take_examples(scored, PAIR, INFO)
    assert [Path(row["uri"]).name for row in rows] == ["5.jpg", "4.jpg", "3.jpg"]
    assert len(rows) == IMAGES_A_PAIR
    for row in rows:
        picture = Image.open(io.BytesIO(row["jpeg"]))
        assert picture.format == "JPEG"
        assert picture.size == (row["width"], row["height"]) == (LONG_SIDE, LONG_SIDE // 2)


def test_a_picture_shows_the_image_and_of_a_box_only_the_box(scored: ScoredSplit) -> None:
    whole, boxed = take_examples(scored, PAIR, INFO)[0], take_examples(scored, PAIR, BOXED)[0]
    original = Image.open(scored.rows[5]["uri"])
    for row, expected in ((whole, original), (boxed, original.crop((0, 0, 50, 100)))):
        shown = Image.open(io.BytesIO(row["jpeg"]))
        wanted = np.asarray(expected.resize(shown.size), dtype=float)
        assert np.abs(np.asarray(shown, dtype=float) - wanted).mean() < 6
    assert (boxed["width"], boxed["height"]) == (LONG_SIDE // 2, LONG_SIDE)


def test_an_image_that_is_gone_or_changed_is_a_row_with_its_reason(
    scored: ScoredSplit, make_image: Callable[..., bytes]
) -> None:
    Path(scored.rows[5]["uri"]).unlink()
    Path(scored.rows[4]["uri"]).write_bytes(make_image(77))
    gone, changed, there = take_examples(scored, PAIR, INFO)
    assert gone["reason"] == "the file does not exist" and "jpeg" not in gone
    assert "changed since the manifest was prepared" in changed["reason"]
    assert there["jpeg"]


def test_without_mistakes_there_is_nothing_to_show(scored: ScoredSplit) -> None:
    right = ScoredSplit(scored.rows[:1], scored.predictions[:1], scored.truth_N[:1], scored.logits_NK[:1])
    assert take_examples(right, PAIR.iloc[:0], INFO) == []


def test_a_dozen_pairs_are_shown(scored: ScoredSplit) -> None:
    many = pd.concat([PAIR.assign(label=f"c{i}") for i in range(PAIRS)] + [PAIR])
    assert take_examples(scored, many, INFO) == []  # the pair that has images stands behind the dozen


def test_a_banner_stays_a_picture(tmp_path: Path, make_image: Callable[..., bytes], scored: ScoredSplit) -> None:
    path = Path(scored.rows[5]["uri"])
    path.write_bytes(make_image(1, width=4000, height=10))
    scored.rows[5]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    row = take_examples(scored, PAIR, INFO)[0]
    assert (row["width"], row["height"]) == (LONG_SIDE, 24)

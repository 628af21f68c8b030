"""Which rows stand for the others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray.queries.tallies import GROUP_MEMBERS, MOST_FAILED, choose, count, count_duplicates
from carray.testing.predictions import LABELS, failed, scored, write_predictions


def _choose(path: str, *, images: int = 40, seed: int = 0) -> pd.DataFrame:
    return choose(path, count(path), count_duplicates(path, most=12), images=images, seed=seed)


def _many() -> list[dict[str, Any]]:
    rows = [
        scored(f"/p/{i:03d}.jpg", label=LABELS[i % 4], score=0.2 + i * 0.004, second=0.19 - i * 0.0005)
        for i in range(200)
    ]
    rows += [failed(f"/p/f{i:03d}.jpg", ("truncated", "empty", "denied")[i % 3]) for i in range(150)]
    rows += [scored(f"/p/twin-{i}.jpg", score=0.99, second=0.0, phash=0xAAAA_AAAA_AAAA_AAAA - 2**64) for i in range(9)]
    return rows


def _picked(rows: pd.DataFrame, pick: str) -> list[str]:
    return [row["uri"] for row in rows.to_dict("records") if pick in row["picks"]]


def test_each_reason_has_its_rows(tmp_path: Path) -> None:
    rows = _choose(write_predictions(tmp_path, _many()), images=100)
    assert sum(rows["status"] == "ok") <= 100
    least = _picked(rows, "least")
    assert least == [f"/p/{i:03d}.jpg" for i in range(len(least))] and len(least) >= 25
    most = rows[rows["uri"].isin(_picked(rows, "most"))]
    assert Counter(most["label"]) == Counter(dict.fromkeys(LABELS, 6))
    assert set(most.loc[most["label"] == LABELS[1], "uri"]) == {f"/p/{i:03d}.jpg" for i in range(177, 200, 4)}
    assert len(_picked(rows, "random")) == len(set(_picked(rows, "random"))) >= 25
    codes = Counter(rows.loc[rows["uri"].isin(_picked(rows, "failed")), "error_code"])
    assert codes == Counter(dict.fromkeys(("truncated", "empty", "denied"), MOST_FAILED // 3))
    assert len(_picked(rows, "duplicate")) == GROUP_MEMBERS
    assert rows["top5_labels"].notna().sum() == sum(rows["status"] == "ok")


def test_the_same_seed_chooses_the_same_whatever_the_files(tmp_path: Path) -> None:
    one = _choose(write_predictions(tmp_path / "one", _many(), files=1))
    other = _choose(write_predictions(tmp_path / "other", _many()[::-1], files=7))
    pd.testing.assert_frame_equal(one, other)
    reseeded = _choose(str(tmp_path / "one"), seed=1)
    assert _picked(reseeded, "random") != _picked(one, "random")
    assert _picked(reseeded, "least") == _picked(one, "least")


def test_an_image_chosen_twice_is_one_row_with_both_reasons(tmp_path: Path) -> None:
    rows = _choose(write_predictions(tmp_path, [scored("/p/only.jpg")]))
    assert rows["picks"].tolist() == [["least", "most", "random"]]


def test_the_boxes_of_one_image_stay_apart(tmp_path: Path) -> None:
    boxes = [scored("/p/street.jpg", score=score, second=0.0) for score in (0.3, 0.6, 0.9)]
    rows = _choose(write_predictions(tmp_path, boxes))
    assert sorted(rows["score"]) == pytest.approx([0.3, 0.6, 0.9])


def test_small_numbers_and_empty_tables_choose_what_there_is(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "many", _many())
    for images in (1, 2, 3, 5, 24):
        assert 1 <= sum(_choose(path, images=images)["status"] == "ok") <= images
    assert _choose(write_predictions(tmp_path / "none", [])).empty
    failures = write_predictions(tmp_path / "failed", [failed(f"/p/{code}.jpg", code) for code in ("empty", "denied")])
    assert _choose(failures)["picks"].tolist() == [["failed"], ["failed"]]
    boxes = write_predictions(tmp_path / "boxes", [failed("/p/1.jpg", code) for code in ("bad_box", "empty")])
    assert _choose(boxes)["picks"].tolist() == [["failed"]]
    nulls = [failed("/p/2.jpg", error_code=None, error=None)]
    assert len(_choose(write_predictions(tmp_path / "nulls", nulls))) == 1

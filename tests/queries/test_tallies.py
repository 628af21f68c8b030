"""What is counted: each figure beside the rows that make it up, whatever files they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray.queries.tallies import BINS, count, count_duplicates, count_folders
from carray.testing.predictions import LABELS, NOON, failed, scored, write_predictions


def test_every_figure_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [
        scored("/p/a/1.jpg", score=0.25, accept=False),
        scored("/p/a/2.jpg", score=0.9, accept=True),
        scored("/p/b/3.jpg", score=1.0, label=LABELS[1]),
        scored("/p/b/4.jpg", score=0.499, label=LABELS[3]),
        failed("/p/b/6.jpg"),
        failed("/p/b/5.jpg"),
        failed("/p/c/7.jpg", "denied"),
    ]
    found = count(write_predictions(tmp_path, rows))
    assert (found.rows, found.scored, found.failed) == (7, 4, 3)
    assert found.mean_score == pytest.approx((0.25 + 0.9 + 1.0 + 0.499) / 4)
    assert (found.uncertain, found.judged, found.accepted) == (2, 2, 1)
    assert found.last_scored_at == pd.Timestamp(NOON)
    assert found.base == "/p/"
    assert found.errors.values.tolist() == [
        ["decode_error", "truncated", 2, "/p/b/5.jpg"],
        ["fetch_error", "denied", 1, "/p/c/7.jpg"],
    ]
    makes = found.names["make"]
    assert makes[["name", "images", "uncertain"]].values.tolist() == [["Audi", 2, 1], ["BMW", 1, 0]]
    assert makes["mean_score"].tolist() == pytest.approx([0.575, 1.0])
    assert found.names["year"][["name", "images"]].values.tolist() == [[2012, 2], [2007, 1]]
    assert found.names["label"]["name"].tolist() == [LABELS[0], LABELS[1], LABELS[3]]
    # A score of 1 belongs to the last bin, and a failure to none.
    assert sorted(found.bins[["bin", "images"]].values.tolist()) == [[12, 1], [24, 1], [45, 1], [BINS - 1, 1]]


def test_no_row_and_no_scored_row_are_counted_as_such(tmp_path: Path) -> None:
    nothing = count(write_predictions(tmp_path / "nothing", []))
    assert (nothing.rows, nothing.scored, nothing.mean_score, nothing.base) == (0, 0, None, "")
    assert nothing.last_scored_at is None and nothing.bins.empty and nothing.errors.empty
    all_failed = count(write_predictions(tmp_path / "failed", [failed("/p/1.jpg"), failed("/p/2.jpg")]))
    assert (all_failed.rows, all_failed.scored, all_failed.failed, all_failed.mean_score) == (2, 0, 2, None)
    assert all_failed.bins.empty and all(names.empty for names in all_failed.names.values())


@pytest.mark.parametrize(
    ("uris", "base"),
    [
        (["/p/a.jpg"], "/p/"),
        (["s3://b/2026/01/x.jpg", "s3://b/2026/02/x.jpg", "s3://b/2026/01/y.jpg"], "s3://b/2026/"),
        (["s3://b/2026-01/x.jpg", "s3://b/2026-02/x.jpg"], "s3://b/"),
        (["s3://b/x.jpg", "s3://c/x.jpg"], "s3://"),
        (["/p/ä/x.jpg", "/p/ö/x.jpg", "/p/車/x.jpg"], "/p/"),
    ],
)
def test_the_base_is_the_deepest_folder_of_all(tmp_path: Path, uris: list[str], base: str) -> None:
    assert count(write_predictions(tmp_path, [scored(uri) for uri in uris])).base == base


def _folders(tmp_path: Path, rows: list[dict[str, Any]]) -> tuple[pd.DataFrame, int]:
    path = write_predictions(tmp_path, rows)
    return count_folders(path, count(path).base)


def test_a_broken_day_leads_the_folders(tmp_path: Path) -> None:
    rows = [scored(f"s3://b/2026/{day:02d}/{i}.jpg", score=0.8) for day in range(1, 11) for i in range(4)]
    rows += [failed(f"s3://b/2026/07/broken-{i}.jpg") for i in range(4)]
    rows += [scored("s3://b/2026/03/dark.jpg", score=0.1), scored("s3://b/2026/direct.jpg", score=0.8)]
    table, total = _folders(tmp_path, rows)
    assert total == 11
    assert table["folder"].tolist()[:2] == ["07", "03"]
    assert table.loc[0, ["images", "failed"]].tolist() == [8, 4]
    assert table.loc[1, ["mean_score", "uncertain"]].tolist() == pytest.approx([(4 * 0.8 + 0.1) / 5, 1])
    assert table["folder"].isna().sum() == 1  # the image that lies directly in the base


def test_folders_are_taken_deeper_while_they_are_few(tmp_path: Path) -> None:
    rows = [
        scored(f"s3://b/{year}/{month:02d}/{day}/x.jpg")
        for year in (2025, 2026)
        for month in (1, 2, 3)
        for day in (1, 2)
    ]
    table, total = _folders(tmp_path, rows)
    assert total == 12 and sorted(table["folder"])[0] == "2025/01/1"


def test_folders_stay_where_they_are_when_deeper_ones_are_an_image_each(tmp_path: Path) -> None:
    rows = [scored(f"s3://b/{half}/{i}/x.jpg") for half in ("left", "right") for i in range(600)]
    table, total = _folders(tmp_path, rows)
    assert total == 2 and sorted(table["folder"]) == ["left", "right"]
    assert table["images"].tolist() == [600, 600]


def test_groups_of_near_duplicates_say_their_size_and_labels(tmp_path: Path) -> None:
    one, other = 0xAAAA_AAAA_AAAA_AAAA - 2**64, 0x70F0_F0F0_F0F0_F0F0
    rows = [scored(f"/p/one-{i}.jpg", phash=one, label=LABELS[i % 2]) for i in range(3)]
    rows += [scored(f"/p/other-{i}.jpg", phash=other) for i in range(2)]
    rows += [scored(f"/p/flat-{i}.jpg", phash=2**i) for i in range(3)]
    rows += [scored(f"/p/white-{i}.jpg", phash=-1) for i in range(2)]
    rows += [scored("/p/alone.jpg"), failed("/p/failed.jpg")]
    path = write_predictions(tmp_path, rows)
    found = count_duplicates(path, most=1)
    assert (found.groups, found.images) == (2, 5)
    assert found.table.values.tolist() == [[one, 3, 2]]
    assert count(path).flat == 5


def test_figures_do_not_depend_on_how_the_files_are_cut(tmp_path: Path) -> None:
    rows = [scored(f"/p/{i % 3}/{i}.jpg", score=0.1 + i / 40, label=LABELS[i % 4]) for i in range(30)]
    rows += [failed(f"/p/f/{i}.jpg") for i in range(5)]
    one = count(write_predictions(tmp_path / "one", rows, files=1))
    five = count(write_predictions(tmp_path / "five", rows[::-1], files=5))
    pd.testing.assert_frame_equal(one.names["label"], five.names["label"])
    pd.testing.assert_frame_equal(one.errors, five.errors)
    assert one.mean_score == pytest.approx(five.mean_score)

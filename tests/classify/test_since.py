"""Only what is new or changed is scored; what is known has no row, and is counted."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from carray.classify.ledger import count_rows
from carray.classify.predictions_folder import PlannedImage
from carray.classify.since import EarlierRun
from carray.core.errors import SettingsError
from carray.queries import read_predictions

SMALL = {"shard_images_first": 4, "shard_images_max": 4}


@pytest.fixture
def earlier(begin_run, image_folder, tmp_path):
    """Give the folder of a finished run over twelve images, one of them broken."""
    (image_folder / "a" / "broken.jpg").write_bytes(b"no image")
    return score(begin_run, image_folder, str(tmp_path / "earlier"))


def score(begin_run, source, out, **settings):
    totals, scorer, out = begin_run(source, out=out, **SMALL, **settings)
    entries = [scorer.score_shard(shard) for shard in range(totals.shards)]
    counts = count_rows(out, totals)
    assert counts["known"] == sum(entry.known for entry in entries)
    return out


def test_new_changed_and_failed_images_are_scored(begin_run, earlier, image_folder, make_image, tmp_path):
    (image_folder / "a" / "new.jpg").write_bytes(make_image(50))
    (image_folder / "b" / "00.jpg").write_bytes(make_image(51))
    out = score(begin_run, image_folder, str(tmp_path / "later"), since=earlier)
    names = sorted(Path(uri).name for uri in read_predictions(out)["uri"])
    assert names == ["00.jpg", "broken.jpg", "new.jpg"]
    parts = sorted(Path(out).glob("*.parquet"))
    assert sum(len(pd.read_parquet(part)) for part in parts) == 3 < len(parts)


def test_another_bundle_s_rows_do_not_count(begin_run, earlier, image_folder, tmp_path):
    for part in Path(earlier).glob("*.parquet"):
        pd.read_parquet(part).assign(bundle_id="0" * 16).to_parquet(part)
    out = score(begin_run, image_folder, str(tmp_path / "later"), since=earlier)
    assert len(read_predictions(out)) == 13


def test_retry_keeps_rows_and_places(begin_run, earlier, image_folder, make_image, tmp_path):
    (image_folder / "a" / "05x.jpg").symlink_to(image_folder / "later.jpg")
    out = str(tmp_path / "later")
    _, scorer, _ = begin_run(image_folder, out=out, since=earlier)
    entry = scorer.score_shard(0)
    assert (entry.known, entry.rows, entry.fetch_errors, entry.decode_errors) == (12, 2, 1, 1)
    (image_folder / "later.jpg").write_bytes(make_image(60))
    again = scorer.score_shard(0, retry_failed=True)
    assert (again.known, again.rows, again.ok, again.scored) == (12, 2, 1, 1)
    assert sorted(read_predictions(out)["status"]) == ["decode_error", "ok"]


def test_an_image_without_an_etag_is_never_known(earlier, image_folder):
    uri = str(image_folder / "a" / "01.jpg")
    rows = read_predictions(earlier).set_index("uri")
    run = EarlierRun(earlier, rows.loc[uri, "bundle_id"])
    known = PlannedImage(uri, etag=rows.loc[uri, "etag"])
    assert run.known([PlannedImage(uri), known, PlannedImage("/zzz", etag="1")]) == {1}


def test_what_is_no_earlier_run_is_a_sentence(tmp_path):
    with pytest.raises(SettingsError, match="there is no such folder"):
        EarlierRun(str(tmp_path / "none"), "x")
    pd.DataFrame({"uri": ["a"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SettingsError, match="lacks the column etag, status, bundle_id"):
        EarlierRun(str(tmp_path), "x")

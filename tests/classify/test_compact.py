"""Many files become few, and a row is neither lost nor doubled."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from carray.classify import compact as module
from carray.classify.compact import compact
from carray.classify.ledger import read_run
from carray.classify.predictions_folder import record_place
from carray.core.errors import SettingsError, StorageError
from carray.core.store.files import list_files, write_json
from carray.queries import read_predictions


@pytest.fixture
def finished(begin_run, image_folder):
    """Give the folder of a run of 12 images in 6 files, as if a driver had ended it."""
    _, scorer, out = begin_run(image_folder, shard_images_first=2, shard_images_max=2)
    for shard in range(6):
        scorer.score_shard(shard)
    run = read_run(out)
    write_json(record_place(out, "done.json"), {"run_id": run.run_id, "bundle_id": run.bundle_id, "rows": 12})
    return out


@pytest.mark.parametrize(("rows_per_file", "files"), [(5, [5, 5, 2]), (12, [12]), (100, [12]), (1, [1] * 12)])
def test_rows_stay_as_they_are(finished, tmp_path, rows_per_file, files):
    to = str(tmp_path / "few")
    outcome = compact(finished, to=to, rows_per_file=rows_per_file)
    assert (outcome["rows"], outcome["files_before"], outcome["files"]) == (12, 6, len(files))
    assert [pq.read_metadata(path).num_rows for path in sorted(Path(to).glob("*.parquet"))] == files
    pd.testing.assert_frame_equal(pd.read_parquet(to), pd.read_parquet(finished))
    assert read_predictions(to)["phash"].dtype == "Int64"
    assert compact(finished, to=to, rows_per_file=3) == outcome, "once finished, it is finished"


def test_onto_s3(finished, s3):
    compact(finished, to=f"{s3}/few", rows_per_file=7)
    assert len(list_files(f"{s3}/few")) == 2
    pd.testing.assert_frame_equal(read_predictions(f"{s3}/few"), read_predictions(finished))


def test_interrupted_begins_anew(finished, tmp_path, monkeypatch):
    to = str(tmp_path / "few")
    write = module.write_table

    def write_two(table, place, **more):
        if place.endswith("2.parquet"):
            raise StorageError("full")
        write(table, place, **more)

    monkeypatch.setattr(module, "write_table", write_two)
    with pytest.raises(StorageError):
        compact(finished, to=to, rows_per_file=5)
    monkeypatch.setattr(module, "write_table", write)
    assert compact(finished, to=to, rows_per_file=12)["files"] == 1
    assert len(pd.read_parquet(to)) == 12


def test_a_run_without_rows_can_still_be_read(finished, begin_run, image_folder, tmp_path):
    """All is known from an earlier run."""
    out, to = str(tmp_path / "none"), str(tmp_path / "few")
    _, scorer, _ = begin_run(image_folder, out=out, since=finished)
    assert scorer.score_shard(0).known == 12
    run = read_run(out)
    write_json(record_place(out, "done.json"), {"run_id": run.run_id, "bundle_id": run.bundle_id, "rows": 0})
    assert compact(out, to=to)["files"] == 1
    assert pd.read_parquet(to).columns.tolist() == run.columns


def test_refusals_are_sentences(finished, tmp_path):
    with pytest.raises(SettingsError, match="lies in .*twice"):
        compact(finished, to=f"{finished}/few")
    with pytest.raises(SettingsError, match="no finished run"):
        compact(str(tmp_path / "none"), to=str(tmp_path / "few"))
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(SettingsError, match=r"already holds something else, as '.*x\.parquet'"):
        compact(finished, to=str(tmp_path))
    assert (tmp_path / "x.parquet").exists()


def test_a_compacted_run_is_no_unfinished_one(finished, tmp_path, capsys):
    compact(finished, to=str(tmp_path / "few"))
    capsys.readouterr()
    assert len(read_predictions(str(tmp_path / "few"))) == 12
    assert "unfinished" not in capsys.readouterr().err

"""Parquet files of an object store are read by ranges: a small one in one request, a large one without the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from carray.core.errors import StorageError
from carray.core.store import files, objects
from carray.core.store.files import write_bytes
from carray.core.store.random_access import open_dataset, open_file


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def asked(monkeypatch):
    ranges, real = [], objects.get_range
    monkeypatch.setattr(objects, "get_range", lambda *args: ranges.append(args[1:]) or real(*args))
    return ranges


def packed(rows):
    sink = pa.BufferOutputStream()
    table = pa.table({"uri": [f"{i}.jpg" for i in range(rows)], "x": np.random.default_rng(0).random(rows)})
    pq.write_table(table, sink, row_group_size=5_000)
    return sink.getvalue().to_pybytes()


def test_a_small_file_is_one_request(s3, asked):
    write_bytes(f"{s3}/a.parquet", packed(10))
    assert pq.read_table(open_file(f"{s3}/a.parquet")).num_rows == 10
    assert len(asked) == 1


def test_a_footer_of_a_large_file_is_one_request(s3, asked):
    write_bytes(f"{s3}/a.parquet", packed(50_000))
    assert pq.read_metadata(open_file(f"{s3}/a.parquet")).num_rows == 50_000
    assert len(asked) == 1


def test_a_dataset_reads_only_what_a_filter_may_match(root, asked):
    for name in ("a b.parquet", "b%41.parquet"):
        write_bytes(f"{root}/{name}", packed(50_000))
    data = open_dataset([f"{root}/a b.parquet", f"{root}/b%41.parquet"])
    found = data.to_table(columns=["x"], filter=pads.field("uri") == "7.jpg")
    assert found.num_rows == 2
    read = sum(end - start for start, end in asked if start >= 0)
    assert read < 2 * 400_000, "a tenth of the row groups, and not the files"


@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_every_byte_is_read(root, size):
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    write_bytes(f"{root}/file", data)
    with open_file(f"{root}/file") as file:
        assert file.read() == data
        file.seek(size // 3)
        assert file.read(5) == data[size // 3 : size // 3 + 5]
        assert file.size() == size


def test_an_outage_midway_is_outlasted_or_said(s3, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    write_bytes(f"{s3}/a.parquet", packed(50_000))
    real, failures = objects.get_range, [0]

    def fail(uri, start, end):
        if start >= 0 and failures[0]:
            failures[0] -= 1
            raise objects.StoreError("unavailable", "SlowDown", passing=True)
        return real(uri, start, end)

    monkeypatch.setattr(objects, "get_range", fail)
    failures[0] = files.TRIES - 1
    assert pq.read_table(open_file(f"{s3}/a.parquet")).num_rows == 50_000
    failures[0] = 1_000
    with pytest.raises(StorageError, match="failed after 5 tries in .*SlowDown"):
        pq.read_table(open_file(f"{s3}/a.parquet"))

"""Tables: the declared schema whatever the rows hold, and a note of what the file is."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from carray.core.errors import SchemaError, StorageError
from carray.core.store.files import join
from carray.core.tables import read_table, table_from_rows, table_metadata, write_table

SCHEMA = pa.schema([("uri", pa.string()), ("year", pa.int16()), ("tags", pa.list_(pa.string()))])


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return join(root, "out", "table.parquet")


def test_round_trip_with_what_the_file_is(place):
    table = table_from_rows([{"uri": "a", "year": 2012, "tags": ["x"]}, {"uri": "ü"}], SCHEMA)
    write_table(table, place, kind="cars", version=3, provenance={"run_id": "r1"})
    assert table_metadata(place) == {"kind": "cars", "version": 3, "run_id": "r1"}
    found = read_table(place, kind="cars", required=["uri"])
    assert found.schema.equals(SCHEMA)
    assert found.to_pylist() == [{"uri": "a", "year": 2012, "tags": ["x"]}, {"uri": "ü", "year": None, "tags": None}]
    assert read_table(place, kind="cars", required=[], columns=["year"]).column_names == ["year"]


@pytest.mark.parametrize("rows", [[], [{}], [{"uri": None, "year": None, "tags": None}]])
def test_schema_is_the_same_without_values(tmp_path, rows):
    place = str(tmp_path / "empty.parquet")
    write_table(table_from_rows(rows, SCHEMA), place, kind="cars", version=1)
    assert pq.read_schema(place).equals(SCHEMA)
    assert pq.read_table(place).num_rows == len(rows)


def test_a_table_of_another_kind_is_refused(place):
    write_table(table_from_rows([], SCHEMA), place, kind="cars", version=1)
    with pytest.raises(SchemaError, match="is a table of cars, but a manifest is needed"):
        read_table(place, kind="manifest", required=["uri"])


def test_missing_columns_are_named_with_those_there_are(place):
    write_table(table_from_rows([], SCHEMA), place, kind="cars", version=1)
    with pytest.raises(SchemaError, match=r"lacks the column label, split; .*it has uri, year, tags"):
        read_table(place, kind="cars", required=["uri", "label", "split"])


def test_a_table_of_another_program_is_read(tmp_path):
    place = str(tmp_path / "foreign.parquet")
    pq.write_table(pa.table({"uri": ["a"]}), place)
    assert table_metadata(place) == {}
    assert read_table(place, kind="cars", required=["uri"]).num_rows == 1


def test_what_is_not_parquet_is_said(tmp_path):
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(SchemaError, match=r"text\.parquet is not a readable Parquet file"):
        read_table(str(tmp_path / "text.parquet"), kind="cars", required=[])


def test_absent_table(place):
    with pytest.raises(StorageError, match=r"table\.parquet does not exist"):
        read_table(place, kind="cars", required=[])

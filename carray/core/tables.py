"""Writes and reads Parquet tables with a declared schema, and with kind, version and provenance in the metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from carray.core.errors import SchemaError, StorageError
from carray.core.store.files import retry, write_bytes
from carray.core.store.random_access import open_file
from carray.core.text import one_line

__all__ = [
    "file_note",
    "hashes_as_int64",
    "pack_table",
    "read_table",
    "table_from_rows",
    "table_metadata",
    "unpack_table",
    "write_table",
]

_KEY = b"carray"


def hashes_as_int64(table: pa.Table) -> pa.Table:
    """Convert unsigned 64-bit columns, which tables of version 1 have, to signed ones of the same bits."""
    for i, field in enumerate(table.schema):
        if field.type == pa.uint64():
            chunks = [chunk.view(pa.int64()) for chunk in table.column(i).chunks]
            table = table.set_column(i, field.name, pa.chunked_array(chunks, pa.int64()))
    return table


def table_from_rows(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Build a table of exactly `schema`, even without rows, from row mappings; an absent key is a null."""
    return pa.Table.from_pylist(list(rows), schema=schema)


def write_table(table: pa.Table, uri: str, *, kind: str, version: int, provenance: Mapping[str, Any] = {}) -> None:
    """Write one Parquet file, atomically, with kind, version and provenance in its metadata.

    Raises:
        StorageError: every try failed.
    """
    write_bytes(uri, pack_table(table, kind=kind, version=version, provenance=provenance))


def pack_table(table: pa.Table, *, kind: str, version: int, provenance: Mapping[str, Any] = {}) -> bytes:
    """Give the bytes of such a file."""
    note = json.dumps({"kind": kind, "version": version, **provenance}, ensure_ascii=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _KEY: note.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def unpack_table(data: bytes, uri: str) -> tuple[pa.Table, dict[str, Any]]:
    """Read a table and its note from the bytes of a file.

    Raises:
        SchemaError: they are no Parquet file.
    """
    table = _read(lambda: _whole(pq.read_table(pa.BufferReader(data))), uri)
    return table, _note(table.schema, uri)


def file_note(uri: str) -> tuple[int, dict[str, Any]]:
    """Give a file's number of rows and its note, from its footer.

    Raises:
        StorageError: the file cannot be read.
        SchemaError: the file is not Parquet.
    """
    found = _read(lambda: pq.read_metadata(open_file(uri)), uri)
    return int(found.num_rows), _note(found, uri)


def table_metadata(uri: str) -> dict[str, Any]:
    """Read the kind, version and provenance of `write_table`; empty for another program's table.

    Raises:
        StorageError: the file cannot be read.
        SchemaError: the file is not Parquet.
    """
    return file_note(uri)[1]


def read_table(uri: str, *, kind: str, required: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet table that has at least the required columns.

    Raises:
        SchemaError: the file is not Parquet, is a carray table of another kind, or lacks a required column.
        StorageError: the file does not exist or cannot be read.
    """
    file = _read(lambda: open_file(uri), uri)
    schema = _read(lambda: pq.read_schema(file), uri)
    found = _note(schema, uri).get("kind", kind)
    if found != kind:
        raise SchemaError(f"{uri} is a table of {found}, but a {kind} is needed here.")
    missing = [name for name in required if name not in schema.names]
    if missing:
        raise SchemaError(
            f"{uri} lacks the column {', '.join(missing)}; a {kind} needs {', '.join(required)} (it has "
            f"{', '.join(schema.names) or 'none'})."
        )
    names = columns and list(columns)
    return _read(lambda: _whole(pq.read_table(file, columns=names, partitioning=None)), uri)


def _whole(table: pa.Table) -> pa.Table:
    """Check that all texts of a table are UTF-8, which Parquet's reader does not."""
    table.validate(full=True)
    return table


def _note(schema: Any, uri: str) -> dict[str, Any]:
    try:
        note = json.loads((schema.metadata or {}).get(_KEY, b"{}"))
    except (ValueError, RecursionError):
        note = None
    if not isinstance(note, dict):
        raise SchemaError(f"{uri} holds metadata of carray that is not JSON; it was damaged, so write it again.")
    return note


def _read(action: Any, uri: str) -> Any:
    try:
        return retry(action, what=f"reading {uri}")
    except FileNotFoundError:
        raise StorageError(f"{uri} does not exist; check its spelling.") from None
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = one_line(err, 200)
        raise SchemaError(
            f"{uri} is not a readable Parquet file ({reason}); it was damaged or is something else."
        ) from None

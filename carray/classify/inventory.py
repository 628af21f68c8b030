"""Reads an S3 Inventory, the list of a bucket that the store writes every day, as a stream.

From: its `manifest.json`, which names files of keys in CSV (gzip), Parquet or ORC. To: pieces of rows, with etag and
size. Invariants: only what the bucket holds now: no older versions, no delete markers; a file is used only if its md5
is the one that the manifest gives. Memory: one batch; disk: one file at a time, in the temporary folder.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.sources import Source, file_mark, take_rows
from carray.core.errors import SchemaError, StorageError
from carray.core.store.files import exists, filesystem, is_s3, join, read_json, retry
from carray.core.store.listing import Gap, Take

__all__ = ["InventorySource"]

_ROWS = 32_768
_CHUNK_BYTES = 1 << 22
_NAMES = {
    **{"Bucket": "bucket", "Key": "key", "Size": "size", "ETag": "e_tag"},
    **{"IsLatest": "is_latest", "IsDeleteMarker": "is_delete_marker"},
}
"""A column's name in a manifest's fileSchema for CSV, and in Parquet and ORC."""


class InventorySource(Source):
    """Is an inventory, by its manifest."""

    def __init__(self, uri: str, settings: ClassifySettings) -> None:
        super().__init__(uri, settings)
        self.mark = file_mark(uri)
        manifest = read_json(uri)
        try:
            self._bucket = str(manifest["sourceBucket"])
            self._format = str(manifest["fileFormat"]).upper()
            self._files = [(str(file["key"]), str(file.get("MD5checksum") or "")) for file in manifest["files"]]
            self._store = str(manifest["destinationBucket"]).rsplit(":", 1)[-1]
            self._schema = str(manifest["fileSchema"])
        except (KeyError, TypeError, AttributeError) as err:
            raise SchemaError(
                f"{uri} is no manifest of an S3 Inventory ({err!r} fails); give another source."
            ) from None
        if self._format not in _READERS:
            raise SchemaError(f"{uri} is of files in {self._format}; read are {', '.join(_READERS)}.")

    def list(self, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
        """Give the inventory's keys, file by file in the manifest's order.

        Raises:
            SchemaError: a file lacks a column or is not of its format.
            StorageError: a file does not exist, cannot be read or is not the one that the manifest means.
        """
        take_rows(self._batches(), take, gaps=gaps, stop=stop)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        for key, md5 in self._files:
            place = self._place(key)
            with tempfile.NamedTemporaryFile() as file:
                _copy(place, file, md5)
                try:
                    for batch in _READERS[self._format](file.name, self._schema):
                        yield self._current(batch, place)
                except (pa.ArrowException, ValueError, LookupError, OSError) as err:  # the copy is local: it is damaged
                    reason = " ".join(str(err).split())[:200]
                    raise SchemaError(f"{place} is not a readable {self._format} inventory ({reason}).") from None

    def _place(self, key: str) -> str:
        """Find a file of the inventory: where the manifest says, or beside a manifest that was copied elsewhere."""
        beside = join(self.uri.rsplit("/", 2)[0], "data", key.rsplit("/", 1)[-1])
        return beside if not is_s3(self.uri) and exists(beside) else f"s3://{self._store}/{key}"

    def _current(self, rows: pa.RecordBatch, place: str) -> pa.RecordBatch:
        names = rows.schema.names
        if "key" not in names:
            raise SchemaError(f"{place} has no column of keys; it has {', '.join(names)}.")
        for name, wanted in (("is_latest", True), ("is_delete_marker", False)):
            if name in names:
                rows = rows.filter(pc.equal(_as_bool(rows[name]), wanted))
        keys = rows["key"].cast(pa.string())
        if self._format == "CSV":
            keys = _unquoted(keys)
        etags = rows["e_tag"].cast(pa.string()) if "e_tag" in names else pa.nulls(len(rows), pa.string())
        sizes = rows["size"].cast(pa.int64()) if "size" in names else pa.nulls(len(rows), pa.int64())
        uris = pc.binary_join_element_wise(f"s3://{self._bucket}/", keys, "")
        columns = {"uri": uris, "escaped": pa.repeat(False, len(rows)), "etag": etags, "size_bytes": sizes}
        batch = pa.record_batch(columns)
        batch.validate(full=True)  # Arrow's readers take it on trust that a text is UTF-8
        return batch


def _copy(place: str, file: Any, md5: str) -> None:
    fs, path = filesystem(place)

    def read() -> str:
        digest = hashlib.md5(usedforsecurity=False)
        file.seek(0)
        file.truncate()
        with fs.open_input_stream(path, compression=None) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        return digest.hexdigest()

    try:
        found = retry(read, what=f"reading {place}")
    except FileNotFoundError:
        raise StorageError(f"{place}, which the inventory's manifest names, does not exist.") from None
    if md5 and found != md5.lower():
        raise StorageError(f"{place} has the md5 {found}, but the inventory's manifest says {md5}; fetch it again.")


def _read_csv(path: str, schema: str) -> Iterator[pa.RecordBatch]:
    names = [_NAMES.get(name.strip(), name.strip()) for name in schema.split(",")]
    wanted = [name for name in names if name in _NAMES.values()]
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    with pa.input_stream(path, compression="gzip" if packed else None) as stream:
        yield from pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(column_names=names, block_size=_CHUNK_BYTES),
            convert_options=pa.csv.ConvertOptions(
                include_columns=wanted,
                column_types=dict.fromkeys(wanted, pa.string()),
                strings_can_be_null=True,
                null_values=[""],
                quoted_strings_can_be_null=True,
            ),
        )


def _read_parquet(path: str, _schema: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as file:
        names = {_plain(name): name for name in file.schema_arrow.names}
        wanted = {name: names[_plain(name)] for name in _NAMES.values() if _plain(name) in names}
        for batch in file.iter_batches(_ROWS, columns=list(wanted.values())):
            yield pa.record_batch({name: batch[old] for name, old in wanted.items()})


def _read_orc(path: str, _schema: str) -> Iterator[pa.RecordBatch]:
    from pyarrow import orc

    file = orc.ORCFile(path)
    names = {_plain(name): name for name in file.schema.names}
    wanted = {name: names[_plain(name)] for name in _NAMES.values() if _plain(name) in names}
    for stripe in range(file.nstripes):
        batch = file.read_stripe(stripe, columns=list(wanted.values()))
        yield pa.record_batch({name: batch[old] for name, old in wanted.items()})


_READERS: dict[str, Callable[[str, str], Iterator[pa.RecordBatch]]] = {
    "CSV": _read_csv,
    "PARQUET": _read_parquet,
    "ORC": _read_orc,
}


def _plain(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def _as_bool(column: pa.Array) -> pa.Array:
    return column if pa.types.is_boolean(column.type) else pc.equal(pc.utf8_lower(column.cast(pa.string())), "true")


def _unquoted(keys: pa.Array) -> pa.Array:
    if not pc.any(pc.match_substring_regex(keys, "[%+]")).as_py():
        return keys
    return pa.array([unquote_plus(key) for key in keys.to_pylist()], pa.string())

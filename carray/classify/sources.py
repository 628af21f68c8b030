"""Opens what is to be scored: a folder, an `s3://` prefix, an S3 Inventory, or a manifest or other table of URIs.

A `Source` gives its images piece by piece, in memory for a few pieces, whatever its length. A row of a file has its
number as its key, so that an interrupted listing goes on behind the rows that shards hold; that the file is still the
same is told by its mark. Keys without an image's suffix are counted by suffix, repetitions of a (uri, box) by number.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote_plus

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import SHARD_SCHEMA
from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import absolute, exists, file_state, is_s3, join, read_json, retry
from carray.core.store.listing import Gap, Piece, Take, list_pieces
from carray.core.store.random_access import open_file
from carray.core.uri_tables import BATCH_ROWS, BOX, TABLE_SUFFIXES, UriTable

__all__ = ["Source", "open_source"]


def open_source(source: str, settings: ClassifySettings, *, uses_boxes: bool) -> Source:
    """Open what is asked to be scored; boxes are kept only for a bundle that was trained on them.

    Raises:
        SettingsError: `split` or `column` is given for a source that has none.
        StorageError: a table or an inventory does not exist.
    """
    source = absolute(source)
    is_folder = not is_s3(source) and os.path.isdir(source)
    if source.lower().endswith(TABLE_SUFFIXES) and not is_folder:
        return TableSource(source, settings, uses_boxes=uses_boxes)
    if settings.split is not None:
        raise SettingsError(
            f"split is {settings.split!r}, but {source} is no manifest; leave it out or give a manifest."
        )
    if settings.column:
        raise SettingsError(
            f"column is {settings.column}, but {source} is no table ({', '.join(TABLE_SUFFIXES)}); leave it out."
        )
    if source.endswith("/manifest.json") and not is_folder:
        return InventorySource(source, settings)
    return Source(source, settings)


class Source:
    """A folder or prefix, and the base of the other sources; its counts are known once it has been listed."""

    by_suffix: bool
    """Whether only keys with an image's suffix are images; a table is taken whole."""
    repeated: int = 0
    """Rows of a table that repeat another's uri (and box)."""
    boxes: bool = False
    """Whether any image has a box."""
    mark: dict[str, Any] | None = None
    """What tells this state of a table from another; None where changes do not matter."""

    def __init__(self, uri: str, settings: ClassifySettings) -> None:
        self.uri, self.by_suffix = uri, not settings.all_files

    def list(self, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
        """Give every piece of the wanted parts to `take`, from one thread or more, until the end or `stop`.

        Raises:
            SchemaError: a table or an inventory is not what it should be.
            StorageError: the source does not exist or cannot be listed.
        """
        list_pieces(self.uri, take, stop=stop, gaps=gaps, threads=threads)


def file_mark(uri: str) -> dict[str, Any]:
    """Say which state of a file this is, by its size and time.

    Raises:
        StorageError: it does not exist.
    """
    found = file_state(uri)
    if found is None:
        raise StorageError(f"{uri} does not exist; check its spelling.")
    return {"uri": uri, "size_bytes": found.size_bytes, "mtime_ns": found.modified_ns}


def take_rows(batches: Iterable[pa.RecordBatch], take: Take, *, gaps: Sequence[Gap], stop: threading.Event) -> None:
    """Hand over rows in order, those in `gaps` only; a row's key is its number, from 1."""
    begin = 0
    after = {number: gap[0] for number, gap in enumerate(gaps)}
    for batch in batches:
        if stop.is_set():
            return
        for number, (first, last) in enumerate(gaps):
            low = max(int(first or 0), begin)
            high = min(begin + batch.num_rows, int(last) if last is not None else begin + batch.num_rows)
            if low < high:
                keys = [_row_key(row + 1) for row in range(low, high)]
                rows = batch.slice(low - begin, high - low)
                take(Piece(number, rows, keys, after[number], keys[-1], last == keys[-1]))
                after[number] = keys[-1]
        begin += batch.num_rows
    nothing = pa.record_batch({"uri": pa.array([], pa.string())})
    for number, (_, last) in enumerate(gaps):
        if last is None:
            take(Piece(number, nothing, [], after[number], None, True))


def _row_key(row: int) -> str:
    return f"{row:012d}"


class TableSource(Source):
    """A table of URIs (Parquet, CSV, TSV; a manifest is one): each (uri, box) once, in the table's order.

    It is refused whole or taken whole. It is read twice: first it is checked and its repetitions are found, by DuckDB,
    on disk where memory does not hold them.
    """

    def __init__(self, uri: str, settings: ClassifySettings, *, uses_boxes: bool) -> None:
        super().__init__(uri, settings)
        self.by_suffix = False
        self.mark = file_mark(uri)
        self._split = settings.split
        needed = (*(["split"] if self._split else []), *(BOX if uses_boxes else []))
        # What is said of columns that this job does not read is not looked at.
        named = {str(what): name for what, name in settings.column.items() if what in ("uri", *needed)}
        self._table = UriTable(uri, optional=needed, hints=("escaped", "etag", "size_bytes"), named=named)
        if self._split is not None and "split" not in self._table.columns:
            raise SettingsError(
                f"split is {self._split!r}, but {uri} has no column split; leave it out or give a manifest."
            )
        self._boxes = [name for name in BOX if name in self._table.columns]

    def list(self, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
        """Check the table, then give its rows, without repetitions.

        Raises:
            SchemaError: a uri is missing or a bucket's, a box incomplete, or the file cannot be read as a table.
            StorageError: storage refused it.
        """
        with tempfile.TemporaryDirectory() as folder:
            repeats = self._find_repeats(folder, stop)
            take_rows(self._unrepeated(repeats), take, gaps=gaps, stop=stop)

    def _find_repeats(self, folder: str, stop: threading.Event) -> Iterator[npt.NDArray[np.int64]]:
        import duckdb

        names = ["uri", *self._boxes]
        connection = duckdb.connect(
            f"{folder}/rows.duckdb", config={"memory_limit": "512MB", "temp_directory": folder, "threads": 2}
        )
        columns = ["number BIGINT", "uri VARCHAR", *(f"{name} INTEGER" for name in self._boxes)]
        connection.execute(f"CREATE TABLE rows ({', '.join(columns)})")
        number = 0
        for batch in self._batches():
            if stop.is_set():
                break
            arrays = [pa.array(np.arange(number, number + batch.num_rows)), *(batch[name] for name in names)]
            connection.register("batch", pa.Table.from_arrays(arrays, names=["number", *names]))
            connection.execute("INSERT INTO rows SELECT * FROM batch")
            number += batch.num_rows
            self.boxes |= any(batch[name].null_count < batch.num_rows for name in self._boxes)
        nth = f"row_number() OVER (PARTITION BY {', '.join(names)} ORDER BY number)"
        found = connection.sql(
            f"SELECT number FROM (SELECT number, {nth} AS nth FROM rows) WHERE nth > 1 ORDER BY number"
        )
        return (batch["number"].to_numpy() for batch in found.to_arrow_reader(BATCH_ROWS))

    def _unrepeated(self, repeats: Iterator[npt.NDArray[np.int64]]) -> Iterator[pa.RecordBatch]:
        self.repeated, number = 0, 0
        ahead = next(repeats, None)
        for batch in self._batches():
            end, here = number + batch.num_rows, []
            while ahead is not None and ahead[0] < end:
                here.append(ahead[ahead < end] - number)
                ahead = ahead[ahead >= end] if ahead[-1] >= end else next(repeats, None)
            number = end
            kept = np.ones(batch.num_rows, bool)
            if here:
                kept[np.concatenate(here)] = False
                self.repeated += int((~kept).sum())
            yield batch.filter(pa.array(kept)) if here else batch

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Give the table's rows of the split, in the columns of a shard that it has."""
        from carray.manifest.tables import table_splits  # imports pandas, which other sources do without

        for rows in self._table.batches():
            columns = {"uri": rows.uris(), "escaped": rows.flags("escaped")}
            for name in ("etag", "size_bytes"):
                if name in rows.columns:
                    columns[name] = rows.hint(name, SHARD_SCHEMA.field(name).type)
            batch = pa.record_batch(columns | rows.boxes())
            if self._split is not None:
                batch = batch.filter(pc.fill_null(pc.equal(table_splits(rows), self._split), False))
            yield batch


_ROWS = 32_768
_CHUNK_BYTES = 1 << 22
_NAMES = {
    **{"Bucket": "bucket", "Key": "key", "Size": "size", "ETag": "e_tag"},
    **{"IsLatest": "is_latest", "IsDeleteMarker": "is_delete_marker"},
}
"""A column's name in a manifest's fileSchema for CSV, and in Parquet and ORC."""


class InventorySource(Source):
    """An S3 Inventory, the list of a bucket that the store writes every day, by its `manifest.json`.

    Its files are CSV (gzip), Parquet or ORC, and are used only if their md5 is the one that the manifest gives. Older
    versions and delete markers are left out. Disk: one file at a time, in the temporary folder.
    """

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
            uri = self._file_uri(key)
            with tempfile.NamedTemporaryFile() as file:
                _copy(uri, file, md5)
                try:
                    for batch in _READERS[self._format](file.name, self._schema):
                        yield self._current(batch, uri)
                except (pa.ArrowException, ValueError, LookupError, OSError) as err:  # the copy is local: it is damaged
                    reason = " ".join(str(err).split())[:200]
                    raise SchemaError(f"{uri} is not a readable {self._format} inventory ({reason}).") from None

    def _file_uri(self, key: str) -> str:
        """Find a file of the inventory: where the manifest says, or beside a manifest that was copied elsewhere."""
        beside = join(self.uri.rsplit("/", 2)[0], "data", key.rsplit("/", 1)[-1])
        return beside if not is_s3(self.uri) and exists(beside) else f"s3://{self._store}/{key}"

    def _current(self, rows: pa.RecordBatch, uri: str) -> pa.RecordBatch:
        names = rows.schema.names
        if "key" not in names:
            raise SchemaError(f"{uri} has no column of keys; it has {', '.join(names)}.")
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


def _copy(uri: str, file: Any, md5: str) -> None:

    def read() -> str:
        digest = hashlib.md5(usedforsecurity=False)
        file.seek(0)
        file.truncate()
        with open_file(uri) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        return digest.hexdigest()

    try:
        found = retry(read, what=f"reading {uri}")
    except FileNotFoundError:
        raise StorageError(f"{uri}, which the inventory's manifest names, does not exist.") from None
    if md5 and found != md5.lower():
        raise StorageError(f"{uri} has the md5 {found}, but the inventory's manifest says {md5}; fetch it again.")


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

"""Reads a table of URIs (Parquet, CSV, TSV; a manifest is one) as a stream, each (uri, box) once, in the table's order.

From: a file with the column uri and perhaps escaped, split, etag, size_bytes and x1, y1, x2, y2. To: pieces of rows.
Invariants: a table is refused whole or taken whole; relative URIs are relative to it. It is read twice: first it is
checked and its repetitions are found, by DuckDB, on disk where memory does not hold them.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.listing import Gap, Take
from carray.core.storage import absolute, filesystem, is_s3, join, retry
from carray.core.tables import table_metadata
from carray.predictions.format import ClassifySettings
from carray.predictions.shards import BOX, SHARD_SCHEMA
from carray.predictions.sources import Source, file_mark, take_rows

__all__ = ["TableSource"]

_ROWS = 32_768
"""Rows read at once."""
_WHOLE_S3 = r"^s3://[^/@]+/(?s:.)"
_ODD_PATH = r"^[^/]|//|/\.|/$"
"""What a local path that needs completing has; a URI that is neither whole nor plain is looked at by itself."""
_TYPES = {"uri": "string", "split": "string", "etag": "string", "size_bytes": "Int64", **dict.fromkeys(BOX, "Int32")}


class TableSource(Source):
    """Is a table of URIs."""

    def __init__(self, uri: str, settings: ClassifySettings, *, uses_boxes: bool) -> None:
        super().__init__(uri, settings)
        self.by_suffix = False
        self.mark = file_mark(uri)
        self._split = settings.split
        self._columns = _columns(uri)
        if self._split is not None and "split" not in self._columns:
            raise SettingsError(
                f"split is {self._split!r}, but {uri} has no column split; leave it out or give a manifest."
            )
        self._boxed = uses_boxes and set(BOX) <= set(self._columns)

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

        checks = _Checks(self.uri)
        names = ["uri", *(BOX if self._boxed else ())]

        connection = duckdb.connect(
            f"{folder}/rows.duckdb", config={"memory_limit": "512MB", "temp_directory": folder, "threads": 2}
        )
        connection.execute(f"CREATE TABLE rows (place BIGINT, {', '.join(_SQL[name] for name in names)})")
        place = 0
        for batch in self._batches(checks):
            if stop.is_set():
                break
            columns = [pa.array(np.arange(place, place + batch.num_rows)), *(batch[name] for name in names)]
            connection.register("batch", pa.Table.from_arrays(columns, names=["place", *names]))
            connection.execute("INSERT INTO rows SELECT * FROM batch")
            place += batch.num_rows
        checks.finish()
        self.boxes = self._boxed and checks.boxes > 0
        nth = f"row_number() OVER (PARTITION BY {', '.join(names)} ORDER BY place)"
        found = connection.sql(f"SELECT place FROM (SELECT place, {nth} AS nth FROM rows) WHERE nth > 1 ORDER BY place")
        return (batch["place"].to_numpy() for batch in found.to_arrow_reader(_ROWS))

    def _unrepeated(self, repeats: Iterator[npt.NDArray[np.int64]]) -> Iterator[pa.RecordBatch]:
        self.repeated, place = 0, 0
        ahead = next(repeats, None)
        for batch in self._batches(None):
            end, here = place + batch.num_rows, []
            while ahead is not None and ahead[0] < end:
                here.append(ahead[ahead < end] - place)
                ahead = ahead[ahead >= end] if ahead[-1] >= end else next(repeats, None)
            place = end
            kept = np.ones(batch.num_rows, bool)
            if here:
                kept[np.concatenate(here)] = False
                self.repeated += int((~kept).sum())
            yield batch.filter(pa.array(kept)) if here else batch

    def _batches(self, checks: _Checks | None) -> Iterator[pa.RecordBatch]:
        """Give the table's rows of the split, with complete URIs; with `checks`, check them first."""
        for rows in _read(self.uri, self._columns):
            if checks is not None:
                checks.check_uris(rows)
            if self._split is not None:
                rows = rows.filter(pc.fill_null(pc.equal(rows["split"], self._split), False))
            if checks is not None and self._boxed:
                checks.check_boxes(rows)
            names = [name for name in SHARD_SCHEMA.names if name in rows.schema.names]
            names = [name for name in names if self._boxed or name not in BOX]
            columns = {name: rows[name] for name in names} | {"uri": self._complete(rows["uri"])}
            escaped = columns.get("escaped")
            columns["escaped"] = pa.repeat(False, len(rows)) if escaped is None else pc.fill_null(escaped, False)
            yield pa.record_batch(columns)

    def _complete(self, uris: pa.Array) -> pa.Array:
        if uris.null_count:  # counted, and refused in the end
            return uris
        whole, odd = (pc.match_substring_regex(uris, pattern) for pattern in (_WHOLE_S3, _ODD_PATH))
        if pc.all(pc.or_(whole, pc.invert(odd))).as_py():
            return uris
        folder = self.uri.rsplit("/", 1)[0]
        complete = []
        for uri in uris.to_pylist():
            whole = absolute(uri if uri.startswith(("/", "~")) or "://" in uri else join(folder, uri))
            if is_s3(whole) and not whole.removeprefix("s3://").partition("/")[2]:
                raise SchemaError(
                    f"{self.uri} has the uri {whole!r}, a bucket and not an image; write s3://bucket/key."
                )
            complete.append(whole)
        return pa.array(complete, pa.string())


_SQL = {"uri": "uri VARCHAR", **{name: f"{name} INTEGER" for name in BOX}}


class _Checks:
    """Counts what is wrong in a table, so that one sentence says how much."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._rows = self._empty = self._first_empty = self._partial = self.boxes = 0
        self._first_partial = ""

    def check_uris(self, rows: pa.RecordBatch) -> None:
        empty = np.flatnonzero(pc.fill_null(pc.equal(rows["uri"], ""), True).to_numpy(zero_copy_only=False))
        if len(empty) and not self._empty:
            self._first_empty = self._rows + int(empty[0])
        self._empty += len(empty)
        self._rows += rows.num_rows

    def check_boxes(self, rows: pa.RecordBatch) -> None:
        missing = sum(pc.is_null(rows[name]).to_numpy(zero_copy_only=False).astype(int) for name in BOX)
        partial = np.flatnonzero((missing > 0) & (missing < len(BOX)))
        if len(partial) and not self._partial:
            self._first_partial = rows["uri"][int(partial[0])].as_py()
        self._partial += len(partial)
        self.boxes += int((missing == 0).sum())

    def finish(self) -> None:
        if self._empty:
            raise SchemaError(
                f"{self._uri} has {self._empty} rows without a uri, the first is row {self._first_empty}; name them."
            )
        if self._partial:
            raise SchemaError(
                f"{self._uri} has {self._partial} incomplete boxes, the first is of {self._first_partial!r}; give all "
                "of x1, y1, x2, y2, or none."
            )


def _columns(source: str) -> list[str]:
    """Give the columns of a table that matter here."""
    if source.lower().endswith(".parquet"):
        table_metadata(source)  # refuses in a sentence what is no Parquet
        fs, path = filesystem(source)
        names = retry(lambda: pq.read_schema(path, filesystem=fs), what=f"reading {source}").names
    else:
        names = list(next(_text_chunks(source, nrows=0)).columns)
    if "uri" not in names:
        raise SchemaError(f"{source} lacks the column uri; it has {', '.join(map(str, names)) or 'none'}.")
    return [name for name in [*SHARD_SCHEMA.names, "split"] if name in names]


def _read(source: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    types = {**{field.name: field.type for field in SHARD_SCHEMA}, "split": pa.string()}
    schema = pa.schema([(name, types[name]) for name in columns])
    if not source.lower().endswith(".parquet"):
        for rows in _text_chunks(source, chunksize=_ROWS):
            yield pa.RecordBatch.from_pandas(rows[columns], schema=schema, preserve_index=False)
        return
    fs, path = filesystem(source)
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            for batch in file.iter_batches(_ROWS, columns=columns):
                rows = batch.select(columns).cast(schema)
                rows.validate(full=True)  # Parquet's reader takes it on trust that a text is UTF-8
                yield rows
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = " ".join(str(err).split())[:200]
        raise SchemaError(f"{source} is not a readable table of URIs ({reason}); mend it.") from None
    except OSError as err:
        if not is_s3(source) and err.errno is None:  # the disk answered: what it holds is damaged
            raise SchemaError(f"{source} is not a readable table of URIs ({err}); mend it.") from None
        raise StorageError(f"reading {source} broke off ({' '.join(str(err).split())}); run it again.") from err


def _text_chunks(source: str, **options: Any) -> Iterator[pd.DataFrame]:
    fs, path = filesystem(source)
    try:
        with fs.open_input_file(path) as file:
            rows = pd.read_csv(
                file,
                sep="\t" if source.lower().endswith(".tsv") else ",",
                dtype={**_TYPES, "escaped": "boolean"},
                keep_default_na=False,  # a file may be called NA or null: only an empty field is a missing one
                na_values=[""],
                encoding="utf-8-sig",  # spreadsheets put a byte order mark before the first column's name
                **options,
            )
            yield from [rows] if isinstance(rows, pd.DataFrame) else rows
    except (ValueError, pd.errors.ParserError) as err:
        raise SchemaError(
            f"{source} is not a readable CSV or TSV table ({' '.join(str(err).split())[:200]}); mend it."
        ) from None
    except OSError as err:
        raise StorageError(f"reading {source} broke off ({' '.join(str(err).split())}); run it again.") from err

"""Reads a table of URIs (Parquet, CSV, TSV; a manifest is one) as a stream, each (uri, box) once, in the table's order.

From: a file with the column uri and perhaps escaped, split, etag, size_bytes and x1, y1, x2, y2 (`core.uri_tables`).
To: pieces of rows.
Invariants: a table is refused whole or taken whole. It is read twice: first it is checked and its repetitions are
found, by DuckDB, on disk where memory does not hold them.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import SHARD_SCHEMA
from carray.classify.sources import Source, file_mark, take_rows
from carray.core.errors import SettingsError
from carray.core.store.listing import Gap, Take
from carray.core.uri_tables import BATCH_ROWS, BOX, UriTable
from carray.manifest.tables import table_splits

__all__ = ["TableSource"]


class TableSource(Source):
    """Is a table of URIs."""

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
        columns = ["place BIGINT", "uri VARCHAR", *(f"{name} INTEGER" for name in self._boxes)]
        connection.execute(f"CREATE TABLE rows ({', '.join(columns)})")
        place = 0
        for batch in self._batches():
            if stop.is_set():
                break
            arrays = [pa.array(np.arange(place, place + batch.num_rows)), *(batch[name] for name in names)]
            connection.register("batch", pa.Table.from_arrays(arrays, names=["place", *names]))
            connection.execute("INSERT INTO rows SELECT * FROM batch")
            place += batch.num_rows
            self.boxes |= any(batch[name].null_count < batch.num_rows for name in self._boxes)
        nth = f"row_number() OVER (PARTITION BY {', '.join(names)} ORDER BY place)"
        found = connection.sql(f"SELECT place FROM (SELECT place, {nth} AS nth FROM rows) WHERE nth > 1 ORDER BY place")
        return (batch["place"].to_numpy() for batch in found.to_arrow_reader(BATCH_ROWS))

    def _unrepeated(self, repeats: Iterator[npt.NDArray[np.int64]]) -> Iterator[pa.RecordBatch]:
        self.repeated, place = 0, 0
        ahead = next(repeats, None)
        for batch in self._batches():
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

    def _batches(self) -> Iterator[pa.RecordBatch]:
        """Give the table's rows of the split, in the columns of a shard that it has."""
        for rows in self._table.batches():
            columns = {"uri": rows.uris(), "escaped": rows.flags("escaped")}
            for name in ("etag", "size_bytes"):
                if name in rows.columns:
                    columns[name] = rows.hint(name, SHARD_SCHEMA.field(name).type)
            batch = pa.record_batch(columns | rows.boxes())
            if self._split is not None:
                batch = batch.filter(pc.fill_null(pc.equal(table_splits(rows), self._split), False))
            yield batch

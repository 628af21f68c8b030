"""Answers SQL over opened tables, in a DuckDB that can neither write nor reach any other file.

From: opened tables by name. To: a connection in which each is a view, or a frame.
Invariants: DuckDB reads local Parquet itself (several times as fast as through Arrow, by its row groups' statistics)
and may open exactly those files; everything else, S3 included, comes through Arrow, without the column embedding, whose
half floats DuckDB takes from Parquet only (`read_predictions` reads it anywhere). Memory is bounded: joins and sorts
that exceed MEMORY_BYTES spill into a temporary folder, which is removed. Only the answer must fit into memory.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from carray.core.errors import SchemaError, SettingsError
from carray.core.leftovers import scratch_folder
from carray.queries.guard import check_sql
from carray.queries.labels import open_labels
from carray.queries.plain_types import plain_relation
from carray.queries.reading import open_predictions, to_frame

__all__ = ["MEMORY_BYTES", "ask", "connect", "query"]

MEMORY_BYTES = 4 * 2**30
"""What DuckDB may hold, or half of the machine's memory where that is less: a laptop's share."""

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATTERN = set("*?[]{}")
"""What DuckDB would read as a pattern of file names."""


def query(
    path: str,
    sql: str,
    *,
    other: str | None = None,
    labels: str | None = None,
    column: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """Answer one SELECT over the table `predictions`, in DuckDB's dialect.

    Args:
        path: the output folder of a classification, or one Parquet file.
        sql: the query; a single one, that only reads.
        other: another run, which the query sees as the table `other`.
        labels: a table of true labels or a manifest, which the query sees as the table `labels`.
        column: which column of the labels is which, such as {"uri": "path"}, where their names do not say it.
        limit: rows of the answer at most; None or 0 for all.

    Raises:
        SchemaError: a folder holds no predictions, or a file is damaged.
        SettingsError: DuckDB refuses the query, or it is not a single reading one.
        StorageError: the files cannot be read.
    """
    tables = {"predictions": open_predictions(path)}
    if other is not None:
        tables["other"] = open_predictions(other)
    if labels is not None:
        tables["labels"] = open_labels(labels, column)
    with connect(tables) as connection:
        check_sql(connection, sql)
        answer = plain_relation(connection.sql(sql))
        return to_frame((answer.limit(limit) if limit else answer).to_arrow_table())


def ask(tables: Mapping[str, pads.Dataset], sql: str, parameters: Sequence[Any] = ()) -> pd.DataFrame:
    """Answer one question of our own over opened tables; foreign words stand in its parameters only.

    Raises:
        SchemaError: a file is damaged.
    """
    with connect(tables) as connection:
        return to_frame(connection.sql(sql, params=list(parameters)).to_arrow_table())


@contextmanager
def connect(tables: Mapping[str, pads.Dataset]) -> Iterator[Any]:
    """Give a DuckDB connection that sees these tables and nothing else; its errors become sentences.

    SQL from outside must pass `guard.check_sql` first.

    Raises:
        SchemaError: a table's file is damaged.
        SettingsError: the query is refused, or needs more memory and disk than there is.
    """
    import duckdb

    with scratch_folder("carray-query-") as folder:
        limits: dict[str, Any] = {"memory_limit": f"{_memory_bytes() // 2**20}MiB", "temp_directory": folder}
        with duckdb.connect(":memory:", config=limits) as connection, _interruptible(connection):
            try:
                _lock(connection, [file for data in tables.values() for file in _own_files(data)])
                for name, data in tables.items():
                    _show(connection, name, data)
                yield connection
            except duckdb.Error as err:
                raise _sentence(err, tables) from None


@contextmanager
def _interruptible(connection: Any) -> Iterator[None]:
    """Let a signal end a query: while DuckDB computes, no handler of Python's is called."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)
    ended = threading.Event()

    def watch() -> None:
        while came := read_end.recv(1):
            while came[0] in _STOPS and not ended.wait(0.1):
                connection.interrupt()

    before = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        write_end.close()
        thread.join()
        read_end.close()


def _lock(connection: Any, files: Sequence[str]) -> None:
    # Whoever may ask a question may not thereby read or write this machine's other files.
    connection.execute(f"SET allowed_paths = [{', '.join(map(_quoted, files))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET lock_configuration = true")


def _show(connection: Any, name: str, data: pads.Dataset) -> None:
    files = _own_files(data)
    if files:
        listed = ", ".join(map(_quoted, files))
        connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet([{listed}], hive_partitioning = false)")
    else:
        known = [field for field in data.schema if not _is_half_float(field.type)]
        connection.register(name, data if len(known) == len(data.schema) else data.replace_schema(pa.schema(known)))


def _own_files(data: pads.Dataset) -> list[str]:
    """Give the files of a table that DuckDB reads itself: all of them, or none."""
    if not isinstance(data, pads.FileSystemDataset) or not isinstance(data.format, pads.ParquetFileFormat):
        return []
    is_local = isinstance(data.filesystem, pafs.LocalFileSystem)
    return list(data.files) if is_local and not any(_PATTERN & set(file) for file in data.files) else []


def _is_half_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float16(kind.value_type if pa.types.is_list(kind) else kind))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _memory_bytes() -> int:
    return min(MEMORY_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _sentence(err: Exception, tables: Mapping[str, pads.Dataset]) -> Exception:
    import duckdb

    message = " ".join(str(err).split("\n\n")[0].split()).rstrip(".:")
    files = [file for data in tables.values() for file in getattr(data, "files", ())]
    named = next((file for file in files if file in message), None)
    # What DuckDB's Parquet reader finds broken inside of a page has no class of its own and names no file.
    is_reading = type(err) is duckdb.Error or isinstance(err, duckdb.IOException) or "the stream registered" in message
    if named is not None or (is_reading and files):
        where = named or f"a file of {os.path.dirname(files[0])}"
        return SchemaError(f"{where} is not readable Parquet ({message[:300]}); it was damaged, so write it again.")
    if isinstance(err, duckdb.OutOfMemoryException):
        limit = f"{_memory_bytes() / 2**30:.3g} GB"
        return SettingsError(f"the answer needs more than {limit} of memory ({message[:200]}); ask for less of it.")
    return SettingsError(f"the SQL is refused ({message}); the tables are {', '.join(tables)}.")

"""Answers SQL over opened tables, in a DuckDB that can neither write nor open any other file.

DuckDB reads local Parquet itself, several times as fast as through Arrow; S3 and the rest come through Arrow, without
the column embedding, whose half floats DuckDB reads from Parquet only. Beyond MEMORY_BYTES it spills to disk.

DuckDB's own lock is not enough: it may write the files that it may read, and since 2.0 a SELECT may contain
`WITH x AS (COPY ... TO 'part-000000.parquet')`. So a user's statement, as DuckDB parses it, may contain queries only,
and no function that reads files or has side effects.
"""

from __future__ import annotations

import json
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

from carray.core.errors import SchemaError, SettingsError
from carray.core.leftovers import scratch_folder
from carray.core.text import one_line
from carray.queries.reading import open_labels, open_predictions, plain_relation, to_frame

__all__ = ["MEMORY_BYTES", "ask", "check_sql", "connect", "query"]

MEMORY_BYTES = 4 * 2**30
"""DuckDB's memory limit, or half of the machine's memory where that is less."""

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATTERN = set("*?[]{}")
"""Characters that DuckDB reads as a pattern of file names."""
_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series", "json_each", "json_tree"}
"""Table functions that read nothing but their arguments."""


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
        sql: one SELECT.
        other: another run, the table `other` of the query.
        labels: a table of true labels or a manifest, the table `labels` of the query.
        column: column names of the labels, such as {"uri": "path"}, where they differ from uri and label.
        limit: the most rows to return; None or 0 for all.

    Raises:
        SchemaError: a folder holds no predictions, or a file is damaged.
        SettingsError: DuckDB refuses the query, or it is not one SELECT.
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


def check_sql(connection: Any, sql: str) -> None:
    """Accept one SELECT, in any of DuckDB's forms (FROM first, WITH, DESCRIBE, SUMMARIZE, PIVOT ... IN).

    Raises:
        SettingsError: it is no SQL, more than one statement or none, changes something, or reads outside its tables.
    """
    import duckdb

    if any("\ud800" <= char <= "\udfff" for char in sql):  # a shell's argument that is not UTF-8
        raise SettingsError(f"the SQL is refused ({ascii(sql)[:80]} is not Unicode); write it in UTF-8.")
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as err:
        reason = one_line(str(err).split("\n\n")[0])
        raise SettingsError(f"the SQL is refused ({reason}); the one table is predictions.") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        kinds = " and ".join(str(statement.type).rpartition(".")[2] for statement in statements) or "nothing"
        raise SettingsError(f"the SQL is refused (it is {kinds}); write one SELECT over the table predictions.")
    for node in _syntax_nodes(connection, sql):
        kind, function = str(node.get("type", "")), node.get("function")
        name = str(function.get("function_name", "")).lower() if isinstance(function, dict) else ""
        if kind.endswith("_NODE") and kind not in _QUERY_NODES:
            what = kind.split("_")[0]
            raise SettingsError(f"the SQL is refused (it holds {what}); it may read the table predictions, not write.")
        if kind == "TABLE_FUNCTION" and name not in _TABLE_FUNCTIONS:
            raise SettingsError(
                f"the SQL is refused (it calls {name}, which reads outside its tables); the one table is predictions."
            )


def _syntax_nodes(connection: Any, sql: str) -> Iterator[dict[str, Any]]:
    """Yield every node of a statement's syntax tree, as DuckDB parses it."""
    text = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchall()[0][0]
    try:
        tree = json.loads(text)
    except RecursionError:
        raise SettingsError("the SQL is refused (it is nested too deep to be checked); write it flatter.") from None
    if tree.get("error", True):
        reason = one_line(tree.get("error_message", "not understood"))
        raise SettingsError(f"the SQL is refused ({reason}); write one SELECT over the table predictions.")
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def ask(tables: Mapping[str, pads.Dataset], sql: str, parameters: Sequence[Any] = ()) -> pd.DataFrame:
    """Answer one of our own queries over opened tables; text from outside goes into `parameters` only.

    Raises:
        SchemaError: a file is damaged.
    """
    with connect(tables) as connection:
        return to_frame(connection.sql(sql, params=list(parameters)).to_arrow_table())


@contextmanager
def connect(tables: Mapping[str, pads.Dataset]) -> Iterator[Any]:
    """Open a DuckDB connection to these tables only; its errors become sentences.

    A user's SQL must pass `check_sql` first.

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
    """Interrupt a query on a signal, since Python runs no signal handler while DuckDB computes."""
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
    """List the files of a table that DuckDB reads itself: all of them, or none."""
    if not isinstance(data, pads.FileSystemDataset) or not isinstance(data.format, pads.ParquetFileFormat):
        return []
    is_local = data.filesystem.type_name == "local"
    return list(data.files) if is_local and not any(_PATTERN & set(file) for file in data.files) else []


def _is_half_float(kind: pa.DataType) -> bool:
    return bool(pa.types.is_float16(kind.value_type if pa.types.is_list(kind) else kind))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _memory_bytes() -> int:
    return min(MEMORY_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)


def _sentence(err: Exception, tables: Mapping[str, pads.Dataset]) -> Exception:
    import duckdb

    message = one_line(str(err).split("\n\n")[0]).rstrip(".:")
    files = [file for data in tables.values() for file in getattr(data, "files", ())]
    named = next((file for file in files if file in message), None)
    # On damage inside a Parquet page DuckDB raises its base class and names no file.
    is_reading = type(err) is duckdb.Error or isinstance(err, duckdb.IOException) or "the stream registered" in message
    if named is not None or (is_reading and files):
        where = named or f"a file of {os.path.dirname(files[0])}"
        return SchemaError(f"{where} is not readable Parquet ({message[:300]}); it was damaged, so write it again.")
    if isinstance(err, duckdb.OutOfMemoryException):
        limit = f"{_memory_bytes() / 2**30:.3g} GB"
        return SettingsError(f"the answer needs more than {limit} of memory ({message[:200]}); ask for less of it.")
    return SettingsError(f"the SQL is refused ({message}); the tables are {', '.join(tables)}.")

"""Opens predictions and tables of true labels, and reads them as pandas frames.

Only data files are read, never `_carray/`; columns and filters are pushed down into the files; an unfinished run is
read with a warning. Types that not all of frame, CSV, JSON and Parquet can hold become DuckDB's text of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, join, list_files, retry
from carray.core.store.random_access import open_dataset
from carray.core.tables import table_metadata
from carray.core.text import did_you_mean, one_line
from carray.core.uri_tables import UriTable
from carray.manifest.labels import normalise_labels, whole_number_labels

__all__ = [
    "check_columns",
    "open_labels",
    "open_predictions",
    "plain_relation",
    "read_predictions",
    "to_frame",
    "unique_names",
]

T = TypeVar("T")

_DONE, _COMPACTED = "_carray/done.json", "_carray/compact.json"
_TYPES = {
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Nullable types: pandas' defaults turn a year in a column with nulls into 2012.0."""


def read_predictions(
    path: str, columns: Sequence[str] | None = None, filters: Sequence[Any] | None = None
) -> pd.DataFrame:
    """Read predictions as a frame whose dtypes do not depend on the rows.

    Args:
        path: the output folder of a classification, or one Parquet file.
        columns: the columns to read, in this order; all by default.
        filters: conditions as in pandas, all of which must hold: `[("score", "<", 0.5), ("make", "==", "Audi")]`; of
            a list of such lists, one must hold.

    Raises:
        SchemaError: the folder holds no predictions, or a column is not among theirs.
        SettingsError: the filters are not understood.
        StorageError: the files cannot be read.
    """
    data = open_predictions(path)
    check_columns([*(columns or ()), *_filtered_columns(filters)], data.schema)
    chosen, condition = list(columns) if columns is not None else None, _expression(filters, data.schema)
    return _guarded(lambda: to_frame(data.to_table(columns=chosen, filter=condition)), path)


def open_predictions(path: str) -> pads.Dataset:
    """Open the data files of a run; reads only the first one's schema.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    path = absolute(path)
    if path.endswith(".parquet") and exists(path):
        files = [path]
    else:
        files = [uri for uri in list_files(path) if uri.endswith(".parquet")]
        if not files:
            raise SchemaError(
                f"{path} holds no Parquet file, so it is no folder of predictions; give the --out of carray classify."
            )
        if not any(exists(join(path, marker)) for marker in (_DONE, _COMPACTED)):
            _warn_unfinished(path)
    data = _open_parquet(files, path)
    # Arrow raises on a column name that is not UTF-8 only here.
    names = _guarded(lambda: list(data.schema.names), path)
    missing = [name for name in ("uri", "status", "score") if name not in names]
    if missing:
        raise SchemaError(
            f"{path} lacks the column {', '.join(missing)}, so it is no folder of predictions (it has "
            f"{', '.join(names)}); give the --out of carray classify."
        )
    return data


def open_labels(path: str, column: Mapping[str, str] | None = None) -> pads.Dataset:
    """Open a table of true labels: a manifest, or a Parquet, CSV or TSV file with the columns uri and label.

    A user's table is read as `carray prepare` reads it, and held in memory; a manifest is not. `column` maps uri, label
    or split to the table's own column names.

    Raises:
        SchemaError: it lacks the column uri or label, or is no such table.
        StorageError: it does not exist or cannot be read.
    """
    path = absolute(path)
    if not exists(path):
        raise StorageError(f"{path} does not exist; give a manifest, or a Parquet, CSV or TSV file with uri and label.")
    if path.lower().endswith(".parquet") and table_metadata(path).get("kind") == "manifest":
        return _open_parquet([path], path)
    table = UriTable(path, required=("uri", "label"), optional=("split",), named=column, keep_others=True)
    batches = [pa.table(rows.columns | {"uri": rows.uris(), "label": rows.texts("label")}) for rows in table.batches()]
    if not batches:
        return pads.dataset(pa.table({name: pa.array([], pa.string()) for name in table.columns}))
    whole = pa.concat_tables(batches)
    labels, _ = normalise_labels(whole_number_labels(pd.Series(whole["label"].to_pandas(), dtype="string")))
    whole = whole.set_column(whole.schema.get_field_index("label"), "label", pa.array(labels, pa.string()))
    return pads.dataset(whole if table.is_parquet else _infer_types(whole))


def _infer_types(table: pa.Table) -> pa.Table:
    """Convert a text file's other columns to numbers where all cells are numbers, so that SQL can compare them."""
    for i, name in enumerate(table.schema.names):
        if name not in ("uri", "label", "split"):
            cells = pd.Series(table[name].to_pandas(), dtype="string").replace("", pd.NA)
            with suppress(ValueError, TypeError):
                cells = pd.to_numeric(cells)
            table = table.set_column(i, name, pa.array(cells))
    return table


def check_columns(names: Sequence[str], schema: pa.Schema) -> None:
    """Check that the predictions have these columns.

    Raises:
        SchemaError: there is no such column; the sentence names a similar one, or all.
    """
    for name in names:
        if name not in schema.names:
            hint = did_you_mean(name, schema.names, f"there are {', '.join(schema.names)}.")
            raise SchemaError(f"{name!r} is not a column of these predictions; {hint}")


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Convert a table to a frame; integers and booleans stay so beside nulls."""
    table = table.replace_schema_metadata(None)  # pandas' metadata in the file may be damaged
    frame: pd.DataFrame = _plain_columns(table).to_pandas(types_mapper=_TYPES.get, maps_as_pydicts="strict")
    return frame


def _open_parquet(files: Sequence[str], path: str) -> pads.Dataset:
    return _guarded(lambda: open_dataset(files), path)


def _guarded(action: Callable[[], T], path: str) -> T:
    """Run a read, repeat it on transient failures, and turn other errors into sentences."""
    try:
        return retry(action, what=f"reading {path}")
    except FileNotFoundError as err:
        raise StorageError(f"{path} lost a file while it was read ({err}); try again.") from None
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = one_line(err, 300)
        raise SchemaError(f"{path} holds a file that is not readable Parquet ({reason}); classify again.") from None


@lru_cache  # once a process: a report asks a run many questions
def _warn_unfinished(path: str) -> None:
    say(f"warning: {path} is unfinished (it has no {_DONE}); run the same carray classify again to finish it.")


def _filtered_columns(filters: Sequence[Any] | None) -> list[str]:
    conditions = [c for part in filters or () for c in (part if isinstance(part, list) else [part])]
    if not all(isinstance(c, tuple) and len(c) == 3 and isinstance(c[0], str) for c in conditions):
        raise SettingsError(f"filters is {filters!r}; write conditions as [('score', '<', 0.5)].")
    return [c[0] for c in conditions]


def _expression(filters: Sequence[Any] | None, schema: pa.Schema) -> Any:
    from pyarrow.parquet import filters_to_expression

    if not filters:
        return None
    try:
        expression = filters_to_expression(list(filters))
        pads.Scanner.from_batches(schema.empty_table().to_batches(), schema=schema, filter=expression)
        return expression
    except (ValueError, TypeError, pa.ArrowNotImplementedError) as err:
        raise SettingsError(f"filters is {filters!r}: {one_line(err, 200).rstrip('.')}.") from None


_KEPT = set(
    "boolean tinyint smallint integer bigint utinyint usmallint uinteger ubigint hugeint decimal float double varchar "
    "uuid null".split()
) | {'"null"'}
_KEPT_AT_THE_TOP = {
    *("enum", "blob", "date", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamp with time zone"),
}
"""Kept as columns, where `_within_years` checks them; inside lists they become texts."""
_YEARS = np.datetime64("0001-01-01"), np.datetime64("9999-12-31T23:59:59.999999")
"""The range of Python's dates; DuckDB's is 290,000 years either way."""


def plain_relation(answer: Any) -> Any:
    """Cast a DuckDB relation's columns that cannot be kept to text, and number repeated names: uri, uri_1."""
    names, types = unique_names(answer.columns), [_plain(kind, top=True) for kind in answer.types]
    if names == answer.columns and not any(types):
        return answer
    columns = [
        f"CAST(#{i} AS {kind}) AS {_quoted(name)}" if kind else f"#{i} AS {_quoted(name)}"
        for i, (name, kind) in enumerate(zip(names, types, strict=True), start=1)
    ]
    return answer.project(", ".join(columns))


def unique_names(names: Sequence[str]) -> list[str]:
    """Number repeated names as pandas does: a, a_1, a_2."""
    taken, unique = set(names), list[str]()
    for name in names:
        new, number = name, 0
        while new in unique or (number and new in taken):
            number += 1
            new = f"{name}_{number}"
        unique.append(new)
    return unique


def _plain_columns(table: pa.Table) -> pa.Table:
    """Convert decimals to integers or floats, and values beyond 64 bits or Python's dates to texts."""
    for i, field in enumerate(table.schema):
        column = table.column(i)
        if pa.types.is_decimal(field.type):
            column = _undecimal(column)
        elif pa.types.is_date(field.type) or pa.types.is_timestamp(field.type):
            column = _within_years(column)
        if column is not table.column(i):
            table = table.set_column(i, field.name, column)
    return table


def _plain(kind: Any, *, top: bool) -> str | None:
    """Choose the type to cast to; None where the type is kept."""
    if kind.id in _KEPT or (top and kind.id in _KEPT_AT_THE_TOP):
        return None
    if kind.id not in ("list", "array", "struct", "map"):
        return "VARCHAR"
    children = [(name, child) for name, child in kind.children if name != "size"]
    if kind.id == "struct" and not all(name for name, _ in children):
        return "VARCHAR"  # made by row() of an older DuckDB, whose fields have no names
    inside = [_plain(child, top=False) for _, child in children]
    if not any(inside):
        return None
    written = [new or str(child) for new, (_, child) in zip(inside, children, strict=True)]
    if kind.id == "struct":
        fields = (f"{_quoted(name)} {new}" for (name, _), new in zip(children, written, strict=True))
        return f"STRUCT({', '.join(fields)})"
    return f"MAP({', '.join(written)})" if kind.id == "map" else f"{written[0]}[]"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _undecimal(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert DuckDB's 128-bit sums to integers, or to digits where they exceed 64 bits."""
    if column.type.scale:
        return column.cast(pa.float64())
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.string())


def _within_years(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Convert a column with a date outside Python's years to texts in ISO 8601, or "infinity"."""
    is_date = pa.types.is_date(column.type)
    unit = "D" if is_date else column.type.unit
    whole = column.cast(pa.int32() if pa.types.is_date32(column.type) else pa.int64())
    times_N = whole.cast(pa.int64()).fill_null(0).to_numpy().astype(f"datetime64[{unit}]")
    if ((times_N >= _YEARS[0]) & (times_N <= _YEARS[1])).all():
        return column
    ends = np.iinfo(np.int32 if is_date else np.int64).max
    zone = "" if is_date or column.type.tz is None else "+00:00"
    # A negative year has four digits, too: -0043 is 44 BC.
    texts_N = np.array(
        [re.sub(r"^-(\d+)", lambda year: f"-{year[1]:0>4}", text) + zone for text in np.datetime_as_string(times_N)],
        dtype=object,
    )
    texts_N[times_N.astype(np.int64) == ends] = "infinity"
    texts_N[times_N.astype(np.int64) == -ends] = "-infinity"
    return pa.chunked_array([pa.array(texts_N, pa.string(), mask=column.is_null().to_numpy())])

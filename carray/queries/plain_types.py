"""Converts DuckDB's types to those that a frame, CSV, JSON and Parquet all hold.

Kept are booleans, numbers, texts, bytes, dates, timestamps, and lists, structs and maps of them. A value that cannot be
kept becomes DuckDB's own text of it; none is rounded or cut, except decimals with places, which become floats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["plain_columns", "plain_relation", "unique_names"]

_KEPT = set(
    "boolean tinyint smallint integer bigint utinyint usmallint uinteger ubigint hugeint decimal float double varchar "
    "uuid null".split()
) | {'"null"'}
_KEPT_AT_THE_TOP = {
    *("enum", "blob", "date", "timestamp", "timestamp_s", "timestamp_ms", "timestamp_ns", "timestamp with time zone"),
}
"""Kept as columns, where values out of range can be seen; inside lists they become texts."""
_YEARS = np.datetime64("0001-01-01"), np.datetime64("9999-12-31T23:59:59.999999")
"""The range of Python's dates; DuckDB's reach 290,000 years to both sides."""


def plain_relation(answer: Any) -> Any:
    """Cast the columns of a DuckDB relation that cannot be kept, and number repeated names: uri, uri_1."""
    names, types = unique_names(answer.columns), [_plain(kind, top=True) for kind in answer.types]
    if names == answer.columns and not any(types):
        return answer
    columns = [
        f"CAST(#{i} AS {kind}) AS {_quoted(name)}" if kind else f"#{i} AS {_quoted(name)}"
        for i, (name, kind) in enumerate(zip(names, types, strict=True), start=1)
    ]
    return answer.project(", ".join(columns))


def unique_names(names: Sequence[str]) -> list[str]:
    """Number repeated names, as pandas does: a, a_1, a_2; the first of each stays as it is."""
    taken, unique = set(names), list[str]()
    for name in names:
        new, number = name, 0
        while new in unique or (number and new in taken):
            number += 1
            new = f"{name}_{number}"
        unique.append(new)
    return unique


def plain_columns(table: pa.Table) -> pa.Table:
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
    """Name the type to cast to; None where the type is kept."""
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
    """Convert DuckDB's sums, of 128 bits, to integers; those beyond 64 bits to digits."""
    if column.type.scale:
        return column.cast(pa.float64())
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column.cast(pa.string())


def _within_years(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Leave a column within Python's years as it is, else convert it to texts in ISO 8601, or "infinity"."""
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

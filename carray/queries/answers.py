"""Writes an answer as a table for a terminal, as CSV, JSON or Parquet.

Keys, labels and errors are text from outside: a terminal gets no control characters, and a CSV cell that a spreadsheet
would run as a formula gets an apostrophe. JSON and Parquet hold texts unchanged; in JSON infinity and NaN are null.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import write_bytes
from carray.core.store.image_bytes import key_suffix
from carray.core.tables import write_table
from carray.core.text import readable
from carray.queries.reading import unique_names

__all__ = ["FORMATS", "choose_format", "jsonable", "write_answer"]

FORMATS = ("table", "csv", "json", "parquet")
_SUFFIXES = {"txt": ("table", "csv", "json"), "csv": ("csv",), "json": ("json",), "parquet": ("parquet",), "": FORMATS}
"""The formats allowed for a file's suffix; the first is the default."""
_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
"""First characters of a formula: https://owasp.org/www-community/attacks/CSV_Injection"""
_CELL = 80
"""The most characters of a text in a table."""


def choose_format(format: str | None, out: str | None) -> str:
    """Choose the format: the given one, else that of the file's suffix, else a table.

    Raises:
        SettingsError: there is no such format, Parquet has no file to go to, or the file's suffix is unknown or of
            another format.
    """
    if format is not None and format not in FORMATS:
        raise SettingsError(f"--format is {format!r}; there are {', '.join(FORMATS)}.")
    if format == "parquet" and out is None:
        raise SettingsError("--format is 'parquet', which is not for a terminal; name a file with --out.")
    suffix = key_suffix(out or "")
    if suffix not in _SUFFIXES:
        allowed = ", ".join(f".{known}" for known in _SUFFIXES if known)
        raise SettingsError(f"--out {out!r} ends in .{suffix}, which is not written; allowed are {allowed}.")
    if format is not None and format not in _SUFFIXES[suffix]:
        raise SettingsError(f"--format is {format!r}, but --out {out!r} ends in .{suffix}; let one follow the other.")
    return format or _SUFFIXES[suffix][0]


def write_answer(frame: pd.DataFrame, *, format: str, out: str | None, origin: Mapping[str, Any]) -> str | None:
    """Write an answer to a file, or return it as text where `out` is None; `origin` is noted in a Parquet file.

    Raises:
        SettingsError: the format does not fit the file's suffix.
        StorageError: storage refused the file.
    """
    frame = frame.set_axis(unique_names(list(frame.columns)), axis="columns")
    if choose_format(format, out) == "parquet" and out is not None:
        write_table(_arrow(frame), out, kind="answer", version=1, provenance=origin)
        return None
    text = {"csv": _csv, "json": _json, "table": _table}[format](frame)
    if out is None:
        return text
    write_bytes(out, text.encode())
    return None


def _arrow(frame: pd.DataFrame) -> pa.Table:
    """Convert a frame to a table; columns without a Parquet type, such as maps by number, become JSON texts."""
    converted = frame.copy()
    for name in frame.columns[[bool(pd.api.types.is_object_dtype(kind)) for kind in frame.dtypes]]:
        try:
            pa.array(frame[name], from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            converted[name] = pd.array([_text(value) for value in frame[name]], dtype="string")
    return pa.Table.from_pandas(converted, preserve_index=False)


def _csv(frame: pd.DataFrame) -> str:
    guarded, count = frame.copy(), 0
    quoting: Literal[0, 2] = csv.QUOTE_MINIMAL
    for name in frame.columns:
        if not _is_text(frame[name]):
            continue
        texts = frame[name].astype(object).map(_plain, na_action="ignore")
        formulas = texts.map(lambda value: isinstance(value, str) and value.startswith(_FORMULA)).astype(bool)
        guarded[name] = texts.where(~formulas, "'" + texts.astype("string"))
        count += int(formulas.sum())
        # An unquoted carriage return would begin a new row.
        if texts.map(lambda value: isinstance(value, str) and "\r" in value).any():
            quoting = csv.QUOTE_NONNUMERIC
    if count:
        say(f"{count:,} cells begin like a formula and got an apostrophe; JSON and Parquet keep them as they are.")
    return guarded.to_csv(index=False, lineterminator="\n", quoting=quoting).rstrip("\n")


def _json(frame: pd.DataFrame) -> str:
    """Format as an array of objects, one a line, times in ISO 8601."""
    lines = (json.dumps(jsonable(row), ensure_ascii=False, allow_nan=False) for row in frame.to_dict("records"))
    return "[" + ",\n ".join(lines) + "]"


def _table(frame: pd.DataFrame) -> str:
    shown = frame.copy()
    for name in frame.columns:
        if _is_text(frame[name]):
            shown[name] = frame[name].astype(object).map(_for_terminal, na_action="ignore")
    shown.columns = [_for_terminal(name) for name in frame.columns]
    return shown.to_string(index=False, max_rows=1000, na_rep="", float_format="{:.4g}".format)


def _is_text(column: pd.Series) -> bool:
    kinds = pd.api.types
    # Arrow's dictionaries and DuckDB's ENUMs arrive as categories of texts.
    is_category = isinstance(column.dtype, pd.CategoricalDtype)
    return is_category or bool(kinds.is_object_dtype(column.dtype) or kinds.is_string_dtype(column.dtype))


def _plain(value: Any) -> Any:
    """Convert a list, such as the five likeliest labels, to JSON, and bytes to text; nothing else."""
    return _text(value) if isinstance(value, np.ndarray | list | dict | bytes) else value


def _text(value: Any) -> str | None:
    plain = jsonable(value)
    return plain if plain is None or isinstance(plain, str) else json.dumps(plain, ensure_ascii=False, allow_nan=False)


def jsonable(value: Any) -> Any:
    """Convert a value to what JSON holds: times in ISO 8601, bytes as DuckDB writes them, NaN and infinity as null."""
    if isinstance(value, np.ndarray | list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if isinstance(value, bytes):
        return "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02X}" for byte in value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, np.float32):
        value = float(str(value))  # 0.9, not 0.8999999761581421
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int) else getattr(value, "isoformat", value.__str__)()


def _for_terminal(value: Any) -> str:
    text = readable(_plain(value))
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"

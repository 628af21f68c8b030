"""Opens predictions, and reads them as pandas frames.

From: a folder of predictions (or one Parquet file of them), local or S3. To: frames with declared dtypes.
Invariants: only data files are read, never `_carray/`; columns and filters are pushed down into the files; an
unfinished run can be read, with a warning.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, filesystem, join, list_files, retry
from carray.queries.plain_types import plain_columns

__all__ = ["check_columns", "column_names", "guarded_read", "open_predictions", "read_predictions", "to_frame"]

T = TypeVar("T")

_DONE, _COMPACTED = "_carray/done.json", "_carray/compact.json"
_TYPES = {
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Whole numbers stay whole beside nulls; pandas' own default turns a year with gaps into 2012.0."""


def read_predictions(
    path: str, columns: Sequence[str] | None = None, filters: Sequence[Any] | None = None
) -> pd.DataFrame:
    """Read predictions as a frame, with the same dtypes whatever the rows hold.

    Args:
        path: the output folder of a classification, or one Parquet file.
        columns: the columns to read, in this order; all by default.
        filters: conditions as pandas takes them, `[("score", "<", 0.5), ("make", "==", "Audi")]`, which must all hold;
            a list of such lists holds when any of them does.

    Raises:
        SchemaError: the folder holds no predictions, or a column is not among theirs.
        SettingsError: the filters are not understood.
        StorageError: the files cannot be read.
    """
    data = open_predictions(path)
    check_columns([*(columns or ()), *_filtered_columns(filters)], data.schema)
    chosen, condition = list(columns) if columns is not None else None, _expression(filters, data.schema)
    return guarded_read(lambda: to_frame(data.to_table(columns=chosen, filter=condition)), path)


def open_predictions(path: str) -> pads.Dataset:
    """Open the data files of a run, reading no more than the first one's schema.

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
    fs, _ = filesystem(path)
    places = [filesystem(uri)[1] for uri in files]
    data = guarded_read(lambda: pads.dataset(places, filesystem=fs, format="parquet"), path)
    names = column_names(data, path)
    missing = [name for name in ("uri", "status", "score") if name not in names]
    if missing:
        raise SchemaError(
            f"{path} lacks the column {', '.join(missing)}, so it is no folder of predictions (it has "
            f"{', '.join(names)}); give the --out of carray classify."
        )
    return data


def column_names(data: pads.Dataset, path: str) -> list[str]:
    """Name the columns of an opened table.

    Raises:
        SchemaError: a name is not UTF-8, which Arrow finds when it is first asked.
    """
    return guarded_read(lambda: list(data.schema.names), path)


def guarded_read(action: Callable[[], T], path: str) -> T:
    """Run a reading action, again while storage's failure may be transient, and say in a sentence what stays wrong.

    Raises:
        SchemaError: a file is not Parquet.
        StorageError: a file vanished, or cannot be read.
    """
    try:
        return retry(action, what=f"reading {path}")
    except FileNotFoundError as err:
        raise StorageError(f"{path} lost a file while it was read ({err}); try again.") from None
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = " ".join(str(err).split())[:300]
        raise SchemaError(f"{path} holds a file that is not readable Parquet ({reason}); classify again.") from None


@lru_cache
def _warn_unfinished(path: str) -> None:
    """Say so once: a report asks a run many questions."""
    say(f"warning: {path} is unfinished (it has no {_DONE}); run the same carray classify again to finish it.")


def check_columns(names: Sequence[str], schema: pa.Schema) -> None:
    """Refuse a column that the predictions do not have.

    Raises:
        SchemaError: there is no such column; the sentence names one that is spelled alike, or all.
    """
    for name in names:
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(schema.names)}."
            raise SchemaError(f"{name!r} is not a column of these predictions; {hint}")


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Give a table as a frame whose whole numbers and booleans stay such beside nulls."""
    table = table.replace_schema_metadata(None)  # what the file itself tells pandas may be damaged, or anything
    frame: pd.DataFrame = plain_columns(table).to_pandas(types_mapper=_TYPES.get, maps_as_pydicts="strict")
    return frame


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
        raise SettingsError(f"filters is {filters!r}: {' '.join(str(err).split())[:200].rstrip('.')}.") from None

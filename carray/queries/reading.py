"""Opens predictions and tables of true labels, and reads them as pandas frames.

Only data files are read, never `_carray/`; columns and filters are pushed down into the files; an unfinished run can be
read, with a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, filesystem, join, list_files, retry
from carray.core.tables import table_metadata
from carray.core.text import did_you_mean, one_line
from carray.core.uri_tables import UriTable
from carray.manifest.labels import normalise_labels, whole_number_labels
from carray.queries.plain_types import plain_columns

__all__ = ["check_columns", "open_labels", "open_predictions", "read_predictions", "to_frame"]

T = TypeVar("T")

_DONE, _COMPACTED = "_carray/done.json", "_carray/compact.json"
_TYPES = {
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Nullable types, so that integers stay integers beside nulls; pandas' default makes a year with gaps 2012.0."""


def read_predictions(
    path: str, columns: Sequence[str] | None = None, filters: Sequence[Any] | None = None
) -> pd.DataFrame:
    """Read predictions as a frame whose dtypes do not depend on the rows.

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
    # Arrow finds a column name that is not UTF-8 only when it is first asked for the names.
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

    A user's table is read as `carray prepare` reads it, with the same column names and spellings of URIs and labels;
    it is held in memory whole, a manifest is not. `column` maps uri, label or split to the table's own column names.

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
    """Make a text file's other columns numbers where all their cells are, so that SQL can compare them."""
    for i, name in enumerate(table.schema.names):
        if name not in ("uri", "label", "split"):
            cells = pd.Series(table[name].to_pandas(), dtype="string").replace("", pd.NA)
            with suppress(ValueError, TypeError):
                cells = pd.to_numeric(cells)
            table = table.set_column(i, name, pa.array(cells))
    return table


def check_columns(names: Sequence[str], schema: pa.Schema) -> None:
    """Refuse a column that the predictions do not have.

    Raises:
        SchemaError: there is no such column; the sentence names a similar one, or all.
    """
    for name in names:
        if name not in schema.names:
            hint = did_you_mean(name, schema.names, f"there are {', '.join(schema.names)}.")
            raise SchemaError(f"{name!r} is not a column of these predictions; {hint}")


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Convert a table to a frame; integers and booleans stay such beside nulls."""
    table = table.replace_schema_metadata(None)  # a file's own notes to pandas may be damaged
    frame: pd.DataFrame = plain_columns(table).to_pandas(types_mapper=_TYPES.get, maps_as_pydicts="strict")
    return frame


def _open_parquet(files: Sequence[str], path: str) -> pads.Dataset:
    fs, _ = filesystem(path)
    paths = [filesystem(uri)[1] for uri in files]
    return _guarded(lambda: pads.dataset(paths, filesystem=fs, format="parquet"), path)


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

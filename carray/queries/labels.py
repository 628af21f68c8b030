"""Opens a table of true labels: a manifest, or any Parquet, CSV or TSV file with the columns uri and label.

Invariants: a user's table is read as `prepare` reads it (`core.uri_tables`, `manifest.labels`): the same names of
columns, spellings of URIs and of labels, so that a label is right or wrong by what it says. Memory: a manifest is
read piece by piece, a user's table is held whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import StorageError
from carray.core.store.files import absolute, exists, filesystem
from carray.core.tables import table_metadata
from carray.core.uri_tables import UriTable
from carray.manifest.labels import normalise_labels, whole_number_labels
from carray.queries.reading import guarded_read

__all__ = ["open_labels"]


def open_labels(path: str, column: Mapping[str, str] | None = None) -> pads.Dataset:
    """Open a table of true labels, local or S3; `column` says which column is which, where their names do not.

    Raises:
        SchemaError: it lacks the column uri or label, or is no such table.
        StorageError: it does not exist or cannot be read.
    """
    path = absolute(path)
    if not exists(path):
        raise StorageError(f"{path} does not exist; give a manifest, or a Parquet, CSV or TSV file with uri and label.")
    if path.lower().endswith(".parquet") and table_metadata(path).get("kind") == "manifest":
        fs, place = filesystem(path)
        return guarded_read(lambda: pads.dataset([place], filesystem=fs, format="parquet"), path)
    return pads.dataset(
        _read(UriTable(path, required=("uri", "label"), optional=("split",), named=column, keep_others=True))
    )


def _read(table: UriTable) -> pa.Table:
    batches = []
    for rows in table.batches():
        spelled = {"uri": rows.uris(), "label": rows.texts("label")}
        batches.append(pa.table(rows.columns | spelled))
    if not batches:
        return pa.table({name: pa.array([], pa.string()) for name in table.columns})
    whole = pa.concat_tables(batches)
    labels = pd.Series(whole["label"].to_pandas(), dtype="string")
    spelling, _ = normalise_labels(whole_number_labels(labels))
    whole = whole.set_column(whole.schema.get_field_index("label"), "label", pa.array(spelling, pa.string()))
    return whole if table.is_parquet else _typed(whole)


def _typed(whole: pa.Table) -> pa.Table:
    """Give a text file's other columns the type that all their cells have, so that SQL can compare numbers."""
    for i, name in enumerate(whole.schema.names):
        if name not in ("uri", "label", "split"):
            cells = pd.Series(whole[name].to_pandas(), dtype="string").replace("", pd.NA)
            with suppress(ValueError, TypeError):
                cells = pd.to_numeric(cells)
            whole = whole.set_column(i, name, pa.array(cells))
    return whole

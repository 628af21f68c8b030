"""Reads a user's table of images (CSV, TSV or Parquet, local or S3): uri, label and, if present, box and split.

Texts are not interpreted: `NA` is a class, only an empty cell is null.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import pyarrow as pa

from carray.core.errors import SchemaError
from carray.core.store.files import is_folder
from carray.core.tables import table_metadata
from carray.core.uri_tables import BOX, TABLE_SUFFIXES, TableRows, UriTable
from carray.manifest.candidates import Candidates, Source
from carray.manifest.folders import name_warnings
from carray.manifest.labels import whole_number_labels
from carray.manifest.manifest_file import SPLITS, given_split

__all__ = ["read_source_table", "read_table_source", "table_splits"]

_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), ("label", pa.string()), ("split", pa.string())]
    + [(name, pa.int32()) for name in BOX]
)


def read_table_source(source: Source) -> Candidates | None:
    """Read a source that is a table; None where it is none."""
    if not source.uri.lower().endswith(TABLE_SUFFIXES) or is_folder(source.uri):
        return None
    return read_source_table(source.uri, named=source.column, crop_boxes=source.crop_boxes)


def read_source_table(uri: str, *, named: Mapping[str, str] | None = None, crop_boxes: bool = False) -> Candidates:
    """Read a table of images; a wrong box is an error only with `crop_boxes`.

    `named` maps uri, label and the like to the table's column names, where they differ.

    Raises:
        SchemaError: a column is missing or ambiguous, a row uneven, a uri empty or of an unknown scheme, a split
            unknown, or, with `crop_boxes`, a box incomplete or not whole numbers.
        StorageError: the table does not exist or cannot be read.
    """
    if uri.lower().endswith(".parquet") and (kind := table_metadata(uri).get("kind", "manifest")) != "manifest":
        raise SchemaError(f"{uri} is a table of {kind}, but a manifest or your own table of labels is needed here.")
    table = UriTable(uri, required=("uri", "label"), optional=("split", *BOX), hints=("escaped",), named=named)
    boxes_left_out: str | None = None
    batches: list[pa.Table] = []
    for rows in table.batches():
        columns = {"uri": rows.uris(), "escaped": rows.flags("escaped"), "label": rows.texts("label")}
        if "split" in table.columns:
            columns["split"] = table_splits(rows)
        try:
            columns |= {} if boxes_left_out else rows.boxes()
        except SchemaError as err:
            if crop_boxes:
                raise
            boxes_left_out = str(err)
        nothing = {name: pa.nulls(len(rows), _SCHEMA.field(name).type) for name in _SCHEMA.names}
        batches.append(pa.table(nothing | columns, schema=_SCHEMA))
    whole = pa.concat_tables(batches or [_SCHEMA.empty_table()])
    frame = whole.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype(), pa.string(): pd.StringDtype()}.get)
    if boxes_left_out:  # in no row: half of the boxes would be worse than none
        frame[[*BOX]] = pd.NA
    frame["label"] = whole_number_labels(frame["label"])
    warnings = name_warnings(frame["label"].dropna().unique())
    return Candidates(uri, "table", frame.assign(folder="the table"), boxes_left_out=boxes_left_out, warnings=warnings)


def table_splits(rows: TableRows) -> pa.Array:
    """Read the split of each row of a table, null where its cell is empty.

    Raises:
        SchemaError: a cell names no split.
    """
    splits = []
    for row, text in enumerate(rows.texts("split").to_pylist()):
        name = (text or "").strip()
        splits.append(given_split(name) if name else None)
        if name and splits[-1] is None:
            raise SchemaError(
                f"{rows.where(row)}, has the split {name[:80]!r}; allowed are {', '.join(SPLITS)} and an empty cell."
            )
    return pa.array(splits, pa.string())

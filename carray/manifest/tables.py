"""Reads a user's table of images (CSV, TSV or Parquet, local or S3): uri, label and, if present, box and split.

Texts are not interpreted: `NA` is a class, only an empty cell is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa

from carray.core.errors import SchemaError
from carray.core.tables import table_metadata
from carray.core.uri_tables import BOX, TableRows, UriTable
from carray.manifest.labels import whole_number_labels
from carray.manifest.manifest_file import SPLITS, given_split

__all__ = ["SourceTable", "read_source_table", "table_splits"]

_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), ("label", pa.string()), ("split", pa.string())]
    + [(name, pa.int32()) for name in BOX]
)


@dataclass(frozen=True)
class SourceTable:
    """A table's rows, and what was left out of them."""

    rows: pd.DataFrame
    """Columns uri, escaped, label, split, x1, y1, x2, y2 (Int32)."""
    boxes_left_out: str | None = None
    """Why boxes that are not needed were not read; None where they were, or there are none."""


def read_source_table(uri: str, *, named: Mapping[str, str] | None = None, crop_boxes: bool = False) -> SourceTable:
    """Read a table of images; a wrong box is an error only with `crop_boxes`.

    `named` maps uri, label and the like to the table's column names, where they differ.

    Raises:
        SchemaError: a column is missing or ambiguous, a row uneven, a uri empty or of an unknown scheme, a split
            unknown, or, with `crop_boxes`, a box incomplete or not whole numbers.
        StorageError: the table does not exist or cannot be read.
    """
    _check_kind(uri)
    table = UriTable(uri, required=("uri", "label"), optional=("split", *BOX), hints=("escaped",), named=named)
    left_out: str | None = None
    batches: list[pa.Table] = []
    for rows in table.batches():
        columns = {"uri": rows.uris(), "escaped": rows.flags("escaped"), "label": rows.texts("label")}
        columns["split"] = table_splits(rows) if "split" in table.columns else pa.nulls(len(rows), pa.string())
        boxes: dict[str, pa.Array] = {}
        try:
            boxes = {} if left_out else rows.boxes()
        except SchemaError as err:
            if crop_boxes:
                raise
            left_out = str(err)
        nothing = pa.nulls(len(rows), pa.int32())
        batches.append(pa.table(columns | {name: boxes.get(name, nothing) for name in BOX}, schema=_SCHEMA))
    whole = pa.concat_tables(batches or [_SCHEMA.empty_table()])
    frame = whole.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype()}.get)
    frame = frame.astype({"uri": "string", "label": "string", "split": "string"})
    if left_out:  # in no row: half of the boxes would be worse than none
        frame = frame.assign(**{name: pd.array([pd.NA] * len(frame), dtype="Int32") for name in BOX})
    frame["label"] = whole_number_labels(frame["label"])
    frame.loc[frame["label"].isna(), "split"] = None
    return SourceTable(frame, left_out)


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


def _check_kind(uri: str) -> None:
    kind = table_metadata(uri).get("kind", "manifest") if uri.lower().endswith(".parquet") else "manifest"
    if kind != "manifest":
        raise SchemaError(f"{uri} is a table of {kind}, but a manifest or your own table of labels is needed here.")

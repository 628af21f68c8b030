"""Reads a user's table of images: CSV, TSV or Parquet with a uri and a label, perhaps a box and a split.

From: one table, local or S3. To: candidate rows (`manifest/sources.py`).
Invariants: every row of the table is a row here; a relative uri is relative to the table's folder; text is taken as it
stands, so a class called `NA` or `None` is a class; only an empty cell is null.
"""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.core.errors import SchemaError
from carray.core.storage import absolute, is_s3, join, read_bytes
from carray.core.tables import read_table
from carray.manifest.format import SPLITS, given_split

__all__ = ["TABLE_SUFFIXES", "read_source_table"]

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
_REQUIRED = ["uri", "label"]
_BOX = ["x1", "y1", "x2", "y2"]


def read_source_table(uri: str) -> pd.DataFrame:
    """Read a table of images into columns uri, escaped, label, split, x1, y1, x2, y2.

    Raises:
        SchemaError: a column is missing, a uri is empty, a split unknown, a box incomplete or not whole numbers.
        SettingsError: a uri has a scheme other than s3 or a local path.
        StorageError: the table does not exist or cannot be read.
    """
    table = _read_parquet(uri) if uri.lower().endswith(".parquet") else _read_text(uri)
    _check_columns(table, uri)
    texts = {name: _text(table[name]) for name in [*_REQUIRED, "split"] if name in table}
    if texts["uri"].isna().any():
        raise SchemaError(f"{uri} has no uri in {_place(texts['uri'].isna())}; every row needs one.")
    folder = uri.rsplit("/", 1)[0]
    rows = pd.DataFrame({"uri": [_resolve(name, folder) for name in texts["uri"]]}, dtype="string")
    rows["escaped"] = table["escaped"].astype(bool).to_numpy() if _is_flag(table, "escaped") else False
    rows["label"] = texts["label"].to_numpy()
    rows["split"] = _splits(texts["split"], uri).to_numpy() if "split" in texts else None
    rows.loc[rows["label"].isna(), "split"] = None
    for name in _BOX:
        rows[name] = _whole_numbers(table[name], uri).to_numpy() if name in table else pd.NA
    rows = rows.astype({"label": "string", "split": "string", **dict.fromkeys(_BOX, "Int32")})
    partial = rows[_BOX].isna().any(axis=1) & rows[_BOX].notna().any(axis=1)
    if partial.any():
        raise SchemaError(f"{uri} has an incomplete box in {_place(partial)}; give all of x1, y1, x2, y2, or none.")
    return rows


def _check_columns(table: pd.DataFrame, uri: str) -> None:
    needed = _REQUIRED + (_BOX if any(name in table for name in _BOX) else [])
    missing = [name for name in needed if name not in table]
    if missing:
        seen = ", ".join(map(str, table.columns)) or "none"
        raise SchemaError(
            f"{uri} lacks the column {', '.join(missing)}; a table of images needs uri and label, and may have "
            f"all of x1, y1, x2, y2, and split (it has {seen})."
        )


def _read_parquet(uri: str) -> pd.DataFrame:
    table = read_table(uri, kind="manifest", required=_REQUIRED)
    wanted = [name for name in [*_REQUIRED, "split", "escaped", *_BOX] if name in table.schema.names]
    name = ""
    try:
        # Without the file's own words to pandas, which may be anything.
        table = table.select(wanted).replace_schema_metadata(None)
        for name in ("uri", "label", "split"):
            if name in wanted:
                table = table.set_column(wanted.index(name), name, table[name].cast(pa.string()))
    except (pa.ArrowException, ValueError, LookupError) as err:
        raise SchemaError(f"{uri} has a column {name} that is not text ({' '.join(str(err).split())[:200]}).") from None
    return table.to_pandas()


def _read_text(uri: str) -> pd.DataFrame:
    separator = "\t" if uri.lower().endswith(".tsv") else ","
    data = io.BytesIO(read_bytes(uri))
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        return pd.read_csv(data, sep=separator, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig")
    except (ValueError, OverflowError) as err:  # pandas' own errors of damaged text are ValueErrors, too
        raise SchemaError(
            f"{uri} is not a readable table ({' '.join(str(err).split())}); save it as CSV in UTF-8."
        ) from None


def _text(values: pd.Series) -> pd.Series:
    texts = values.astype("string")
    return texts.mask(texts.str.len() == 0)


def _is_flag(table: pd.DataFrame, name: str) -> bool:
    return name in table and pd.api.types.is_bool_dtype(table[name])


def _resolve(name: str, folder: str) -> str:
    # An absolute path stands for itself even in a table on S3; "://" leads to a sentence about the scheme.
    if name.startswith("/") or "://" in name:
        return absolute(name)
    return join(folder, name) if is_s3(folder) else absolute(join(folder, name))


def _splits(texts: pd.Series, uri: str) -> pd.Series:
    splits = texts.map(given_split, na_action="ignore")
    unknown = texts.notna() & splits.isna()
    if unknown.any():
        raise SchemaError(
            f"{uri} has the split {texts[unknown].iloc[0]!r} in {_place(unknown)}; "
            f"allowed are {', '.join(SPLITS)} and an empty cell."
        )
    return splits


def _whole_numbers(values: pd.Series, uri: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype("Float64")
    wrong = (numbers.isna() & values.notna()) | (numbers != numbers.round()).fillna(False)
    wrong |= (numbers.abs() > np.iinfo(np.int32).max).fillna(False)
    if wrong.any():
        raise SchemaError(
            f"{uri} has {values[wrong].iloc[0]!r} as {values.name} in {_place(wrong)}; "
            "a box is whole numbers of pixels."
        )
    return numbers.astype("Int32")


def _place(mask: pd.Series) -> str:
    first = int(np.flatnonzero(mask.to_numpy())[0])
    more = int(mask.sum()) - 1
    return f"row {first + 1}" + (f" and {more} more" if more else "")

"""Lists the images to score.

From: a folder, an `s3://` prefix, or a manifest or other table of URIs (Parquet, CSV). To: `PlannedImage`s.
Invariants: nothing is left out uncounted: keys without an image's suffix are counted by suffix, repetitions of a (uri,
box) by number.
Cost: keys of a folder or prefix stream through (1,000 a request on S3); a table lies in memory.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa

from carray.core.errors import SchemaError, SettingsError
from carray.core.images import is_image_key, key_suffix, list_keys
from carray.core.storage import absolute, is_s3, join, read_bytes
from carray.core.tables import read_table, table_metadata
from carray.manifest.format import row_box
from carray.predictions.format import ClassifySettings, PlannedImage

__all__ = ["Listing", "list_images"]

_BOX = ["x1", "y1", "x2", "y2"]
_TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")


@dataclass
class Listing:
    """Gives the images of a source, and counts, while they are taken, what is not among them."""

    source: str
    images: Iterable[PlannedImage] = ()
    repeated: int = 0
    """Rows of a table that repeat another's uri (and box)."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Keys without an image's suffix, by suffix."""
    boxes: bool = False
    """Whether any image has a box."""


def list_images(source: str, settings: ClassifySettings, *, uses_boxes: bool) -> Listing:
    """List what a source asks to be scored; boxes are kept only for a bundle that was trained on them.

    Raises:
        SettingsError: `split` is given for a source that has none.
        SchemaError: a table lacks the column uri, or holds a null or a bucket instead of an image.
        StorageError: the source does not exist or cannot be listed.
    """
    source = absolute(source)
    listing = Listing(source)
    if source.lower().endswith(_TABLE_SUFFIXES) and not (not is_s3(source) and os.path.isdir(source)):
        _take_table(listing, settings, uses_boxes=uses_boxes)
        return listing
    if settings.split is not None:
        raise SettingsError(
            f"split is {settings.split!r}, but {source} is no manifest; leave it out or give a manifest."
        )
    listing.images = _from_keys(listing, all_files=settings.all_files)
    return listing


def _from_keys(listing: Listing, *, all_files: bool) -> Iterator[PlannedImage]:
    for key in list_keys(listing.source):
        if all_files or is_image_key(key.uri):
            yield PlannedImage(key.uri, key.escaped)
        else:
            listing.skipped[key_suffix(key.uri) or "(none)"] += 1


def _take_table(listing: Listing, settings: ClassifySettings, *, uses_boxes: bool) -> None:
    rows = _read_rows(listing.source)
    if settings.split is not None:
        rows = _of_split(rows, settings.split, listing.source)
    rows = rows.assign(uri=_complete_uris(rows["uri"], listing.source))
    boxed = uses_boxes and set(_BOX) <= set(rows.columns)
    if boxed:
        _check_boxes(rows, listing.source)
    kept = rows.drop_duplicates(["uri", *_BOX] if boxed else ["uri"])
    listing.repeated = len(rows) - len(kept)
    listing.boxes = boxed and bool(kept[_BOX].notna().all(axis=1).any())
    listing.images = _from_rows(kept, boxed=boxed)


def _read_rows(source: str) -> pd.DataFrame:
    if not source.lower().endswith(".parquet"):
        rows = _read_text(source)
    else:
        # Any table with URIs will do, whichever of our own kinds it is, or none.
        kind = str(table_metadata(source).get("kind", "table of URIs"))
        table = read_table(source, kind=kind, required=["uri"])
        wanted = [name for name in ("uri", "escaped", "split", *_BOX) if name in table.schema.names]
        rows = table.select(wanted).to_pandas(
            types_mapper={pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}.get
        )
    empty = rows["uri"].isna() | (rows["uri"] == "")
    if empty.any():
        raise SchemaError(
            f"{source} has {int(empty.sum())} rows without a uri, the first is row {int(empty.argmax())}; name them."
        )
    return rows


def _read_text(source: str) -> pd.DataFrame:
    types: dict[str, Any] = {"uri": "string", "split": "string", **dict.fromkeys(_BOX, "Int32")}
    try:
        rows = pd.read_csv(
            io.BytesIO(read_bytes(source)),
            sep="\t" if source.lower().endswith(".tsv") else ",",
            dtype=types,
            keep_default_na=False,  # a file may be called NA or null: only an empty field is a missing one
            na_values=[""],
            encoding="utf-8-sig",  # spreadsheets put a byte order mark before the first column's name
        )
    except (ValueError, pd.errors.ParserError) as err:
        raise SchemaError(
            f"{source} is not a readable CSV or TSV table ({' '.join(str(err).split())[:200]}); mend it."
        ) from None
    if "uri" not in rows:
        raise SchemaError(f"{source} lacks the column uri; it has {', '.join(map(str, rows.columns)) or 'none'}.")
    return rows


def _of_split(rows: pd.DataFrame, split: str, source: str) -> pd.DataFrame:
    if "split" not in rows:
        raise SettingsError(f"split is {split!r}, but {source} has no column split; leave it out or give a manifest.")
    return rows[rows["split"] == split]


def _check_boxes(rows: pd.DataFrame, source: str) -> None:
    partial = rows[_BOX].isna().any(axis=1) & rows[_BOX].notna().any(axis=1)
    if partial.any():
        raise SchemaError(
            f"{source} has {int(partial.sum())} incomplete boxes, the first is of "
            f"{rows.loc[partial, 'uri'].iloc[0]!r}; give all of x1, y1, x2, y2, or none."
        )


def _complete_uris(uris: pd.Series[Any], source: str) -> list[str]:
    folder = source.rsplit("/", 1)[0]
    complete = []
    for uri in uris:
        if not (uri.startswith(("/", "~")) or "://" in uri):
            uri = join(folder, uri)
        uri = absolute(uri)
        if is_s3(uri) and not uri.removeprefix("s3://").partition("/")[2]:
            raise SchemaError(f"{source} has the uri {uri!r}, a bucket and not an image; write s3://bucket/key.")
        complete.append(uri)
    return complete


def _from_rows(rows: pd.DataFrame, *, boxed: bool) -> Iterator[PlannedImage]:
    escaped = rows["escaped"].fillna(False) if "escaped" in rows else [False] * len(rows)
    boxes: Iterable[Any] = rows[_BOX].to_dict("records") if boxed else [{}] * len(rows)
    for uri, is_escaped, box in zip(rows["uri"], escaped, boxes, strict=True):
        yield PlannedImage(uri, bool(is_escaped), row_box(box))

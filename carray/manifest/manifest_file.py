"""A manifest: a Parquet table, one row an image (or a box of one), its schema, reader and writer.

(uri, box) is unique. An image that could not be read, or that `prepare --balance` set aside, is a row with its reason
and no split. The file's metadata holds `classes` in index order, `crop_boxes` and the settings it was built with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.core.errors import DataError, SchemaError
from carray.core.tables import hashes_as_int64, read_table, table_metadata, write_table
from carray.core.text import one_line
from carray.core.uri_tables import BOX
from carray.images.decoding import Pixels
from carray.images.pixels import Box, PixelSettings
from carray.images.read import ReadImage, read_image

__all__ = [
    "MANIFEST_SCHEMA",
    "SPLITS",
    "Manifest",
    "given_split",
    "read_manifest",
    "read_row",
    "require_row",
    "row_box",
    "write_manifest",
]

VERSION = 2
SPLITS = ("train", "val", "test")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The names that Hugging Face's datasets knows, and `validate`."""

MANIFEST_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),  # s3://bucket/key or an absolute path, raw and unencoded
        ("escaped", pa.bool_()),  # whether uri percent-escapes a local name that is not UTF-8
        ("label", pa.string()),  # null where unlabelled
        ("split", pa.string()),  # train, val or test; null for an unreadable, unlabelled or set aside image
        ("x1", pa.int32()),  # box in pixels of the upright image, x2 and y2 exclusive; null: the whole image
        ("y1", pa.int32()),  # upper edge
        ("x2", pa.int32()),  # right edge, exclusive
        ("y2", pa.int32()),  # lower edge, exclusive
        ("status", pa.string()),  # ok, fetch_error or decode_error
        ("error_code", pa.string()),  # why there is no split: an image's code, or set_aside
        ("error", pa.string()),  # the same as a sentence
        ("size_bytes", pa.int64()),  # of the file
        ("width", pa.int32()),  # of the upright image, pixels
        ("height", pa.int32()),  # of the upright image, pixels
        ("sha256", pa.string()),  # of the file's bytes, hex
        ("phash", pa.int64()),  # 64-bit difference hash of the image or its box
        ("etag", pa.string()),  # of the very read that was hashed
    ]
)
_BOX = list(BOX)


def given_split(name: str) -> str | None:
    """Map a name, in any case, to the split it stands for, if any."""
    return next((split for split, names in _SPLIT_NAMES.items() if name.casefold() in names), None)


@dataclass(frozen=True)
class Manifest:
    """A manifest's rows and metadata."""

    uri: str
    rows: pd.DataFrame
    """Columns as MANIFEST_SCHEMA; box columns Int32, phash Int64, all nullable."""
    classes: list[str]
    """Class names in the order of their indices."""
    crop_boxes: bool
    """Whether images are cut to their boxes."""

    @property
    def usable(self) -> pd.DataFrame:
        """The rows with readable pixels, a label and a split, in the manifest's order."""
        rows = self.rows
        return rows[(rows["status"] == "ok") & rows["label"].notna() & rows["split"].notna()]

    @property
    def fingerprint(self) -> str:
        """A hash of content, box, label, split and class order, independent of row order: 16 hex digits."""
        text = json.dumps([sorted(_identities(self.usable)), self.classes, self.crop_boxes])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def by_content(self, *splits: str) -> pd.DataFrame:
        """Select the usable rows of splits, ordered by what the fingerprint hashes, then by uri; the index stays.

        Manifests of one fingerprint give the same pixels, labels and splits in the same order.
        """
        rows = self.usable[self.usable["split"].isin(splits)]
        keys = (rows["uri"].to_numpy(dtype=np.str_), _identities(rows).to_numpy(dtype=np.str_))
        return rows.iloc[np.lexsort(keys)]

    def of_split(self, split: str) -> pd.DataFrame:
        """Select the usable rows of one split.

        Raises:
            SchemaError: the split has no usable row.
        """
        rows = self.usable[self.usable["split"] == split]
        if rows.empty:
            raise SchemaError(f"{self.uri} has no usable image in split {split!r}; it has {self.split_counts()}.")
        return rows

    def split_counts(self) -> dict[str, int]:
        """Count the usable rows of each split."""
        return {split: int((self.usable["split"] == split).sum()) for split in SPLITS}


def _identities(rows: pd.DataFrame) -> pd.Series[str]:
    """Join content, box, label and split of each row into one string."""
    seen = rows[["sha256", *_BOX, "label", "split"]].astype("string").fillna("")
    return seen["sha256"].str.cat(seen[[*_BOX, "label", "split"]], sep="|")


def row_box(row: Mapping[str, Any]) -> Box | None:
    """Extract a row's box as integers, if it has one."""
    if any(name not in row or pd.isna(row[name]) for name in _BOX):
        return None
    return int(row["x1"]), int(row["y1"]), int(row["x2"]), int(row["y2"])


def read_row(row: Mapping[Any, Any], settings: PixelSettings, *, crop_boxes: bool, as_input: bool = False) -> ReadImage:
    """Read a row's image; where the row has a sha256, other bytes are a fetch_error."""
    return read_image(
        row["uri"],
        settings,
        escaped=bool(row["escaped"]),
        box=row_box(row) if crop_boxes else None,
        sha256=row.get("sha256"),
        as_input=as_input,
    )


def require_row(row: Mapping[Any, Any], settings: PixelSettings, *, crop_boxes: bool, as_input: bool = False) -> Pixels:
    """Read the pixels of a row's image, which must be unchanged since the manifest was prepared.

    Raises:
        DataError: the image cannot be read, or changed.
    """
    read = read_row(row, settings, crop_boxes=crop_boxes, as_input=as_input)
    if read.pixels_HWC is None:
        raise DataError(f"{row['uri']!r} cannot be used: {read.error}; run carray prepare again.")
    return read.pixels_HWC


def write_manifest(rows: pd.DataFrame, uri: str, *, classes: list[str], crop_boxes: bool, **provenance: Any) -> None:
    """Write a manifest, atomically.

    Raises:
        StorageError: storage refused it.
    """
    table = pa.Table.from_pandas(rows, schema=MANIFEST_SCHEMA, preserve_index=False)
    note = {"classes": classes, "crop_boxes": crop_boxes, **provenance}
    write_table(table, uri, kind="manifest", version=VERSION, provenance=note)


def read_manifest(uri: str) -> Manifest:
    """Read a manifest and check it.

    Raises:
        SchemaError: not a manifest, a missing column, the same uri and box twice, or a label outside its classes.
        StorageError: the file does not exist or cannot be read.
    """
    required = MANIFEST_SCHEMA.names
    table = read_table(uri, kind="manifest", required=required, columns=required)
    note = table_metadata(uri)
    try:
        # Without the file's own metadata, which may hold anything for pandas.
        table = hashes_as_int64(table.select(required)).cast(MANIFEST_SCHEMA).replace_schema_metadata(None)
    except (pa.ArrowException, ValueError) as err:
        raise SchemaError(f"{uri} has a column of another type than a manifest's ({one_line(err, 200)}).") from None
    rows = table.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}.get)
    if rows["uri"].isna().any():
        raise SchemaError(f"{uri} has rows without a uri; prepare it again.")
    check_unique(rows, uri)
    labels = set(rows["label"].dropna())
    classes = note.get("classes") or sorted(labels)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise SchemaError(f"{uri} carries classes that are no list of names; prepare it again.")
    if labels - set(classes):
        raise SchemaError(
            f"{uri} has labels outside its classes: {sorted(labels - set(classes))[:3]}; prepare it again."
        )
    return Manifest(uri, rows, classes, bool(note.get("crop_boxes", False)))


def check_unique(rows: pd.DataFrame, uri: str) -> None:
    """Check that no (uri, box) is repeated.

    Raises:
        SchemaError: names the first repetition and counts them all.
    """
    boxes = [name for name in _BOX if name in rows]
    repeated = rows.duplicated(["uri", *boxes])
    if repeated.any():
        first = rows.loc[repeated, "uri"].iloc[0]
        raise SchemaError(
            f"{uri} has the same uri and box more than once ({int(repeated.sum())} repetitions, "
            f"the first is {first!r}); keep one row of each."
        )

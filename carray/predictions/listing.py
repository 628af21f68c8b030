"""Lists the images to score and cuts them into shards, once a run.

From: a folder, an `s3://` prefix, or a manifest or other table of URIs (Parquet, CSV). To: `PlannedImage`s, and one
Arrow file of keys a shard. Invariants: every image is in exactly one shard; nothing is left out uncounted: keys without an
image's suffix are counted by suffix, repetitions of a (uri, box) by number; the cut depends on the order and number of the
images alone. Cost: keys of a folder or prefix stream through (1,000 a request on S3); a table lies in memory as a whole.
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
import pyarrow.ipc

from carray.core.errors import SchemaError, SettingsError
from carray.core.images import IMAGE_SUFFIXES, is_image_key, key_suffix, list_keys
from carray.core.progress import Progress
from carray.core.storage import absolute, is_s3, join, read_bytes, write_bytes
from carray.core.tables import read_table, table_metadata
from carray.predictions.format import ClassifySettings, PlannedImage, record_place

__all__ = ["Listing", "cut_shards", "list_images", "read_shard", "shard_images", "write_shards"]

_BOX = ["x1", "y1", "x2", "y2"]
_SHARD_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), *((name, pa.int32()) for name in _BOX)],
)
_TABLE_SUFFIXES = (".parquet", ".csv")

SHARES = 64
"""A shard is at most 1/64 of what is listed before it: sixteen workers then end within a quarter of a share of each other."""


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


def write_shards(listing: Listing, settings: ClassifySettings, out: str) -> tuple[int, int]:
    """Write every shard's keys below `out`; gives the numbers of shards and of images.

    Raises:
        SettingsError: there is no image at all.
        StorageError: the listing or a write failed.
    """
    shards = images = 0
    with Progress("listing", total=None) as progress:
        for keys in cut_shards(listing.images, settings):
            write_bytes(_place(out, shards), _pack(keys))
            shards, images = shards + 1, images + len(keys)
            progress.advance(len(keys))
    if not images:
        raise SettingsError(_nothing(listing))
    return shards, images


def read_shard(out: str, shard: int) -> list[PlannedImage]:
    """Read the keys of one shard, in its order.

    Raises:
        StorageError: the run has no such shard, or it cannot be read.
    """
    with pa.ipc.open_file(io.BytesIO(read_bytes(_place(out, shard)))) as reader:
        rows = reader.read_all().to_pylist()
    return [PlannedImage(row["uri"], row["escaped"], _box(row)) for row in rows]


def cut_shards(images: Iterable[PlannedImage], settings: ClassifySettings) -> Iterator[list[PlannedImage]]:
    """Cut images, in order, into shards: small ones first, growing with what has gone before."""
    keys: list[PlannedImage] = []
    listed = 0
    for image in images:
        keys.append(image)
        if len(keys) == shard_images(listed, settings):
            yield keys
            listed, keys = listed + len(keys), []
    if keys:
        yield keys


def shard_images(listed: int, settings: ClassifySettings) -> int:
    """Give the number of images of the shard that follows `listed` images."""
    return min(max(settings.shard_images_first, listed // SHARES), settings.shard_images_max)


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
    kept = rows.drop_duplicates(["uri", *_BOX] if boxed else ["uri"])
    listing.repeated = len(rows) - len(kept)
    listing.boxes = boxed and bool(kept[_BOX].notna().all(axis=1).any())
    listing.images = _from_rows(kept, boxed=boxed)


def _read_rows(source: str) -> pd.DataFrame:
    if source.lower().endswith(".csv"):
        rows = _read_csv(source)
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


def _read_csv(source: str) -> pd.DataFrame:
    types: dict[str, Any] = {"uri": "string", "split": "string", **dict.fromkeys(_BOX, "Int32")}
    try:
        # A file may be called NA or null: only an empty field is a missing one.
        rows = pd.read_csv(io.BytesIO(read_bytes(source)), dtype=types, keep_default_na=False, na_values=[""])
    except (ValueError, pd.errors.ParserError) as err:
        raise SchemaError(
            f"{source} is not a readable CSV table ({' '.join(str(err).split())[:200]}); mend it."
        ) from None
    if "uri" not in rows:
        raise SchemaError(f"{source} lacks the column uri; it has {', '.join(map(str, rows.columns)) or 'none'}.")
    return rows


def _of_split(rows: pd.DataFrame, split: str, source: str) -> pd.DataFrame:
    if "split" not in rows:
        raise SettingsError(f"split is {split!r}, but {source} has no column split; leave it out or give a manifest.")
    return rows[rows["split"] == split]


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
        yield PlannedImage(uri, bool(is_escaped), _box(box))


def _box(row: dict[str, Any]) -> tuple[int, int, int, int] | None:
    if any(pd.isna(row.get(name)) for name in _BOX):
        return None
    return int(row["x1"]), int(row["y1"]), int(row["x2"]), int(row["y2"])


def _place(out: str, shard: int) -> str:
    return record_place(out, "shards", f"{shard:06d}.arrow")


def _pack(keys: list[PlannedImage]) -> bytes:
    boxes = [key.box or (None, None, None, None) for key in keys]
    columns = [[key.uri for key in keys], [key.escaped for key in keys], *([box[i] for box in boxes] for i in range(4))]
    table = pa.table(dict(zip(_SHARD_SCHEMA.names, columns, strict=True)), schema=_SHARD_SCHEMA)
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, _SHARD_SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _nothing(listing: Listing) -> str:
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in listing.skipped.most_common(5))
    seen = f"{listing.skipped.total()} other files ({skipped})" if skipped else "nothing"
    return (
        f"{listing.source} has no image to score, but {seen}; images end in {', '.join(IMAGE_SUFFIXES)}, "
        "and all_files takes every file."
    )

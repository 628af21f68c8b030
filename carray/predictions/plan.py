"""Fixes a run's shards, once: what it is, and the keys of each shard.

From: a listing. To: one small Arrow file of keys a shard, then `run.json`.
Invariants: every image is in exactly one shard; the cut depends on the number of the images alone and is never made
again; a run exists when `run.json` does.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.ipc

from carray.bundle.format import BundleInfo
from carray.bundle.predict import resolve_runtime
from carray.core.errors import SettingsError
from carray.core.images import IMAGE_SUFFIXES
from carray.core.progress import Progress, say
from carray.core.storage import join, read_bytes, write_bytes
from carray.manifest.format import row_box
from carray.predictions.format import (
    PREDICTION_SCHEMA,
    VERSION,
    ClassifySettings,
    PlannedImage,
    record_place,
    run_id_of,
)
from carray.predictions.ledger import RunRecord, write_run
from carray.predictions.listing import Listing, list_images

__all__ = ["cut_shards", "describe_run", "plan_run", "read_shard", "shard_images"]

_BOX = ("x1", "y1", "x2", "y2")
_SHARD_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), *((name, pa.int32()) for name in _BOX)],
)

SHARES = 64
"""A shard is at most 1/64 of what lies before it: sixteen workers then end within a quarter of a share."""


def describe_run(info: BundleInfo, bundle: str, source: str, settings: ClassifySettings) -> RunRecord:
    """Say what run a command asks for, before anything is listed.

    Raises:
        SettingsError: the bundle has no such runtime.
    """
    runtime = resolve_runtime(settings.runtime, info)
    columns = PREDICTION_SCHEMA.names
    seen = {"uri": source, "split": settings.split, "all_files": settings.all_files}
    return RunRecord(
        version=VERSION,
        run_id=run_id_of(info.bundle_id, pixels=info.pixels, runtime=runtime, columns=columns, source=seen),
        bundle_id=info.bundle_id,
        bundle=bundle,
        source=source,
        split=settings.split,
        all_files=settings.all_files,
        runtime=runtime,
        columns=columns,
        images=0,
        repeated=0,
        skipped_by_suffix={},
        shards=0,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software={name: importlib.metadata.version(name) for name in ("ray", "onnxruntime", "numpy", "pyarrow")},
    )


def plan_run(out: str, wanted: RunRecord, settings: ClassifySettings, *, uses_boxes: bool) -> RunRecord:
    """List the images, write every shard's keys and then the run's record: from now on it can be resumed.

    Raises:
        SettingsError: there is no image, a split of something that has none, or `out` among the files to be scored.
        SchemaError: a table of images cannot be read as one.
        StorageError: the listing or a write failed.
    """
    if settings.all_files and join(out, "").startswith(join(wanted.source, "")):
        raise SettingsError(
            f"{out} lies in {wanted.source}, whose every file is to be scored; give a folder outside it."
        )
    listing = list_images(wanted.source, settings, uses_boxes=uses_boxes)
    shards, images = _write_shards(listing, settings, out)
    if uses_boxes and not listing.boxes:
        say("classify: the bundle was trained on images cut to boxes, but here are no boxes; expect lower accuracy")
    run = wanted.model_copy(
        update={
            "images": images,
            "shards": shards,
            "repeated": listing.repeated,
            "skipped_by_suffix": dict(listing.skipped.most_common()),
        }
    )
    write_run(out, run)
    return run


def read_shard(out: str, shard: int) -> list[PlannedImage]:
    """Read the keys of one shard, in its order.

    Raises:
        StorageError: the run has no such shard, or it cannot be read.
    """
    with pa.ipc.open_file(io.BytesIO(read_bytes(_place(out, shard)))) as reader:
        rows = reader.read_all().to_pylist()
    return [PlannedImage(row["uri"], row["escaped"], row_box(row)) for row in rows]


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


def _write_shards(listing: Listing, settings: ClassifySettings, out: str) -> tuple[int, int]:
    shards = images = 0
    with Progress("listing", total=None) as progress:
        for keys in cut_shards(listing.images, settings):
            write_bytes(_place(out, shards), _pack(keys))
            shards, images = shards + 1, images + len(keys)
            progress.advance(len(keys))
    if not images:
        raise SettingsError(_nothing(listing, settings.split))
    return shards, images


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


def _nothing(listing: Listing, split: str | None) -> str:
    of_split = f" in split {split!r}" if split else ""
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in listing.skipped.most_common(5))
    seen = f"{listing.skipped.total()} other files ({skipped})" if skipped else "nothing"
    return (
        f"{listing.source} has no image to score{of_split}, but {seen}; images end in {', '.join(IMAGE_SUFFIXES)}, "
        "and all_files takes every file."
    )

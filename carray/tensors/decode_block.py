"""Decodes a manifest's training and validation images into this machine's block, once.

From: a manifest. To: a block.
Invariants: one process decodes while the others wait at the lock; what a killed one left is deleted by the next; an
image whose bytes are no longer those of the manifest stops the build, because a search on changed images could not be
repeated. Test images are left out: no trial may see them.
Cost: 970 images a second on two cores for the photographs of jobs.bench.cars (its line `decoding once`),
decode_size^2 x 3 bytes an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import DataError, DecodeError, FetchError
from carray.core.leftovers import remove_leftovers
from carray.core.progress import Progress
from carray.core.store.image_bytes import fetch_image
from carray.images.pixels import PixelSettings, decode
from carray.manifest.manifest_file import SPLITS, Manifest, row_box
from carray.tensors.block import MARKER, Block, block_key, block_place, open_block

__all__ = ["ensure_block"]

_UNFINISHED = ".building-"
"""Begins the name of the folder in which a block is made; its key, and so its lock, follows."""


def ensure_block(manifest: Manifest, pixels: PixelSettings) -> Block:
    """Open this machine's block of a manifest's train and val images, building it first if it is not there.

    Raises:
        DataError: an image changed or became unreadable since the manifest was prepared, the disk is full, or the cache
            cannot be written.
    """
    place = block_place(block_key(manifest.fingerprint, pixels))
    block = open_block(place)
    if block is not None:
        return block
    from filelock import FileLock

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise DataError(
            f"the cache {place.parent} cannot be made ({err.strerror}); set CARRAY_CACHE to another folder."
        ) from None
    remove_leftovers(place.parent.glob(f"{_UNFINISHED}*"), _lock_of)
    with FileLock(f"{place}.lock"):
        block = open_block(place)
        if block is None:
            _build(manifest, pixels, place)
            block = open_block(place)
    if block is None:
        raise DataError(
            f"the decoded block {place} vanished while it was built; do not clean the cache during a search."
        )
    return block


def _build(manifest: Manifest, pixels: PixelSettings, place: Path) -> None:
    rows = manifest.by_content("train", "val")
    size = pixels.decode_size
    _check_space(place.parent, len(rows) * size * size * 3)
    unfinished = place.with_name(f"{_UNFINISHED}{place.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        shape = (len(rows), size, size, 3)
        target_NHWC = np.lib.format.open_memmap(unfinished / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
        # Read in the table's order, which is that of its storage; written to where each row belongs.
        places = np.argsort(rows.index.to_numpy(), kind="stable")
        _decode_all(rows.iloc[places].to_dict("records"), _decoder(manifest, pixels), target_NHWC, places)
        target_NHWC.flush()
        index = {name: i for i, name in enumerate(manifest.classes)}
        np.save(unfinished / "labels.npy", np.array([index[label] for label in rows["label"]], dtype=np.int64))
        np.save(unfinished / "splits.npy", np.array([SPLITS.index(split) for split in rows["split"]], dtype=np.int8))
        note = {"images": len(rows), "manifest": manifest.fingerprint, "pixels": pixels.model_dump(mode="json")}
        (unfinished / MARKER).write_text(json.dumps(note, indent=1))
        shutil.rmtree(place, ignore_errors=True)  # a folder without its marker is the rest of a crash
        os.replace(unfinished, place)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _lock_of(unfinished: Path) -> Path:
    return unfinished.with_name(f"{unfinished.name.removeprefix(_UNFINISHED)}.lock")


def _check_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes * 0.95:
        raise DataError(
            f"the decoded block needs {needed_bytes / 1e9:.1f} GB, but {folder} has {free_bytes / 1e9:.1f} GB free; "
            "set CARRAY_CACHE to a larger disk or lower pixels.decode_size."
        )


def _decoder(manifest: Manifest, pixels: PixelSettings) -> Callable[[dict[str, Any]], Any]:
    def decode_row(row: dict[str, Any]) -> Any:
        try:
            data = fetch_image(row["uri"], escaped=bool(row["escaped"])).data
            if hashlib.sha256(data).hexdigest() != row["sha256"]:
                raise DataError(f"{row['uri']!r} changed since the manifest was prepared; run carray prepare again.")
            return decode(data, pixels, box=row_box(row) if manifest.crop_boxes else None).pixels_HWC
        except (FetchError, DecodeError) as err:
            raise DataError(
                f"{row['uri']!r} was readable when the manifest was prepared and is not now ({err}); prepare it again."
            ) from err

    return decode_row


def _decode_all(
    rows: list[Any], decode_row: Callable[[dict[str, Any]], Any], target_NHWC: Any, places: npt.NDArray[np.int64]
) -> None:
    threads = min(32, 2 * len(os.sched_getaffinity(0)))  # decoding leaves the GIL; twice the cores hides the fetching
    with Progress("decoding once", total=len(rows)) as progress, ThreadPoolExecutor(threads) as pool:
        for i, pixels_HWC in zip(places, pool.map(decode_row, rows), strict=True):
            target_NHWC[i] = pixels_HWC
            progress.advance()

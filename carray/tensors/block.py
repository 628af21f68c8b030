"""A manifest's training and validation images, decoded once per machine into a folder that all processes map.

    pixels.npy    uint8 (N, decode_size, decode_size, 3), mapped read-only by every process of the machine
    labels.npy    int64 (N,), index into the manifest's classes
    splits.npy    int8 (N,), index into manifest SPLITS
    tensors.json  the marker: counts, pixel settings, manifest fingerprint

The folder is `$CARRAY_CACHE/tensors/KEY` (default `~/.cache/carray`), KEY a hash of the manifest's content and of the
settings of decoding; `KEY.lock` is held while it is built. It is a cache: delete it while nothing runs. Rows are in the
order of `Manifest.by_content("train", "val")`, so manifests of one fingerprint share a block. A changed image stops the
build. Cost: 970 photographs of Stanford Cars a second on two cores, decode_size^2 x 3 bytes an image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from carray.core.environment import cache_home
from carray.core.errors import DataError
from carray.core.leftovers import remove_leftovers
from carray.images.pixels import PixelSettings
from carray.images.read import read_all
from carray.manifest.manifest_file import SPLITS, Manifest, require_row

__all__ = ["Block", "block_folder", "block_key", "ensure_block", "open_block"]

VERSION = 2
MARKER = "tensors.json"
_UNFINISHED = ".building-"
"""Begins the name of the folder in which a block is made; its key, and so its lock, follows."""


@dataclass(frozen=True)
class Block:
    """A machine's decoded images, memory-mapped read-only from files that processes share."""

    pixels_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    splits_N: npt.NDArray[np.int8]
    key: str = ""
    """The `block_key` of its pixels; empty for a block in memory only."""

    def of_split(self, split: str) -> npt.NDArray[np.int64]:
        """List the row numbers of a split, int64, in the order of `Manifest.by_content`."""
        return np.flatnonzero(self.splits_N == SPLITS.index(split))


def block_key(fingerprint: str, pixels: PixelSettings) -> str:
    """Hash the manifest's fingerprint and the settings of decoding: 16 hex digits."""
    decided_by = pixels.model_dump(include={"decode_size", "aspect", "interpolation", "reduced_scale"})
    text = json.dumps([VERSION, fingerprint, decided_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_folder(key: str) -> Path:
    """Name a block's folder on this machine, whether or not it exists."""
    return cache_home() / "tensors" / key


def open_block(folder: Path) -> Block | None:
    """Map a finished block; None if its marker is absent."""
    if not (folder / MARKER).exists():
        return None
    return Block(
        pixels_NHWC=np.load(folder / "pixels.npy", mmap_mode="r", allow_pickle=False),
        labels_N=np.load(folder / "labels.npy", allow_pickle=False),
        splits_N=np.load(folder / "splits.npy", allow_pickle=False),
        key=folder.name,
    )


def ensure_block(manifest: Manifest, pixels: PixelSettings) -> Block:
    """Open this machine's block of a manifest's train and val images, building it first if it is not there.

    Raises:
        DataError: an image changed or became unreadable since the manifest was prepared, the disk is full, or the cache
            cannot be written.
    """
    folder = block_folder(block_key(manifest.fingerprint, pixels))
    block = open_block(folder)
    if block is not None:
        return block
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise DataError(
            f"the cache {folder.parent} cannot be made ({err.strerror}); set CARRAY_CACHE to another folder."
        ) from None
    remove_leftovers(folder.parent.glob(f"{_UNFINISHED}*"), _lock_of)
    with FileLock(f"{folder}.lock"):
        block = open_block(folder)
        if block is None:
            _build(manifest, pixels, folder)
            block = open_block(folder)
    if block is None:
        raise DataError(
            f"the decoded block {folder} vanished while it was built; do not clean the cache during a search."
        )
    return block


def _build(manifest: Manifest, pixels: PixelSettings, folder: Path) -> None:
    rows = manifest.by_content("train", "val")
    size = pixels.decode_size
    _check_space(folder.parent, len(rows) * size * size * 3)
    unfinished = folder.with_name(f"{_UNFINISHED}{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        shape = (len(rows), size, size, 3)
        target_NHWC = np.lib.format.open_memmap(unfinished / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape)
        # Read in the table's order, which is that of the storage, and written in the block's.
        order = np.argsort(rows.index.to_numpy(), kind="stable")
        read = partial(require_row, settings=pixels, crop_boxes=manifest.crop_boxes)
        listed = rows.iloc[order].to_dict("records")
        for i, pixels_HWC in zip(order, read_all(listed, read, what="decoding once"), strict=True):
            target_NHWC[i] = pixels_HWC
        target_NHWC.flush()
        index = {name: i for i, name in enumerate(manifest.classes)}
        np.save(unfinished / "labels.npy", np.array([index[label] for label in rows["label"]], dtype=np.int64))
        np.save(unfinished / "splits.npy", np.array([SPLITS.index(split) for split in rows["split"]], dtype=np.int8))
        note = {"images": len(rows), "manifest": manifest.fingerprint, "pixels": pixels.model_dump(mode="json")}
        (unfinished / MARKER).write_text(json.dumps(note, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # left by a crash, as it has no marker
        os.replace(unfinished, folder)
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

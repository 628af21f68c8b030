"""Says what a block is: a folder with decoded pixels and labels, complete exactly when `tensors.json` exists.

    pixels.npy    uint8 (N, decode_size, decode_size, 3), mapped read-only by every process of the machine
    labels.npy    int64 (N,), index into the manifest's classes
    splits.npy    int8 (N,), index into manifest SPLITS
    tensors.json  the marker: counts, pixel settings, manifest fingerprint

Place: `$CARRAY_CACHE/tensors/KEY` (default `~/.cache/carray`), where KEY hashes the manifest's content and what
decides decoded pixels. A block is only a cache: deleting its folder while nothing runs costs one decode, and `rm -r`
of the whole `tensors` folder is the clean-up. Beside it lies `KEY.lock`, held while it is built.
Invariants: rows are in the order of `Manifest.by_content("train", "val")`, so that manifests of one fingerprint share
a block however their tables are ordered; a block is never changed once its marker exists. Version 2.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from carray.core.environment import cache_home
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import SPLITS

__all__ = ["Block", "block_key", "block_place", "open_block"]

VERSION = 2
MARKER = "tensors.json"


@dataclass(frozen=True)
class Block:
    """Holds one machine's decoded images; arrays are read-only maps of files, shared by every process."""

    pixels_NHWC: npt.NDArray[np.uint8]
    labels_N: npt.NDArray[np.int64]
    splits_N: npt.NDArray[np.int8]
    key: str = ""
    """Names what the pixels are (block_key); empty for a block that lies on no disk."""

    def of_split(self, split: str) -> npt.NDArray[np.int64]:
        """Give the row numbers of a split, int64, in the order of `Manifest.by_content`."""
        return np.flatnonzero(self.splits_N == SPLITS.index(split))


def block_key(fingerprint: str, pixels: PixelSettings) -> str:
    """Hash the manifest's fingerprint with the settings that decide decoded pixels: 16 hex digits."""
    decided_by = pixels.model_dump(include={"decode_size", "aspect", "interpolation", "reduced_scale"})
    text = json.dumps([VERSION, fingerprint, decided_by], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def block_place(key: str) -> Path:
    """Give a block's folder on this machine, whether or not it exists."""
    return cache_home() / "tensors" / key


def open_block(place: Path) -> Block | None:
    """Map a finished block; None when its marker is absent."""
    if not (place / MARKER).exists():
        return None
    return Block(
        pixels_NHWC=np.load(place / "pixels.npy", mmap_mode="r", allow_pickle=False),
        labels_N=np.load(place / "labels.npy", allow_pickle=False),
        splits_N=np.load(place / "splits.npy", allow_pickle=False),
        key=place.name,
    )

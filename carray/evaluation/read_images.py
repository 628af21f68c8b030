"""Reads images for measurements: which ones are drawn, their batches, and the network's answer to their pixels.

Which images are drawn depends on their contents and the seed, not on the order of rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.scorer import Scorer
from carray.images.read import read_all

__all__ = ["BATCH_IMAGES", "Row", "draw_rows", "read_batches", "score_pixels"]

BATCH_IMAGES = 16
"""Images in hand at once; with every corruption of each they are some hundred inputs of the network."""

Floats = npt.NDArray[np.float32]
Row = Mapping[Any, Any]
T = TypeVar("T")


def draw_rows(rows: pd.DataFrame, images: int | None, *, seed: int) -> list[Row]:
    """Draw so many rows of a manifest (all, where None), by a hash of seed and content, in the order of that hash."""
    numbered = enumerate(rows["sha256"])
    by_hash = sorted((hashlib.sha256(f"{seed} {sha256}".encode()).hexdigest(), i) for i, sha256 in numbered)
    chosen = [i for _, i in by_hash[:images]]
    return list(rows.iloc[chosen].to_dict("records"))


def read_batches(
    rows: Sequence[Row], read: Callable[[Row], T], *, what: str, batch_images: int = BATCH_IMAGES
) -> Iterator[list[tuple[Row, T]]]:
    """Give each row with what `read` makes of its image, a batch at a time, in order, showing progress."""
    found = zip(rows, read_all(rows, read, what=what, ahead=batch_images), strict=True)
    while batch := list(islice(found, batch_images)):
        yield batch


def score_pixels(scorer: Scorer, pixels: Sequence[npt.NDArray[np.uint8]]) -> tuple[Floats, Floats]:
    """Compute logits_NK and embedding_ND of inputs, in batches that suit the runtime."""
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    embeddings = [np.empty((0, scorer.info.embedding_size), dtype=np.float32)]
    for start in range(0, len(pixels), scorer.batch_images):
        logits_BK, embedding_BD = scorer.score(np.stack(pixels[start : start + scorer.batch_images]))
        logits.append(logits_BK)
        embeddings.append(embedding_BD)
    return np.concatenate(logits), np.concatenate(embeddings)

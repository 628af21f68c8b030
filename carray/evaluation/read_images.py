"""Reads images for measurements: which ones are drawn, their bytes, and the network's answer to their pixels.

From: rows of a manifest, or a list of other images. To: bytes, logits and embeddings.
Invariants: which images are drawn depends on their contents and the seed, not on the order of rows; an image whose
bytes are no longer those of the manifest is not measured.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.scorer import Scorer
from carray.core.errors import DecodeError, FetchError
from carray.core.progress import Progress
from carray.core.store.image_bytes import fetch_image

__all__ = ["BATCH_IMAGES", "Refused", "Row", "draw_rows", "read_batches", "read_row", "score_pixels"]

BATCH_IMAGES = 16
"""Images in hand at once; with every corruption of each they are some hundred inputs of the network."""

Floats = npt.NDArray[np.float32]
Row = Mapping[Any, Any]
Refused = FetchError | DecodeError
T = TypeVar("T")


def draw_rows(rows: pd.DataFrame, images: int | None, *, seed: int) -> list[Row]:
    """Draw so many rows of a manifest (all, where None), by a hash of seed and content, in the order of that hash."""
    numbered = enumerate(rows["sha256"])
    by_hash = sorted((hashlib.sha256(f"{seed} {sha256}".encode()).hexdigest(), i) for i, sha256 in numbered)
    chosen = [i for _, i in by_hash[:images]]
    return list(rows.iloc[chosen].to_dict("records"))


def read_row(row: Row) -> bytes:
    """Read the bytes of a manifest's row, or of any row with `uri` and `escaped`.

    Raises:
        FetchError: they cannot be read, or are not those of the row's `sha256`.
    """
    data = fetch_image(row["uri"], escaped=bool(row["escaped"])).data
    if "sha256" in row and hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise FetchError("changed", "the bytes are no longer those of the manifest; prepare it again")
    return data


def read_batches(rows: Sequence[Row], see: Callable[[Row], T], *, what: str) -> Iterator[list[tuple[Row, T | Refused]]]:
    """Give each row with what `see` makes of it, or why it cannot; a batch at a time, in order, showing progress."""

    def try_row(row: Row) -> T | Refused:
        try:
            return see(row)
        except (FetchError, DecodeError) as err:
            return err

    threads = min(16, 2 * len(os.sched_getaffinity(0)))  # decoding leaves the GIL; twice the cores hides the fetching
    with Progress(what, total=len(rows)) as progress, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), BATCH_IMAGES):
            batch = rows[start : start + BATCH_IMAGES]
            seen = list(pool.map(try_row, batch))
            yield list(zip(batch, seen, strict=True))
            progress.advance(len(batch), errors=sum(isinstance(one, Refused) for one in seen))


def score_pixels(scorer: Scorer, pixels: Sequence[npt.NDArray[np.uint8]]) -> tuple[Floats, Floats]:
    """Compute logits_NK and embedding_ND of inputs, in batches that suit the runtime."""
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    embeddings = [np.empty((0, scorer.info.embedding_size), dtype=np.float32)]
    for start in range(0, len(pixels), scorer.batch_images):
        logits_BK, embedding_BD = scorer.score(np.stack(pixels[start : start + scorer.batch_images]))
        logits.append(logits_BK)
        embeddings.append(embedding_BD)
    return np.concatenate(logits), np.concatenate(embeddings)

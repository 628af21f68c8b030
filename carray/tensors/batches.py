"""Gives batches of a block: shuffled for training, in order and viewed for evaluation.

Invariants: an epoch's order is a permutation that depends on (seed, epoch) only; evaluation's pixels are
`pixels.view`, the same bytes that classify scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from carray.pixels import PixelSettings, view
from carray.tensors.format import Block

__all__ = ["epoch_order", "train_batches", "view_batch", "view_batches"]

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


def epoch_order(rows_N: Rows, *, seed: int, epoch: int) -> Rows:
    """Permute row numbers, int64 (N,): same seed and epoch, same order."""
    return np.random.default_rng([seed, epoch]).permutation(rows_N)


def train_batches(
    block: Block, rows_N: Rows, *, batch_images: int, seed: int, epoch: int
) -> Iterator[tuple[Pixels, Rows]]:
    """Yield decoded pixels_BHWC (uint8, decode_size) and labels_B (int64) of one shuffled epoch.

    A last batch of one image joins the batch before it, since batch normalisation cannot train on one.
    """
    order_N = epoch_order(rows_N, seed=seed, epoch=epoch)
    starts = list(range(0, len(order_N), batch_images))
    if len(starts) > 1 and len(order_N) - starts[-1] == 1:
        starts.pop()
    for i, start in enumerate(starts):
        stop = starts[i + 1] if i + 1 < len(starts) else len(order_N)
        chosen_B = np.sort(order_N[start:stop])  # in file order: the map is read forwards
        yield block.pixels_NHWC[chosen_B], block.labels_N[chosen_B]


def view_batches(
    block: Block, rows_N: Rows, pixels: PixelSettings, *, batch_images: int
) -> Iterator[tuple[Pixels, Rows]]:
    """Yield evaluation's pixels_BHWC (uint8, input_size) and labels_B (int64), in the given order."""
    for start in range(0, len(rows_N), batch_images):
        chosen_B = rows_N[start : start + batch_images]
        yield view_batch(block, chosen_B, pixels), block.labels_N[chosen_B]


def view_batch(block: Block, rows_B: Rows, pixels: PixelSettings) -> Pixels:
    """Give evaluation's view of some rows: pixels_BHWC, uint8, input_size."""
    return np.stack([view(block.pixels_NHWC[i], pixels) for i in rows_B])

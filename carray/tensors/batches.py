"""Batches of a block: shuffled for training; in order and as the network's input for evaluation.

An epoch's order depends on seed, epoch and weights only. Evaluation's pixels are those of classify, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from carray.images.pixels import PixelSettings, view
from carray.tensors.block import Block

__all__ = ["balanced_weights", "batch_rows", "batch_spans", "epoch_order", "view_batch", "view_batches"]

Rows = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.float64]


def balanced_weights(labels_N: Rows) -> Weights:
    """Weight images, float64 (N,) of sum 1, so that all classes that occur have equal weight."""
    classes, class_N, counts = np.unique(labels_N, return_inverse=True, return_counts=True)
    return 1.0 / (len(classes) * counts[class_N])


def epoch_order(rows_N: Rows, *, seed: int, epoch: int, weights_N: Weights | None = None) -> Rows:
    """Permute row numbers, int64 (N,): same seed and epoch, same order.

    With weights (of the same rows, of any sum) it draws N rows with replacement, in proportion to their weights.
    """
    random = np.random.default_rng([seed, epoch])
    if weights_N is None:
        return random.permutation(rows_N)
    return random.choice(rows_N, size=len(rows_N), p=weights_N / weights_N.sum())


def batch_rows(
    rows_N: Rows, *, batch_images: int, seed: int, epoch: int, weights_N: Weights | None = None
) -> Iterator[Rows]:
    """Yield the row numbers of one shuffled epoch's batches, int64 (B,), each in file order."""
    order_N = epoch_order(rows_N, seed=seed, epoch=epoch, weights_N=weights_N)
    for start, stop in batch_spans(len(order_N), batch_images):
        yield np.sort(order_N[start:stop])  # in file order: the map is read forwards


def batch_spans(images: int, batch_images: int) -> list[tuple[int, int]]:
    """List the start and stop of each batch; a single last image joins the one before, as batch normalisation needs."""
    starts = list(range(0, images, batch_images))
    if len(starts) > 1 and images - starts[-1] == 1:
        starts.pop()
    return list(pairwise([*starts, images]))


def view_batches(
    block: Block, rows_N: Rows, pixels: PixelSettings, *, batch_images: int
) -> Iterator[tuple[Pixels, Rows]]:
    """Yield evaluation's pixels_BHWC (uint8, input_size) and labels_B (int64), in the given order."""
    for start in range(0, len(rows_N), batch_images):
        chosen_B = rows_N[start : start + batch_images]
        yield view_batch(block, chosen_B, pixels), block.labels_N[chosen_B]


def view_batch(block: Block, rows_B: Rows, pixels: PixelSettings) -> Pixels:
    """Compute the network's input for rows: pixels_BHWC, uint8, input_size."""
    size = pixels.input_size
    views = [view(block.pixels_NHWC[i], pixels) for i in rows_B]
    return np.stack(views) if views else np.empty((0, size, size, 3), dtype=np.uint8)

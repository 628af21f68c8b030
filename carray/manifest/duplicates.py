"""Finds images that show the same picture: equal bytes, or difference hashes that differ in few bits.

The groups do not depend on the images' order. Why 4 bits: among 6,516 photographs of Stanford Cars all 15 pairs of
structured hashes at distance 0 to 4 show the same photograph, and of the 4 pairs at distance 5 only 2 do. Decoded to
another size, a photograph's hash differs by 0.2 bits on average, and by at most 5 (178 and 213 pixels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["NEAR_BITS", "group_duplicates", "near_pairs"]

NEAR_BITS = 4
"""Near duplicates differ in at most so many of the 64 bits."""

FLAT_BITS = 8
"""A hash with fewer bits set, or unset, shows no structure (a blank wall, a gradient) and is near none; photographs of
cars have 14 to 47 set."""

_BLOCK_PAIRS = 4_000_000
"""Comparisons at once: 64 MB."""

Indices = npt.NDArray[np.int64]


def group_duplicates(sha256: Sequence[str], phash: Sequence[int]) -> Indices:
    """Number the groups of images that show the same picture, directly or through others: int64 of shape N."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    images = len(sha256)
    if not images:
        return np.zeros(0, dtype=np.int64)
    contents = np.unique(np.asarray(sha256, dtype=object).astype(str), return_inverse=True)[1].reshape(-1)
    bits = np.array([value % 2**64 for value in phash], dtype=np.uint64)  # of signed integers
    hashes, hash_of_image = np.unique(bits, return_inverse=True)
    first_image = np.full(len(hashes), images)
    np.minimum.at(first_image, hash_of_image.reshape(-1), np.arange(images))
    edges = [_same_value(contents)]
    edges.append(_same_value(np.where(_is_structured(hashes)[hash_of_image], hash_of_image, -1)))
    edges.append(first_image[near_pairs(hashes)])
    left, right = np.concatenate(edges).T
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(images, images))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def near_pairs(hashes: npt.NDArray[np.uint64]) -> Indices:
    """Find the pairs of different hashes at most NEAR_BITS apart: indices, int64 of shape pairs x 2.

    Of NEAR_BITS + 1 bands, two such hashes agree in at least one, so only those with an equal band are compared.
    """
    structured = np.flatnonzero(_is_structured(hashes))
    found = [np.zeros((0, 2), dtype=np.int64)]
    bands = np.linspace(0, 64, NEAR_BITS + 2).astype(int)
    for low, high in pairwise(bands.tolist()):
        band = (hashes[structured] >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        for members in _buckets(band):
            found += _pairs_within(hashes, structured[members])
    return np.unique(np.concatenate(found), axis=0)


def _is_structured(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    bits = np.bitwise_count(hashes)
    return (bits >= FLAT_BITS) & (bits <= 64 - FLAT_BITS)


def _same_value(values: npt.NDArray[Any]) -> Indices:
    """Link each image to the next with the same value, which is not negative."""
    order = np.argsort(values, kind="stable")
    same = (values[order][1:] == values[order][:-1]) & (values[order][1:] >= 0)
    return np.stack([order[:-1][same], order[1:][same]], axis=1).astype(np.int64)


def _buckets(values: npt.NDArray[np.uint64]) -> Iterator[Indices]:
    order = np.argsort(values, kind="stable").astype(np.int64)
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    return (bucket for bucket in np.split(order, cuts) if len(bucket) > 1)


def _pairs_within(hashes: npt.NDArray[np.uint64], members: Indices) -> list[Indices]:
    found = []
    rows_at_once = max(1, _BLOCK_PAIRS // len(members))
    for start in range(0, len(members), rows_at_once):
        rows = members[start : start + rows_at_once]
        near = np.bitwise_count(hashes[rows][:, None] ^ hashes[members][None, :]) <= NEAR_BITS
        left, right = np.nonzero(near)
        once = rows[left] < members[right]
        found.append(np.stack([rows[left[once]], members[right[once]]], axis=1))
    return found

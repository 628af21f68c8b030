"""Groups of equal and nearly equal images."""

from __future__ import annotations

import numpy as np
import pytest

from carray.manifest.duplicates import NEAR_BITS, group_duplicates, near_pairs


def random_hashes(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(0, 2**64, count, dtype=np.uint64)


def flip(value: int, bits: list[int]) -> int:
    return int(value) ^ sum(1 << bit for bit in bits)


def test_banding_finds_exactly_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(1)
    centres = random_hashes(rng, 60)
    hashes = np.unique(
        [flip(centres[i % 60], rng.choice(64, i % 7, replace=False).tolist()) for i in range(1200)]
    ).astype(np.uint64)
    distance = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(i, j) for i, j in np.argwhere(distance <= NEAR_BITS).tolist() if i < j}
    found = near_pairs(hashes).tolist()
    assert {tuple(pair) for pair in found} == expected
    assert len(found) == len(expected) > 1000


@pytest.mark.parametrize("distance", range(NEAR_BITS + 2))
def test_distance_decides(distance):
    rng = np.random.default_rng(distance)
    for value in random_hashes(rng, 50):
        other = flip(value, rng.choice(64, distance, replace=False).tolist())
        one, two = group_duplicates(["a", "b"], [int(value), other])
        assert (one == two) == (distance <= NEAR_BITS)


def test_groups_join_through_others_and_equal_bytes():
    start = 0x0F0F0F0F0F0F0F0F
    chain = [flip(start, list(range(step))) for step in (0, 4, 8)]
    far = flip(start, list(range(20, 52)))
    groups = group_duplicates(["a", "b", "c", "d", "e", "d"], [*chain, far, flip(far, [60]), 0])
    assert groups[0] == groups[1] == groups[2]
    assert groups[3] == groups[4] == groups[5]
    assert groups[0] != groups[3]


def test_flat_images_are_near_nothing_but_equal_bytes():
    groups = group_duplicates(["a", "b", "c", "a"], [0, 0, 2**64 - 1, 0])
    assert groups[0] == groups[3]
    assert len(set(groups.tolist())) == 3


def test_order_does_not_matter():
    rng = np.random.default_rng(4)
    hashes = [
        flip(value, rng.choice(64, 2, replace=False).tolist()) for value in random_hashes(rng, 30) for _ in range(3)
    ]
    sha256 = [str(i) for i in range(len(hashes))]
    order = rng.permutation(len(hashes))
    groups = group_duplicates(sha256, hashes)
    shuffled = group_duplicates([sha256[i] for i in order], [hashes[i] for i in order])

    def partition(numbers: np.ndarray, names: list[str]) -> set[frozenset[str]]:
        return {frozenset(np.array(names)[numbers == number].tolist()) for number in set(numbers.tolist())}

    assert partition(groups, sha256) == partition(shuffled, [sha256[i] for i in order])
    assert len(set(groups.tolist())) == 30


def test_nothing_gives_nothing():
    assert group_duplicates([], []).shape == (0,)

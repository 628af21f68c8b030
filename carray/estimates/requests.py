"""Counts what a classification asks of a store: shards, and requests by kind, by carray's own rules.

From: how many images and workers. To: how the shards fall on the workers, and `Requests`.
Invariants: a shard's size is `predictions.shards.shard_images`'s; what a job's parts ask for was counted on a real
store and is held against it by tests/estimates/test_requests.py.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass

from carray.predictions.ahead import NOTE_IMAGES
from carray.predictions.format import ClassifySettings
from carray.predictions.shards import shard_images

__all__ = ["Prices", "Requests", "count_requests", "longest_share", "shard_sizes"]

KEYS_A_PAGE = 1_000
PREFIX_GETS_A_SECOND = 5_500
"""What S3 answers under one prefix before it says SlowDown."""

_PUTS_A_SHARD = (4, 5)
"""At least, at most: its list of images, its Parquet file, its ledger entry, and what pyarrow puts in a deleted note's
place; notes of what is in hand come on top."""
_GETS_A_SHARD = (15, 18)
"""Its list of images, its file's footer and its entry in the end, each with a HEAD, looks for what is there, and
whether the shard is still this worker's, before its file, its entry and its end."""
_GETS_A_NOTE = 3
"""Whether the shard is still this worker's, before each note of what is in hand."""
_LISTS_A_SHARD = (1, 2)
"""Of looks for a note that is not there."""
_GETS_A_WORKER = 10
"""bundle.json, the network and the probe images, each with a HEAD."""
_FEW = 30
"""Of the driver: the run's records, the lease, the end."""
_RETRIED = 0.01
"""Share of requests that a busy store makes a job ask again."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Says what requests cost, for 1,000 of them, and a machine for an hour; in any one currency."""

    list_requests: float = 0.005
    gets: float = 0.0004
    puts: float = 0.005
    machine_hour: float | None = None
    """None where nobody said it: machines are not priced then."""


@dataclass(frozen=True, slots=True)
class Requests:
    """Counts requests by what they cost."""

    lists: int
    gets: int
    """HEADs among them, which cost as much."""
    puts: int

    def money(self, prices: Prices) -> float:
        """Give their price."""
        each = ((self.lists, prices.list_requests), (self.gets, prices.gets), (self.puts, prices.puts))
        return sum(count / 1_000 * price for count, price in each)


def shard_sizes(images: int, settings: ClassifySettings) -> Iterator[int]:
    """Give the sizes of a run's shards, in images, in the order in which they are cut."""
    cut = 0
    while cut < images:
        size = min(shard_images(cut, settings), images - cut)
        yield size
        cut += size


def longest_share(images: int, settings: ClassifySettings, workers: int) -> tuple[int, int]:
    """Deal shards to workers, each to the one that is free first; gives the images of the busiest, and all shards."""
    busy = [0] * max(1, workers)
    shards = 0
    for size in shard_sizes(images, settings):
        heapq.heappush(busy, heapq.heappop(busy) + size)
        shards += 1
    return max(busy), shards


def count_requests(
    images: int,
    keys: int,
    settings: ClassifySettings,
    *,
    workers: int,
    listed: bool,
    out_on_s3: bool,
    images_on_s3: bool,
) -> tuple[Requests, Requests]:
    """Count a job's requests: (at least, at most).

    Args:
        images: To be scored.
        keys: To be listed, images or not.
        settings: Of the job.
        workers: Scoring processes.
        listed: Whether the source is a bucket that is listed, and no table.
        out_on_s3: Whether the results go to a bucket.
        images_on_s3: Whether the images lie in one.
    """
    sizes = list(shard_sizes(images, settings))
    notes, shards = sum(math.ceil(size / NOTE_IMAGES) for size in sizes), len(sizes) if out_on_s3 else 0
    pages = math.ceil(keys / KEYS_A_PAGE) if listed else 0
    lists = pages + shards // KEYS_A_PAGE
    notes = notes if out_on_s3 else 0
    gets, puts = (images if images_on_s3 else 0) + notes * _GETS_A_NOTE, notes
    least = Requests(
        lists=lists + shards * _LISTS_A_SHARD[0],
        gets=gets + shards * _GETS_A_SHARD[0],
        puts=puts + shards * _PUTS_A_SHARD[0],
    )
    if not (images_on_s3 or out_on_s3):
        return least, least
    few = _FEW if out_on_s3 else 0
    # A range of keys that is cut in two costs a few requests of one key, and each thread may end on a page of few.
    cuts = settings.listing_threads * 8 if pages > settings.listing_threads else 2
    again = 1 + _RETRIED
    most = Requests(
        lists=math.ceil((lists + shards * _LISTS_A_SHARD[1]) * again) + cuts + few,
        gets=math.ceil((gets + shards * _GETS_A_SHARD[1]) * again) + workers * _GETS_A_WORKER + few,
        puts=math.ceil((puts + shards * _PUTS_A_SHARD[1]) * again) + few,
    )
    return least, most

"""Simulates a classification on many machines: shards listed, assigned and scored, event by event.

Shards are cut by carray's own rule. One is assigned, once it is listed, at the driver's rate, to a free worker, and is
scored once. An object store's request rate is shared by all busy workers; a slow machine stays slow. Not simulated:
lost machines, machines that join later, unequal images.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import Any

from carray.classify.predictions_folder import ClassifySettings
from carray.classify.shards import shard_images

_STRAGGLERS, _SLOWNESS = 0.02, 1.5
"""Assumed: one worker in fifty takes half as long again."""


@dataclass(frozen=True)
class Constants:
    """What the parts of a job can do, measured or assumed."""

    images_per_core_second: float = 70.0
    shard_seconds: float = 0.25
    """A shard's cost for its worker besides its images: five small requests of 50 ms."""
    listed_per_second: float = 230_000.0
    handed_out_per_second: float = 100.0
    """Shards that the driver can assign and enter."""
    gets_per_second: float = 5_500.0
    """Of one prefix of S3 (AWS's documented rate)."""
    worker_start_seconds: float = 5.0


def cut(images: int, workers: int, settings: ClassifySettings | None = None) -> list[int]:
    """Cut a source into shards as carray does for so many workers; returns their sizes in order."""
    chosen, sizes, listed = settings or ClassifySettings(), list[int](), 0
    while listed < images:
        sizes.append(min(shard_images(listed, chosen, workers), images - listed))
        listed += sizes[-1]
    return sizes


def simulate(
    images: int, workers: int, *, constants: Constants, prefixes: int = 1, cut_for: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Simulate one job; returns its seconds, its shards, the share of idle workers and its limit.

    Args:
        images: How many there are.
        workers: Scoring processes of one core.
        constants: What the parts can do.
        prefixes: Of the bucket; the images are spread evenly among them.
        cut_for: The number of workers that the shards are cut for; None is `workers`.
        seed: Of which workers are slow.
    """
    dice = random.Random(seed)
    slow = [_SLOWNESS if dice.random() < _STRAGGLERS else 1.0 for _ in range(workers)]
    sizes = cut(images, workers if cut_for is None else cut_for)
    allowed = prefixes * constants.gets_per_second
    free = [(constants.worker_start_seconds, number) for number in range(workers)]
    ends: list[float] = []  # of the shards in hand
    listed, handed, busy, last = 0, 0.0, 0.0, 0.0
    for size in sizes:
        listed += size
        at, number = heapq.heappop(free)
        at = max(at, listed / constants.listed_per_second, handed + 1 / constants.handed_out_per_second)
        handed = at
        while ends and ends[0] <= at:
            heapq.heappop(ends)
        rate = min(constants.images_per_core_second / slow[number], allowed / (len(ends) + 1))
        end = at + constants.shard_seconds + size / rate
        busy += end - at
        last = max(last, end)
        heapq.heappush(ends, end)
        heapq.heappush(free, (end, number))
    bounds = _bounds(images, len(sizes), workers, allowed, constants)
    limit = max(bounds, key=lambda name: bounds[name])
    return {
        "images": images,
        "workers": workers,
        "prefixes": prefixes,
        "shards": len(sizes),
        "largest_shard": max(sizes),
        "seconds": round(last, 1),
        "idle_fraction": round(1 - busy / (workers * last), 3),
        "limit": limit,
        "limit_seconds": round(bounds[limit], 1),
    }


def _bounds(images: int, shards: int, workers: int, allowed: float, constants: Constants) -> dict[str, float]:
    """Return the seconds that each part alone needs at least."""
    scoring = images / constants.images_per_core_second + shards * constants.shard_seconds
    return {
        "cores": scoring / workers,
        "listing": images / constants.listed_per_second,
        "driver": shards / constants.handed_out_per_second,
        "requests": images / allowed,
    }

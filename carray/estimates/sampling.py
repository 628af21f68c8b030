"""Counts a source's images as a job would list them, and draws some of them.

From: what run is wanted. To: a `Sample`.
Invariants: the listing is the job's own (predictions.plan), into a temporary folder; it is stopped after a while, and
then the count is a lower bound and says so. The images are drawn at random, from MOST_SHARDS shards at most.
Cost: a LIST request for 1,000 keys, one GET for each image that is drawn.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.storage import is_s3
from carray.predictions.format import ClassifySettings, PlannedImage
from carray.predictions.ledger import RunRecord
from carray.predictions.plan import open_plan
from carray.predictions.shards import read_notes, read_shard

__all__ = ["Sample", "draw_images"]

MOST_SHARDS = 40
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """Is what a listing told: how much there is, and some of it."""

    images: int
    """Of the source; of what was listed, where the listing was stopped."""
    complete: bool
    keys: int
    """Listed, those that are no images among them."""
    chosen: list[PlannedImage]

    @property
    def on_s3(self) -> bool:
        """Say whether the images lie in an object store."""
        return is_s3(self.chosen[0].uri)


def draw_images(
    out: str, wanted: RunRecord, settings: ClassifySettings, *, uses_boxes: bool, count: int, seconds: float
) -> Sample:
    """List a source for so many seconds at most, and draw `count` of its images, or all if there are fewer.

    Raises:
        SettingsError: there is no image, or none was listed in that time.
        SchemaError: a table of images cannot be read as one.
        StorageError: the source cannot be listed.
    """
    started = time.monotonic()
    with open_plan(out, wanted, settings, uses_boxes=uses_boxes) as plan:
        while not plan.complete and time.monotonic() - started < seconds:
            plan.wait(plan.shards, timeout_seconds=0.2)
        complete = plan.complete
    notes = read_notes(out)
    images = sum(note.images for note in notes.values())
    keys = images + sum(note.skipped.total() for note in notes.values())
    if not images:
        raise SettingsError(
            f"{wanted.source} gave no image within {seconds:g} s; give the listing longer (--listing-seconds)."
        )
    if not complete:
        say(f"estimate: the listing was stopped after {seconds:g} s, with {images:,} images listed")
    chosen = _draw(out, {number: note.images for number, note in notes.items()}, count)
    return Sample(images, complete, keys, chosen)


def _draw(out: str, sizes: dict[int, int], count: int) -> list[PlannedImage]:
    random = np.random.default_rng(_SEED)
    numbers = np.array(list(sizes))
    weights = np.array([sizes[number] for number in numbers], dtype=float)
    some = random.choice(numbers, min(MOST_SHARDS, len(numbers)), replace=False, p=weights / weights.sum())
    images = [image for number in sorted(some.tolist()) for image in read_shard(out, number)]
    places = random.permutation(len(images))[:count]
    return [images[place] for place in places]

"""Measures what an image of a source costs one core, with the job's own code.

The source is listed as by the job (classify.plan), but for a limited time; then the count is a lower bound. Each
process scores its images once, since they would be cached the second time, and two shards at once, as in a job. The
clock starts when every process has opened the bundle.
Cost: a LIST request for 1,000 keys, one GET for each drawn image.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa

from carray.classify.ledger import RunRecord
from carray.classify.plan import open_plan
from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.classify.read_images import Arrival, ImageReader
from carray.classify.score_shard import ShardScorer
from carray.classify.shards import SHARD_SCHEMA, ShardCutter, ShardNote, read_notes, read_shard
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import is_s3
from carray.core.store.listing import Piece
from carray.core.uri_tables import BOX
from carray.images.read import ReadImage
from carray.preflight.parallel import run_in_parallel, wait_for_others
from carray.preflight.ranges import Range, middle

__all__ = ["Cost", "Sample", "draw_images", "measure_scoring"]

_MOST_SHARDS = 40
"""Shards from which images are drawn, at most."""
WARM_IMAGES = 16
"""Images scored before the clock starts, to open the bundle and allocate the network's memory."""
_RESAMPLES = 2000


@dataclass(frozen=True)
class Sample:
    """Result of a listing: the number of images, and some of them."""

    images: int
    """Images of the source, or those listed in time."""
    complete: bool
    keys: int
    """Listed keys, images or not."""
    chosen: list[PlannedImage]

    @property
    def on_s3(self) -> bool:
        """Whether the images are on S3."""
        return is_s3(self.chosen[0].uri)


def draw_images(
    out: str, wanted: RunRecord, settings: ClassifySettings, *, uses_boxes: bool, count: int, seconds: float
) -> Sample:
    """List a source for at most `seconds`, and draw `count` of its images, or all if there are fewer.

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
            f"{wanted.source} gave no image within {seconds:g} s; give the listing more time (--listing-seconds)."
        )
    if not complete:
        say(f"estimate: the listing was stopped after {seconds:g} s, with {images:,} images listed")
    chosen = _draw(out, {number: note.images for number, note in notes.items()}, count)
    return Sample(images, complete, keys, chosen)


def _draw(out: str, sizes: dict[int, int], count: int) -> list[PlannedImage]:
    random = np.random.default_rng(0)
    numbers = np.array(list(sizes))
    weights = np.array([sizes[number] for number in numbers], dtype=float)
    some = random.choice(numbers, min(_MOST_SHARDS, len(numbers)), replace=False, p=weights / weights.sum())
    images = [image for number in sorted(some.tolist()) for image in read_shard(out, number)]
    return [images[i] for i in random.permutation(len(images))[:count]]


@dataclass(frozen=True)
class Cost:
    """What an image costs one core while all cores of the machine score."""

    seconds: Range
    """Core-seconds of an image: from processor time to wall-clock time, each the outer end of the middle 80 % of
    resampled images."""
    decode_seconds: float
    """Of it, the mean time of decoding."""
    open_seconds: float
    """Seconds until a new process has opened the bundle."""
    images: int
    bytes_per_image: float
    error_codes: dict[str, int]
    load: float = 0.0
    """Load of the machine for each core before the measurement."""


@dataclass(frozen=True)
class _Measured:
    images: int
    seconds: float
    core_seconds: float
    open_seconds: float
    decode_seconds_N: list[float]
    size_bytes: int
    error_codes: dict[str, int]


def measure_scoring(
    bundle: str, run: RunRecord, settings: ClassifySettings, images: Sequence[PlannedImage], *, workers: int
) -> Cost:
    """Score images in `workers` processes at once, each a part of them, or all of them if there are few.

    Raises:
        BundleError: the bundle is damaged, or computes other logits on this machine.
        BudgetError: a process died.
        StorageError: the credentials have expired.
    """
    parts = [images[i::workers] for i in range(workers)]
    if min(len(part) for part in parts) < 2 * WARM_IMAGES:
        parts = [[*images[i % len(images) :], *images[: i % len(images)]] for i in range(workers)]
    shared = (bundle, run.model_dump(), settings.model_dump())
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    return replace(_cost(run_in_parallel(_measure, [(*shared, part) for part in parts])), load=load)


def _cost(measured: Sequence[_Measured]) -> Cost:
    decode_N = np.concatenate([one.decode_seconds_N for one in measured])
    images = sum(one.images for one in measured)
    whole = sum(one.seconds for one in measured) / images
    random = np.random.default_rng(0)
    drawn = random.choice(decode_N, (_RESAMPLES, len(decode_N))).mean(axis=1) if len(decode_N) else np.zeros(1)
    decode = float(decode_N.mean()) if len(decode_N) else 0.0
    per_worker = [one.seconds / one.images for one in measured]
    # Images differ in the time of decoding only; processes differ, too.
    spread = middle(drawn - decode + random.choice(per_worker, (len(drawn), len(per_worker))).mean(axis=1))
    undisturbed = sum(one.core_seconds for one in measured) / images
    return Cost(
        seconds=Range(min(undisturbed * spread.low / whole, spread.low), max(spread.high, whole)),
        decode_seconds=decode,
        open_seconds=max(one.open_seconds for one in measured),
        images=images,
        bytes_per_image=sum(one.size_bytes for one in measured) / images,
        error_codes=dict(sum((Counter(one.error_codes) for one in measured), Counter())),
    )


def _measure(
    bundle: str, run: Mapping[str, Any], settings: Mapping[str, Any], images: Sequence[PlannedImage]
) -> _Measured:
    """Score one process's images: a few to warm up, then the others in two shards at once."""
    started = time.monotonic()
    reader = _TimedReader
    with tempfile.TemporaryDirectory(prefix="carray-estimate-") as out:
        chosen = ClassifySettings.model_validate(settings)
        warm, rest = images[:WARM_IMAGES], images[WARM_IMAGES:] or images
        shards = [part for part in (warm, rest[::2], rest[1::2]) if part]
        for number, part in enumerate(shards):
            _write_shard(out, number, part, chosen)
        scorer = ShardScorer(bundle, out=out, run=RunRecord.model_validate(run), settings=chosen, new_reader=reader)
        scorer.score_shard(0)
        opened = time.monotonic() - started
        reader.decode_seconds.clear()
        wait_for_others()
        begun, used = time.monotonic(), time.process_time()
        with ThreadPoolExecutor(len(shards)) as pool:
            entries = list(pool.map(scorer.score_shard, range(1, len(shards))))
        seconds, core_seconds = time.monotonic() - begun, time.process_time() - used
    codes = sum((Counter(entry.error_codes) for entry in entries), Counter[str]())
    size = sum(image.size_bytes or 0 for image in rest)
    per_core = core_seconds / (chosen.threads or 1)
    return _Measured(len(rest), seconds, per_core, opened, list(reader.decode_seconds), size, dict(codes))


def _write_shard(out: str, number: int, images: Sequence[PlannedImage], settings: ClassifySettings) -> None:
    """Write a shard of exactly these images, as the job does."""
    sized = settings.model_copy(update={"shard_images_first": len(images), "shard_images_max": len(images)})
    boxes = [image.box or (None,) * len(BOX) for image in images]
    columns = [(one.uri, one.escaped, one.etag, one.size_bytes, *box) for one, box in zip(images, boxes, strict=True)]
    values = zip(zip(*columns, strict=True), SHARD_SCHEMA, strict=True)
    batch = pa.record_batch([pa.array(column, kind.type) for column, kind in values], schema=SHARD_SCHEMA)
    cutter = ShardCutter(
        out, sized, by_suffix=False, notes={before: ShardNote() for before in range(number)}, begin=lambda: None
    )
    cutter.take(Piece(0, batch, [str(i) for i in range(len(images))], "", None, True))


class _TimedReader(ImageReader):
    """An image reader that records the time of each decoding."""

    decode_seconds: ClassVar[list[float]] = []

    def begin(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        super().begin(images, cast("SimpleQueue[Arrival]", _Timing(arrived, self.decode_seconds)))


@dataclass
class _Timing:
    """A queue of arrivals that times their decoding."""

    arrived: SimpleQueue[Arrival]
    seconds: list[float]

    def put(self, item: Arrival) -> None:
        index, finish = item

        def timed() -> ReadImage:
            started = time.perf_counter()
            try:
                return finish()
            finally:
                self.seconds.append(time.perf_counter() - started)

        self.arrived.put((index, timed))

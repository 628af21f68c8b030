"""Measures what an image of a source costs one core, with the job's own code.

The source is listed as by the job (classify.plan), but for a limited time; then the count is a lower bound. Each
process scores its images once, since they would be cached the second time, and two shards at once, as in a job. The
clock starts when every process has opened the bundle.
Cost: a LIST request for 1,000 keys, one GET for each drawn image.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

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
from carray.core.store.listing import Piece
from carray.core.uri_tables import BOX
from carray.images.read import ReadImage
from carray.preflight.estimates import Pair, Range, load_per_core, run_in_parallel, spread, wait_for_others

__all__ = ["Cost", "Measured", "Sample", "cost_of", "draw_images", "measure_scoring"]

_MOST_SHARDS = 40
"""Shards from which images are drawn, at most."""
WARM_IMAGES = 16
"""Images scored before the clock starts, to open the bundle and allocate the network's memory."""


@dataclass(frozen=True)
class Sample:
    """Result of a listing: the number of images, and some of them."""

    images: int
    """Images of the source, or those listed in time."""
    complete: bool
    """Whether the whole source was listed."""
    keys: int
    """Listed keys, images or not."""
    chosen: list[PlannedImage]


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
    random, numbers = np.random.default_rng(0), sorted(notes)
    shares = np.array([notes[number].images for number in numbers]) / images
    some = random.choice(numbers, min(_MOST_SHARDS, len(numbers)), replace=False, p=shares)
    drawn = [image for number in sorted(some.tolist()) for image in read_shard(out, number)]
    return Sample(images, complete, keys, [drawn[i] for i in random.permutation(len(drawn))[:count]])


@dataclass(frozen=True)
class Cost:
    """What an image costs one core while all cores of the machine score."""

    seconds: Range
    """Core-seconds of an image: from processor time to wall-clock time."""
    decode_seconds: float
    """Of it, the mean time of decoding."""
    open_seconds: float
    """Seconds until a new process has opened the bundle."""
    images: int
    bytes_per_image: float
    error_codes: dict[str, int]
    load: float
    """Load of the machine for each core before the measurement."""


class Measured(NamedTuple):
    """What one process measured."""

    images: int
    cost: Pair
    """Of an image."""
    decode_seconds: float
    """Of all images, like `size_bytes`."""
    size_bytes: int
    error_codes: Counter[str]
    open_seconds: float


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
    load = load_per_core()
    return cost_of(run_in_parallel(_measure, [(*shared, part) for part in parts]), load)


def cost_of(measured: Sequence[Measured], load: float = 0.0) -> Cost:
    """Combine what all processes measured."""
    images = sum(one.images for one in measured)
    return Cost(
        seconds=spread([one.cost for one in measured]),
        decode_seconds=sum(one.decode_seconds for one in measured) / images,
        open_seconds=max(one.open_seconds for one in measured),
        images=images,
        bytes_per_image=sum(one.size_bytes for one in measured) / images,
        error_codes=dict(sum((one.error_codes for one in measured), Counter())),
        load=load,
    )


def _measure(
    bundle: str, run: Mapping[str, Any], settings: Mapping[str, Any], images: Sequence[PlannedImage]
) -> Measured:
    """Score one process's images: a few to warm up, then the others in two shards at once."""
    started, chosen = time.monotonic(), ClassifySettings.model_validate(settings)
    warm, rest = images[:WARM_IMAGES], images[WARM_IMAGES:] or images
    with tempfile.TemporaryDirectory(prefix="carray-estimate-") as out:
        shards = [part for part in (warm, rest[::2], rest[1::2]) if part]
        for number, part in enumerate(shards):
            _write_shard(out, number, part, chosen)
        run_record = RunRecord.model_validate(run)
        scorer = ShardScorer(bundle, out=out, run=run_record, settings=chosen, new_reader=_TimedReader)
        scorer.score_shard(0)
        opened = time.monotonic() - started
        _TimedReader.decode_seconds.clear()
        wait_for_others()
        begun, used = time.monotonic(), time.process_time()
        with ThreadPoolExecutor(len(shards)) as pool:
            entries = list(pool.map(scorer.score_shard, range(1, len(shards))))
        clock, processor = time.monotonic() - begun, (time.process_time() - used) / (chosen.threads or 1)
    codes = sum((Counter(entry.error_codes) for entry in entries), Counter[str]())
    size_bytes, cost = sum(image.size_bytes or 0 for image in rest), Pair(processor / len(rest), clock / len(rest))
    return Measured(len(rest), cost, sum(_TimedReader.decode_seconds), size_bytes, codes, opened)


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
        def put(item: Arrival) -> None:
            index, decode = item
            arrived.put((index, lambda: self._time(decode)))

        super().begin(images, cast("SimpleQueue[Arrival]", SimpleNamespace(put=put)))

    def _time(self, decode: Callable[[], ReadImage]) -> ReadImage:
        started = time.perf_counter()
        try:
            return decode()
        finally:
            self.decode_seconds.append(time.perf_counter() - started)

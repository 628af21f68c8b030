"""Reads a shard's images ahead of their scoring, within bounds of memory that no image can pass.

At most `fetch_memory_mb` of originals are held, a single larger one alone, and none above `max_image_mb` is read. An
image is noted as in hand before it is read, and one that was in hand when a worker died is read alone. Whoever scores
decodes, so that no more originals are unpacked at once than it has CPUs. A failed image is a result without pixels;
any other exception is a bug, whose message names the image and which stops the shard.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from carray.classify.attempts import Attempt
from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.core.at_once import ByteBudget
from carray.core.errors import CarrayError, DecodeError
from carray.core.store.files import is_s3
from carray.core.store.image_bytes import FetchedImage
from carray.images.pixels import PixelSettings
from carray.images.read import ReadImage, decode_fetched, failed_image, fetch_original

__all__ = ["LOST", "Arrival", "ImageReader", "read_ahead"]

FILES_PER_TASK = 8
"""Local files that one task reads: they come so fast that handing each over would cost more than reading it."""
WINDOW_IMAGES = 64
"""Images begun at once: enough to keep every read under way, few enough to bound memory."""
NOTE_IMAGES = 512
"""Images that are noted as in hand at once: few enough to read one by one after a death, many enough that an object
store is asked to keep a note only every few seconds."""

LOST = failed_image(DecodeError("worker_lost", "the worker process died each time it held this image"))
"""What became of an image that killed its worker each time it was in hand."""
_MB = 1_000_000

Arrival = tuple[int, Callable[[], ReadImage]]
"""The index of a fetched image in its shard, and what decodes it on the CPU of its caller."""


class ImageReader:
    """Reads images by many threads; safe to call from several threads."""

    def __init__(self, settings: ClassifySettings, pixels: PixelSettings) -> None:
        import cv2

        cv2.setNumThreads(1)  # images are decoded side by side already
        self._pixels, self._settings = pixels, settings
        self._pool = ThreadPoolExecutor(max_workers=settings.fetch_concurrency)
        self._budget = ByteBudget(settings.fetch_memory_mb * _MB)

    def begin(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        """Begin to read images, given by their index in a shard; each is put into `arrived` once it is there."""
        indices = list(images)
        step = 1 if images and is_s3(images[indices[0]].uri) else FILES_PER_TASK
        for start in range(0, len(indices), step):
            self._pool.submit(self._read, {i: images[i] for i in indices[start : start + step]}, arrived)

    def _read(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        for index, image in images.items():
            arrived.put((index, self._fetch(image)))

    def _fetch(self, image: PlannedImage) -> Callable[[], ReadImage]:
        held = _HeldBytes(self._budget, self._settings.max_image_mb)
        try:
            fetched = fetch_original(image.uri, escaped=image.escaped, admit=held.admit)
        except BaseException as err:
            held.give_back()
            return partial(_raise, _name_image(err, image))
        if isinstance(fetched, ReadImage):
            held.give_back()
            return partial(_same, fetched)
        return partial(self._decode, image, fetched, held)

    def _decode(self, image: PlannedImage, fetched: FetchedImage, held: _HeldBytes) -> ReadImage:
        try:
            return decode_fetched(fetched, self._pixels, box=image.box, as_input=True)
        except Exception as err:
            raise _name_image(err, image) from err
        finally:
            held.give_back()


class _HeldBytes:
    """What one image holds of the budget."""

    def __init__(self, budget: ByteBudget, max_image_mb: int) -> None:
        self._budget, self._limit_mb, self._bytes = budget, max_image_mb, 0

    def admit(self, size: int) -> None:
        if size > self._limit_mb * _MB:
            raise DecodeError(
                "too_large", f"the file has {size / _MB:,.0f} MB; at most max_image_mb = {self._limit_mb} are read"
            )
        self.give_back()  # of a body that broke off
        self._budget.take(size)
        self._bytes = size

    def give_back(self) -> None:
        self._budget.give_back(self._bytes)
        self._bytes = 0


def _name_image(err: BaseException, image: PlannedImage) -> BaseException:
    """Name the image in a bug's message; errors for the user and signals stay as they are."""
    if isinstance(err, CarrayError) or not isinstance(err, Exception):
        return err
    named = RuntimeError(f"reading {image.uri!r} failed with {type(err).__name__}: {err}")
    named.__cause__ = err
    return named


def _raise(err: BaseException) -> ReadImage:
    raise err


def _same(failed: ReadImage) -> ReadImage:
    return failed


def read_ahead(
    reader: ImageReader,
    images: Sequence[PlannedImage],
    todo: Sequence[int],
    note: Attempt,
    keep: Callable[[Attempt], None],
    *,
    most: int,
) -> Generator[list[Arrival]]:
    """Read the images at the indices `todo`; gives those that have come, 1 to `most` at a time, in any order.

    `keep` is given the note of what is in hand, each time that becomes more. What was begun is taken even when the
    consumer stops, so that no memory stays held.
    """
    pending: set[int] = set()
    arrived: SimpleQueue[Arrival] = SimpleQueue()
    try:
        for group in _note_groups(todo, set(note.suspects)):
            alone = len(group) == 1 and group[0] in note.suspects
            while pending and alone:
                yield _take(arrived, pending, most)
            keep(note.model_copy(update={"images": sorted(pending.union(group)), "alone": alone}))
            for start in range(0, len(group), WINDOW_IMAGES):
                window = group[start : start + WINDOW_IMAGES]
                while len(pending) > WINDOW_IMAGES:
                    yield _take(arrived, pending, most)
                pending.update(window)
                reader.begin({i: images[i] for i in window}, arrived)
            while pending and alone:
                yield _take(arrived, pending, most)
        while pending:
            yield _take(arrived, pending, most)
    finally:
        for _ in pending:
            with suppress(Exception):  # what stopped the consumer says more
                arrived.get()[1]()


def _take(arrived: SimpleQueue[Arrival], pending: set[int], most: int) -> list[Arrival]:
    """Wait for one, and take with it what else is there: waiting for more could wait for memory that these hold."""
    taken = [arrived.get()]
    with suppress(Empty):
        while len(taken) < most:
            taken.append(arrived.get_nowait())
    pending.difference_update(index for index, _ in taken)
    return taken


def _note_groups(todo: Sequence[int], suspects: set[int]) -> Iterator[list[int]]:
    """Cut indices into groups that are noted by one write; a suspect is a group of its own."""
    group: list[int] = []
    for index in todo:
        if index in suspects or len(group) == NOTE_IMAGES:
            if group:
                yield group
            group = []
        if index in suspects:
            yield [index]
        else:
            group.append(index)
    if group:
        yield group

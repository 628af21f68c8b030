"""Keeps a shard's images on their way: windows that are read ahead, and notes of what is in hand.

From: the places of a shard that are to be scored. To: arrivals, in whatever order they come.
Invariants: an image is noted as in hand before it is read; at most two windows are on their way; one that was in hand
when a worker died is read alone; whatever was begun is taken, also when its consumer stops, so that no memory stays
held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue

from carray.classify.attempts import Attempt
from carray.classify.predictions_folder import PlannedImage
from carray.classify.read_images import Arrival, Reader

__all__ = ["read_ahead"]

WINDOW_IMAGES = 64
"""Far enough ahead to keep every read under way, near enough to bound memory."""
NOTE_IMAGES = 512
"""Images that are noted as in hand at once: few enough to read one by one after a death, many enough that an object
store is asked to keep a note only every few seconds."""


def read_ahead(
    reader: Reader,
    images: Sequence[PlannedImage],
    todo: Sequence[int],
    note: Attempt,
    keep: Callable[[Attempt], None],
    *,
    most: int,
) -> Generator[list[Arrival]]:
    """Read the images at the places `todo`; gives those that have come, at least one and at most `most` at a time.

    `keep` is given the note of what is in hand, each time that becomes more.
    """
    on_their_way: set[int] = set()
    arrived: SimpleQueue[Arrival] = SimpleQueue()
    try:
        for stretch in _stretches(todo, set(note.suspects)):
            alone = len(stretch) == 1 and stretch[0] in note.suspects
            while on_their_way and alone:
                yield _take(arrived, on_their_way, most)
            keep(note.model_copy(update={"images": sorted(on_their_way.union(stretch)), "alone": alone}))
            for start in range(0, len(stretch), WINDOW_IMAGES):
                window = stretch[start : start + WINDOW_IMAGES]
                while len(on_their_way) > WINDOW_IMAGES:
                    yield _take(arrived, on_their_way, most)
                on_their_way.update(window)
                reader.begin({place: images[place] for place in window}, arrived)
            while on_their_way and alone:
                yield _take(arrived, on_their_way, most)
        while on_their_way:
            yield _take(arrived, on_their_way, most)
    finally:
        for _ in on_their_way:
            with suppress(Exception):  # what stopped the consumer says more
                arrived.get()[1]()


def _take(arrived: SimpleQueue[Arrival], on_their_way: set[int], most: int) -> list[Arrival]:
    """Wait for one, and take with it what else is there: waiting for more could wait for memory that these hold."""
    taken = [arrived.get()]
    with suppress(Empty):
        while len(taken) < most:
            taken.append(arrived.get_nowait())
    on_their_way.difference_update(place for place, _ in taken)
    return taken


def _stretches(todo: Sequence[int], suspects: set[int]) -> Iterator[list[int]]:
    """Cut places into stretches that are noted together; a suspect is one of its own."""
    stretch: list[int] = []
    for place in todo:
        if place in suspects:
            if stretch:
                yield stretch
            yield [place]
            stretch = []
            continue
        stretch.append(place)
        if len(stretch) == NOTE_IMAGES:
            yield stretch
            stretch = []
    if stretch:
        yield stretch

"""Lists a bucket's flat prefix by several threads, each in a range of keys of its own that idle ones cut in two.

From: a prefix, and the ranges of it that are wanted. To: `Piece`s, handed over by the threads as they come.
Invariants: the pieces of the wanted ranges cover them exactly, whatever the keys look like; within a range they come
in order, from one thread. A range is cut only ahead of where its own thread is, and within a range the store's own
tokens lead from page to page, so a store that cannot begin after a key is still listed, by one thread. Memory is
bounded by the threads.
Cost: results/list.csv; a listing of up to `SPLIT_AFTER_PAGES` pages costs no request more than its pages.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from carray.core.errors import StorageError
from carray.core.key_splits import estimate_remaining, find_split, successor
from carray.core.s3_pages import KeyPage, PageReader

__all__ = ["PAGE_SCHEMA", "WHOLE", "Gap", "Piece", "Take", "list_ranges"]

PAGE_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), ("etag", pa.string()), ("size_bytes", pa.int64())]
)
SPLIT_AFTER_PAGES = 4
WORTH_KEYS = 4_000
"""Keys that a range is thought to have left, at least, for a cut to pay."""

Gap = tuple[str, "str | None"]
"""The keys above the first and up to the second, which is None for the end."""
WHOLE: tuple[Gap, ...] = (("", None),)


@dataclass(frozen=True, slots=True)
class Piece:
    """Is the next part of one range: all there is above `after` and up to `upto` (None: to the end)."""

    range_number: int
    batch: pa.RecordBatch
    """Columns of PAGE_SCHEMA, and of a table perhaps others."""
    keys: Sequence[str]
    """Where each row stands: what `after` and `upto` of some piece may be."""
    after: str
    upto: str | None
    last: bool
    """Whether the range ends with it."""
    ordered: bool = True
    """Whether the source has an order at all; without one, `after` and `upto` say nothing."""


Take = Callable[[Piece], None]


@dataclass(eq=False)
class _Range:
    number: int
    position: str
    end: str | None
    bound: str | None
    """No key is known between it and `end`."""
    token: str | None = None
    first: str = ""
    keys: int = 0
    pages: int = 0
    failures: int = 0
    try_at_pages: int = 1
    """Pages that it must have before a cut is tried (again)."""
    probed: bool = False


class _Refused(Exception):
    """The store does not begin after the key that it was given."""


def list_ranges(source: str, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
    """List the given ranges of an s3:// prefix to their end, or until `stop` is set; `take` is called by many threads.

    Raises:
        StorageError: the bucket does not exist or may not be listed, or lists keys in an order that loses some.
    """
    _Lister(source, take, gaps, stop).run(threads)


@dataclass
class _Lister:
    source: str
    take: Take
    gaps: Sequence[Gap]
    stop: threading.Event
    change: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Range] = field(default_factory=deque)
    active: list[_Range] = field(default_factory=list)
    ranges: int = 0
    pages: int = 0
    splits: bool = True
    ordered: bool = True
    error: BaseException | None = None

    def run(self, threads: int) -> None:
        self.reader = PageReader(self.source)
        self.root = f"s3://{self.reader.bucket}/"
        for after, upto in self.gaps:
            self._add(after, upto, upto or successor(self.reader.prefix))
        workers = [threading.Thread(target=self._work, name=f"lister-{i}", daemon=True) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.error is not None:
            raise self.error

    def _add(self, after: str, upto: str | None, bound: str | None) -> None:
        self.waiting.append(_Range(self.ranges, after, upto, bound))
        self.ranges += 1

    def _work(self) -> None:
        try:
            while (mine := self._next()) is not None:
                while not self._over() and self._list_page(mine):
                    pass
        except BaseException as err:
            self.error = self.error or err
        with self.change:
            self.change.notify_all()

    def _over(self) -> bool:
        return self.stop.is_set() or self.error is not None

    def _next(self) -> _Range | None:
        while not self._over():
            with self.change:
                if self.waiting:
                    self.active.append(self.waiting.popleft())
                    return self.active[-1]
                if not self.active:
                    return None
                victim = self._victim()
                if victim is None:
                    self.change.wait(timeout=0.2)
                    continue
                victim.probed = True
            self._split(victim)
        return None

    def _victim(self) -> _Range | None:
        if not self.splits or self.pages < SPLIT_AFTER_PAGES:
            return None
        free = [one for one in self.active if not one.probed and one.pages >= one.try_at_pages]
        sized = [(estimate_remaining(one.first, one.position, one.bound, one.keys), one) for one in free]
        best = max(sized, key=lambda pair: pair[0], default=None)
        return best[1] if best and best[0] >= WORTH_KEYS else None

    def _split(self, victim: _Range) -> None:
        try:
            cut, bound = find_split(victim.position, victim.bound, self._has_key)
        except _Refused:
            self.splits, cut, bound = False, None, victim.bound
        with self.change:
            victim.probed = False
            victim.try_at_pages = victim.pages + 1
            if cut is None or cut <= victim.position or victim not in self.active or not self.splits:
                victim.failures += 1
                victim.try_at_pages = victim.pages + 2**victim.failures
                victim.bound = bound
                return
            self._add(cut, victim.end, bound)
            victim.end = victim.bound = cut
            self.change.notify_all()

    def _has_key(self, after: str, upto: str | None) -> bool:
        page = self.reader.read(after=after, limit=1)
        if self._over() or (page.keys and page.keys[0] <= after) or (page.token and not page.keys):
            raise _Refused
        return bool(page.keys) and (upto is None or page.keys[0] <= upto)

    def _list_page(self, mine: _Range) -> bool:
        """List a range's next page and hand it over; says whether there is more."""
        page = self.reader.read(after=mine.position, token=mine.token)
        with self.change:
            self._check_order(mine, page)
            count, after = len(page.keys), mine.position
            last = page.token is None
            if mine.end is not None and page.keys and page.keys[-1] >= mine.end:
                count, last = bisect_right(page.keys, mine.end), True
            if count:
                mine.first, mine.position = mine.first or page.keys[0], page.keys[count - 1]
            mine.keys, mine.token = mine.keys + count, page.token
            mine.pages, self.pages = mine.pages + 1, self.pages + 1
            upto = mine.end if last else mine.position
            if last:
                self.active.remove(mine)
            self.change.notify_all()
        keys = page.keys[:count]
        self.take(Piece(mine.number, self._batch(page, keys), keys, after, upto, last, self.ordered))
        return not last

    def _check_order(self, mine: _Range, page: KeyPage) -> None:
        if not self.ordered or (page.in_order and (not page.keys or page.keys[0] > mine.position)):
            return
        if self.ranges > 1 or tuple(self.gaps) != WHOLE:
            raise StorageError(
                f"listing {self.source} gave {page.keys[0]!r} after {mine.position!r}, so the store lists keys in no "
                "order or not from where it is asked to; give an inventory or a table of URIs."
            )
        self.splits = self.ordered = False  # one thread and the store's tokens still list everything

    def _batch(self, page: KeyPage, keys: list[str]) -> pa.RecordBatch:
        count = len(keys)
        uris = pa.array([self.root + key for key in keys], pa.string())
        sizes = pa.array(page.sizes[:count], pa.string()).cast(pa.int64())
        etags = pa.array(page.etags[:count], pa.string())
        return pa.record_batch([uris, pa.repeat(False, count), etags, sizes], schema=PAGE_SCHEMA)

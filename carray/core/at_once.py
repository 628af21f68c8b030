"""Does many things at once, and bounds what they hold.

`at_once` asks a store for many small objects: it takes tens of milliseconds for each, and a log has thousands.
`ByteBudget` keeps the bytes that threads hold below a limit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["ByteBudget", "at_once"]

T = TypeVar("T")
U = TypeVar("U")

_THREADS = 32


def at_once(action: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Do an action for every item, many beside each other; gives the results in the items' order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(action, items))


class ByteBudget:
    """Holds threads back while the bytes in hand would pass a limit; safe to call from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, size: int) -> None:
        """Let others have these bytes."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Hold `size` bytes while a block runs, once they fit."""
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)

"""Concurrency: many requests to a store at once, and a limit on the memory that threads hold."""

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
    """Call an action on every item in many threads, such as requests to a store; returns the results in order."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(action, items))


class ByteBudget:
    """A limit on the bytes that threads hold, for which they wait; thread-safe."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, size: int) -> None:
        """Return these bytes to the budget."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Take `size` bytes for the length of a block."""
        self.take(size)
        try:
            yield
        finally:
            self.give_back(size)

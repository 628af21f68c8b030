"""Lets the threads of a worker score shards beside each other, or one of them alone: whose images may kill it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Turns"]


class Turns:
    """Lets many work beside each other, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._alone = False

    @contextmanager
    def take(self, *, alone: bool) -> Iterator[None]:
        """Hold a turn; `alone` waits until no other is held, and lets none begin meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not (alone and self._working))
            self._working += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._alone = False
                self._changed.notify_all()

"""Turns SIGTERM, which a spot machine that goes or `ray job stop` sends, into an orderly end.

From: a signal. To: a `StoppedError`, so one sentence and exit code 143.
Invariants: only the main thread can take a signal; elsewhere nothing changes. What was there before is put back. Ray
puts a handler of its own in place when it starts, so this comes after.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from carray.core.errors import StoppedError

__all__ = ["stopping_on_sigterm"]


class _Stop(BaseException):
    """Passes through Ray, which prints a stack of every Exception."""


@contextmanager
def stopping_on_sigterm(kept: str) -> Iterator[None]:
    """End what runs inside when SIGTERM comes; `kept` says what stays, such as "finished shards stay".

    Raises:
        StoppedError: SIGTERM came.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Stop:
        raise StoppedError(f"stopped by SIGTERM; {kept}, and the same command goes on from there.") from None
    finally:
        signal.signal(signal.SIGTERM, before)

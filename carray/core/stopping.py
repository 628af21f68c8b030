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

__all__ = ["sigterm_came", "stopping_on_sigterm"]

_came = False


class _Stop(BaseException):
    """Passes through Ray, which prints a stack of every Exception."""


def sigterm_came() -> bool:
    """Say whether SIGTERM is what an exception comes of: Ray may raise one of its own in the place of the handler's."""
    return _came


@contextmanager
def stopping_on_sigterm(kept: str) -> Iterator[None]:
    """End what runs inside when SIGTERM comes; `kept` says what stays, such as "finished shards stay".

    Raises:
        StoppedError: SIGTERM came.
    """
    global _came
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        global _came
        _came = True
        raise _Stop

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        if _came:
            raise StoppedError(f"stopped by SIGTERM; {kept}, and the same command goes on from there.") from None
        raise
    finally:
        _came = False
        signal.signal(signal.SIGTERM, before)

"""Measures in several processes at once, as a job runs, since each is then slower than one alone.

All begin the measured part at the same moment. Errors of carray keep their type.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from threading import BrokenBarrierError
from typing import Any, TypeVar

from carray.core.errors import BudgetError, CarrayError

__all__ = ["run_in_parallel", "wait_for_others"]

T = TypeVar("T")
START_SECONDS = 300
"""How long processes wait for each other to be ready; importing torch in many of them is slow."""

_barrier: Any = None


def run_in_parallel(work: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call `work` for each tuple of arguments, each in a process of its own; returns the results in order.

    Raises:
        CarrayError: of the kind that one of them raised.
        BudgetError: a process died, most likely for its memory.
    """
    context = get_context("spawn")  # a fork would share open sockets and locks
    barrier = context.Barrier(len(arguments))
    others: list[BaseException] = []
    with ProcessPoolExecutor(len(arguments), context, initializer=_take_barrier, initargs=(barrier,)) as pool:
        futures = [pool.submit(work, *one) for one in arguments]
        results = []
        for future in futures:
            try:
                results.append(future.result())
            except CarrayError:
                raise
            except BrokenProcessPool:
                raise BudgetError(
                    f"one of {len(arguments)} measuring processes died, probably for lack of memory; free some, or "
                    "measure with fewer (--probe-workers)."
                ) from None
            except BrokenBarrierError as err:  # another one failed, whose error is more useful
                others.append(err)
    if others:
        raise BudgetError(
            f"the {len(arguments)} measuring processes were not ready within {START_SECONDS} s; measure with fewer "
            "(--probe-workers)."
        )
    return results


def _take_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    os.environ["PYTHONWARNINGS"] = "ignore"


def wait_for_others() -> None:
    """Wait until all processes are ready for the measurement."""
    if _barrier is not None:
        _barrier.wait(START_SECONDS)

"""Runs the same work in several processes at once, as a job does: at once they are slower than one alone.

Invariants: all begin what is measured in the same moment; an error of carray's own comes through as what it is, a
process that dies is a sentence.
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
"""How long processes wait for each other to be ready: importing torch in many of them takes its time."""

_barrier: Any = None


def run_in_parallel(work: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call `work` once for each tuple of arguments, each in a process of its own; gives what they return, in order.

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
                    f"one of {len(arguments)} processes that were to measure died, most likely for its memory; free "
                    "some, or measure with fewer (--probe-workers)."
                ) from None
            except BrokenBarrierError as err:  # because another one failed, whose error says more
                others.append(err)
    if others:
        raise BudgetError(
            f"the {len(arguments)} processes that were to measure were not ready within {START_SECONDS} s; measure "
            "with fewer (--probe-workers)."
        )
    return results


def _take_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    os.environ["PYTHONWARNINGS"] = "ignore"


def wait_for_others() -> None:
    """Wait, in one of the processes, until all are ready to begin what is measured."""
    if _barrier is not None:
        _barrier.wait(START_SECONDS)

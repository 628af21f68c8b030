"""What both estimates share: ranges, their table and JSON, the machines' price, and measuring in several processes."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from threading import BrokenBarrierError
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from carray.core.errors import BudgetError, CarrayError

__all__ = [
    "MACHINE_FACTOR",
    "START_SECONDS",
    "Estimate",
    "Figure",
    "Machines",
    "Pair",
    "Range",
    "busy_text",
    "count_text",
    "load_per_core",
    "machine_figures",
    "middle",
    "money_text",
    "run_in_parallel",
    "seconds_text",
    "spread",
    "wait_for_others",
    "whole",
]

T = TypeVar("T")

MACHINE_FACTOR = 1.25
"""Machines of one type differ: the same job took 28 and 35 seconds on two of them (results/classify.csv). Each end of a
range of times is moved outwards by this factor."""
_BUSY_LOAD = 1.5
"""Load for each core above which other work disturbs a measurement."""
_READY_SECONDS = 300
"""How long measuring processes wait for each other; importing torch in many of them is slow."""


@dataclass(frozen=True, slots=True)
class Range:
    """The low and high end of an estimated figure; low is at most high."""

    low: float
    high: float

    def __add__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, other: Range | float) -> Range:
        other = other if isinstance(other, Range) else Range(other, other)
        return Range(self.low * other.low, self.high * other.high)

    def widened(self, factor: float = MACHINE_FACTOR) -> Range:
        """Move both ends outwards by a factor."""
        return Range(self.low / factor, self.high * factor)


START_SECONDS = Range(5.0, 20.0)
"""Start of the command, of Ray and its processes (results/classify.csv, cold start)."""


def middle(values: npt.NDArray[np.float64] | Sequence[float]) -> Range:
    """Compute the range of the middle 80 % of the values."""
    low, high = np.percentile(np.asarray(values, dtype=np.float64), (10.0, 90.0))
    return Range(float(low), float(high))


def whole(low: float, high: float | None = None) -> Range:
    """Make a range of a count, without fractions."""
    return Range(math.floor(low), math.ceil(low if high is None else high))


def seconds_text(seconds: float) -> str:
    """Format a time in a suitable unit: '45 s', '12 min', '3.4 h'."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def number_text(value: float) -> str:
    """Format a number to three digits, or whole above a hundred."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def count_text(value: float) -> str:
    """Format a count, which JSON holds without rounding, too."""
    return f"{value:,.0f}"


def money_text(value: float) -> str:
    """Format a price to its cents."""
    return f"{value:,.2f}" if value >= 0.01 or not value else "< 0.01"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of an estimate: an entry of its JSON, and a row of its table unless the title is empty."""

    key: str
    value: Any
    """A range, or what JSON holds as it is; None: not known."""
    title: str = ""
    text: Callable[[float], str] = number_text
    note: str = ""

    def row(self) -> tuple[str, str, str, str]:
        """Return the title, the two ends and the note as the table shows them."""
        if not isinstance(self.value, Range):
            return self.title, "", "" if self.value is None else self.text(self.value), self.note
        if self.text is seconds_text and not self.value.high:
            return self.title, "", "", "none"
        return self.title, self.text(self.value.low), self.text(self.value.high), self.note

    def plain(self) -> Any:
        """Return the value for JSON: a range as [from, to], counts exactly, all else to three digits."""
        if not isinstance(self.value, Range):
            return self.value
        ends = (self.value.low, self.value.high)
        if self.text is count_text:
            return [int(end) for end in ends]
        return [float(f"{end:.3g}") if abs(end) < 1e6 else round(end) for end in ends]


@dataclass(frozen=True)
class Estimate:
    """What a job will take."""

    intro: Sequence[str]
    """Lines on what was measured."""
    figures: Sequence[Figure]
    meaning: Sequence[str]
    """Lines on how to read the figures."""

    def __getitem__(self, key: str) -> Any:
        return next(figure.value for figure in self.figures if figure.key == key)

    def as_json(self) -> dict[str, Any]:
        """Convert for JSON; ranges are [from, to]."""
        return {figure.key: figure.plain() for figure in self.figures}

    def as_text(self) -> str:
        """Format for a terminal: what was measured, a table of ranges, what they mean."""
        lines = [("", "from", "to", ""), *(figure.row() for figure in self.figures if figure.title)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            f"{title:<{widths[0]}}  {low:>{widths[1]}}  {high:>{widths[2]}}  {note}".rstrip()
            for title, low, high, note in lines
        ]
        return "\n".join([*self.intro, "", *table, "", *self.meaning])


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a job, and their price."""

    count: int = 1
    cores: int = 1
    """Of each machine, like `gpus`."""
    gpus: int = 0
    hour_price: float | None = None
    """None: machines are not priced."""

    def text(self) -> str:
        """Describe them: '2 machines of 16 cores and 4 GPUs'."""
        gpus = f" and {self.gpus} GPUs" if self.gpus else ""
        return f"{self.count} machine{'s' if self.count > 1 else ''} of {self.cores} cores{gpus}"


def machine_figures(machines: Machines, seconds: Range, *, note: str, device_hours: str) -> tuple[list[Figure], Figure]:
    """Derive the machines' figures from the whole time: [wall-clock, machine-hours, device-hours], and their price.

    Args:
        machines: Machines of the job.
        seconds: Time of the whole job.
        note: Note beside the wall-clock time.
        device_hours: JSON key of the hours of all GPUs together, or of all cores without GPUs.
    """
    hours = seconds * (machines.count / 3600)
    unit = "GPU-hours" if machines.gpus else "core-hours"
    taken = [
        Figure("seconds", seconds, "wall-clock", seconds_text, note),
        Figure("machine_hours", hours, "machine-hours"),
        Figure(device_hours, hours * (machines.gpus or machines.cores), unit),
    ]
    if machines.hour_price is None:
        return taken, Figure("machine_money", None, "money, machines", note="not priced: --price-per-machine-hour")
    return taken, Figure("machine_money", hours * machines.hour_price, "money, machines", money_text)


class Pair(NamedTuple):
    """Seconds that one process took for an image."""

    processor: float
    """Of each thread."""
    clock: float


def spread(pairs: Sequence[Pair]) -> Range:
    """Make the range from the mean processor time of all processes to the slowest one's wall-clock time."""
    clocks = [pair.clock for pair in pairs]
    return Range(min(statistics.fmean(pair.processor for pair in pairs), *clocks), max(clocks))


def load_per_core() -> float:
    """Return the load of this machine for each core that this process may use."""
    return os.getloadavg()[0] / len(os.sched_getaffinity(0))


def busy_text(load: float) -> list[str]:
    """Warn if other work kept the machine busy during the measurement, by its load for each core before it."""
    if load <= _BUSY_LOAD:
        return []
    return [
        f"Other work kept this machine busy (a load of {load:.1f} for each core), which raised the upper ends; repeat "
        "the estimate when it is idle."
    ]


_barrier: Any = None


def run_in_parallel(work: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call `work` for each tuple of arguments, each in its own process; returns the results in order.

    Processes run together as a job's do, since each is then slower than one alone.

    Raises:
        CarrayError: of the kind that one of them raised.
        BudgetError: a process died, most likely for its memory.
    """
    context = get_context("spawn")  # a fork would share open sockets and locks
    barrier = context.Barrier(len(arguments))
    results, late = [], False
    with ProcessPoolExecutor(len(arguments), context, initializer=_take_barrier, initargs=(barrier,)) as pool:
        for future in [pool.submit(work, *one) for one in arguments]:
            try:
                results.append(future.result())
            except CarrayError:
                raise
            except BrokenProcessPool:
                raise BudgetError(
                    f"one of {len(arguments)} measuring processes died, probably for lack of memory; free some, or "
                    "measure with fewer (--probe-workers)."
                ) from None
            except BrokenBarrierError:  # another one failed, whose error is more useful
                late = True
    if late:
        raise BudgetError(
            f"the {len(arguments)} measuring processes were not ready within {_READY_SECONDS} s; measure with fewer "
            "(--probe-workers)."
        )
    return results


def _take_barrier(barrier: Any) -> None:
    global _barrier
    _barrier = barrier
    os.environ["PYTHONWARNINGS"] = "ignore"


def wait_for_others() -> None:
    """Wait until all processes are ready for the measurement, so that all begin it at the same moment."""
    if _barrier is not None:
        _barrier.wait(_READY_SECONDS)

"""Computes the figures of a classification from what was seen of it: rates, slopes, steady state, memory.

From: counts, seconds, ledger entries, the text of files in /proc. To: numbers. Nothing here starts or reads anything.
Invariants: a rate is images over seconds, per core where its name says so; steady state leaves out the tenth of the
images that was finished first and the tenth that was finished last, so neither start-up nor the last shard, scored
while other workers have nothing left, is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

__all__ = ["Line", "Process", "fit_line", "headline", "parse_process", "parse_size", "spread", "steady_rate"]

_EDGE = 0.1
_TICKS_PER_SECOND = 100
"""Of the times in /proc/PID/stat: Linux's USER_HZ, which is 100 on every architecture that carray's wheels serve."""


class Line(NamedTuple):
    """Is seconds = start-up + images * seconds an image, through two measured sizes."""

    startup_seconds: float
    seconds_per_image: float

    def seconds_of(self, images: int) -> float:
        """Give the seconds that so many images take."""
        return self.startup_seconds + images * self.seconds_per_image


class Process(NamedTuple):
    """Is what /proc/PID/stat says of a process."""

    parent: int
    cpu_seconds: float
    """Its own, user and system; its children's are theirs."""
    started: int
    """Clock ticks since the machine started: with the pid it names a process for good."""


def fit_line(few: tuple[int, float], many: tuple[int, float]) -> Line:
    """Lay a line through (images, seconds) of a small and a large run of the same job."""
    if few[0] == many[0]:
        raise ValueError(f"both runs have {few[0]} images; a slope needs two sizes")
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return Line(few[1] - few[0] * slope, slope)


def steady_rate(finished: Sequence[tuple[float, int]]) -> float | None:
    """Give images a second between the first tenth and the last tenth of the images; None where that is no span.

    Args:
        finished: (time in seconds, images) of each finished shard or image, in any order.
    """
    total, done = sum(images for _, images in finished), 0
    marks: list[tuple[float, int]] = []
    for seconds, of_one_time in groupby(sorted(finished), key=itemgetter(0)):
        done += sum(images for _, images in of_one_time)
        if _EDGE * total <= done <= (1 - _EDGE) * total:
            marks.append((seconds, done))
    if len(marks) < 2 or marks[-1][0] <= marks[0][0]:
        return None
    return (marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0])


def headline(images: int, *, wall_seconds: float, core_seconds: float, cores: int) -> dict[str, float]:
    """Give a job's headline figures: images a second, the same per core of the machine, core-hours per million images.

    Core-hours count the processor time that was used, by every process of the job; a core that waits costs none.
    """
    return {
        "images_per_second": round(images / wall_seconds, 2),
        "images_per_second_per_core": round(images / wall_seconds / cores, 2),
        "core_hours_per_million": round(core_seconds / images * 1e6 / 3600, 1),
    }


def spread(values: Sequence[float]) -> float:
    """Give by how much the largest value exceeds the smallest one: 0.1 is 10 %."""
    return max(values) / min(values) - 1


def parse_process(stat: str) -> Process:
    """Read /proc/PID/stat; the process's name, which may hold spaces and brackets, is its second field."""
    fields = stat[stat.rindex(")") + 2 :].split()
    ticks = int(fields[11]) + int(fields[12])
    return Process(parent=int(fields[1]), cpu_seconds=ticks / _TICKS_PER_SECOND, started=int(fields[19]))


def parse_size(text: str, name: str) -> float:
    """Give a size of /proc/PID/status or smaps_rollup, in MB (10^6 bytes); 0 where there is none of that name."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0

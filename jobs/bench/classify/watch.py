"""Runs one job as a whole process, measured from outside: wall-clock, processor time, memory; and rates from that."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT
from jobs.processes import kill_marked, marked_environment, marked_pids, parent, read_proc, size_of, times_of, title

_EDGE = 0.1
_EVERY_SECONDS = 0.5
_FORK_SERVER = "fork_server.serve("
"""In the command line of the process that forks the local engine's workers."""


class JobFailed(RuntimeError):
    """A watched command failed; the message holds the end of its log."""


@dataclass(frozen=True)
class Finished:
    """What a job cost. Memory is in MB (10^6 bytes): peak is the most resident, pss divides shared memory."""

    wall_seconds: float
    core_seconds: float
    started_at: float
    """Unix time, seconds."""
    result: dict[str, Any]
    """The JSON of the last line of standard output; empty without one."""
    driver_peak_mb: float
    """Of the largest process with the command's own words: `carray` watches a fork of itself."""
    worker_peak_mb: float
    """Of the largest scoring worker: a process named `ray::` and not IDLE, or a fork of a fork server."""
    worker_pss_mb: float


@dataclass
class _Seen:
    """The largest figures of one process."""

    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    pss_mb: float = 0.0
    is_worker: bool = False
    name: str = ""

    def look(self, pid: int, cpu_seconds: float) -> None:
        """Sample the process."""
        self.name = title(pid) or self.name
        self.is_worker = self.is_worker or _is_worker(pid, self.name)
        self.cpu_seconds = cpu_seconds
        self.peak_mb = max(self.peak_mb, size_of(read_proc(pid, "status"), "VmHWM"))
        if self.is_worker:
            self.pss_mb = max(self.pss_mb, size_of(read_proc(pid, "smaps_rollup"), "Pss"))


def _is_worker(pid: int, name: str) -> bool:
    if _FORK_SERVER in name:  # a fork has its server's command line
        return _FORK_SERVER in title(parent(pid))
    return name.startswith("ray::") and not name.startswith("ray::IDLE")


def run_watched(
    command: Sequence[object],
    *,
    log: Path,
    environment: Mapping[str, str] = {},
    python: str = sys.executable,
    most_seconds: float = float("inf"),
) -> Finished:
    """Run a command of a Python (`-m carray classify ...`) in the clone until it ends; JobFailed on an error.

    The clock runs from before the process starts until it has ended. Every process that it started counts, sampled
    twice a second, also those that outlive their parent. What was started is ended if we are, or after `most_seconds`,
    which is an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[tuple[int, int], _Seen] = {}
    mark = secrets.token_hex(8)
    # Ray's own niceness of 15 would matter only beside other work.
    variables = marked_environment(mark, {"RAY_worker_niceness": "0", **environment})
    words = [python, *map(str, command)]
    with log.open("w") as err, log.with_suffix(".out").open("w+") as out:
        started, started_at = time.monotonic(), time.time()
        process = subprocess.Popen(words, cwd=ROOT, env=variables, stdout=out, stderr=err)
        try:
            while process.poll() is None and time.monotonic() < started + most_seconds:
                _look(mark, seen)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=_EVERY_SECONDS)
        finally:
            is_late = process.poll() is None  # or we are being stopped
            if is_late:
                kill_marked(mark, process)
        wall_seconds = time.monotonic() - started
        out.seek(0)
        printed = out.read().splitlines()
    if is_late or process.returncode:
        end = f"took over {most_seconds:g} s" if is_late else f"failed:\n{log.read_text(errors='replace')[-3000:]}"
        raise JobFailed(f"{' '.join(words[1:5])} ... {end}")
    workers = [one for one in seen.values() if one.is_worker]
    return Finished(
        wall_seconds=wall_seconds,
        core_seconds=sum(one.cpu_seconds for one in seen.values()),
        started_at=started_at,
        result=_last_json(printed),
        driver_peak_mb=max((one.peak_mb for one in seen.values() if one.name == " ".join(words)), default=0.0),
        worker_peak_mb=max((one.peak_mb for one in workers), default=0.0),
        worker_pss_mb=max((one.pss_mb for one in workers), default=0.0),
    )


def _look(mark: str, seen: dict[tuple[int, int], _Seen]) -> None:
    for pid in marked_pids(mark):
        if stat := read_proc(pid, "stat"):
            started, cpu_seconds = times_of(stat)
            seen.setdefault((pid, started), _Seen()).look(pid, cpu_seconds)


def _last_json(printed: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(printed[-1]))
    except (IndexError, ValueError, TypeError):
        return {}


def fit_line(few: tuple[int, float], many: tuple[int, float]) -> tuple[float, float]:
    """Fit seconds = start-up + images * slope through (images, seconds) of two runs; returns (start-up, slope)."""
    if few[0] == many[0]:
        raise ValueError(f"both runs have {few[0]} images; a slope needs two sizes")
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return few[1] - few[0] * slope, slope


def steady_rate(finished: Sequence[tuple[float, int]]) -> float | None:
    """Compute images a second between the first tenth and the last tenth of the images; None if there is no such span.

    `finished` holds (seconds, images) of each finished shard. Start-up and the last shard, scored while other workers
    have nothing left, are left out.
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
    """Return images a second, the same per core, and core-hours (processor time used) per million images."""
    return {
        "images_per_second": round(images / wall_seconds, 2),
        "images_per_second_per_core": round(images / wall_seconds / cores, 2),
        "core_hours_per_million": round(core_seconds / images * 1e6 / 3600, 1),
    }

"""Runs one job as a whole process, measured from outside: wall-clock, processor time, memory; and rates from that."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from jobs.bench.rows import ROOT

_EDGE = 0.1
_TICKS_PER_SECOND = 100
"""USER_HZ of the times in /proc/PID/stat: 100 on every architecture that carray supports."""
_EVERY_SECONDS = 0.5


class JobFailed(RuntimeError):
    """A watched command failed; the message holds the end of its log."""


@dataclass
class _Seen:
    """The largest figures of one process."""

    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    pss_mb: float = 0.0
    is_worker: bool = False


@dataclass(frozen=True)
class Finished:
    """What a job cost. Memory is in MB (10^6 bytes): peak is the most resident, pss divides shared memory."""

    wall_seconds: float
    core_seconds: float
    started_at: float
    """Unix time, seconds."""
    lines: list[tuple[float, str]]
    """Of standard error: seconds since the start, and the line."""
    result: dict[str, Any]
    """The JSON of the last line of standard output; empty without one."""
    driver_peak_mb: float
    worker_peak_mb: float
    """Of the largest scoring worker, a process named `ray::` and not IDLE."""
    worker_pss_mb: float
    workers: int

    def seconds_of_line(self, beginning: str) -> float | None:
        """Return when a line with that beginning was written, seconds since the start; None if none was."""
        return next((seconds for seconds, line in self.lines if line.startswith(beginning)), None)


@dataclass
class _Watch:
    root: int
    seen: dict[tuple[int, int], _Seen] = field(default_factory=dict)

    def look(self) -> None:
        """Sample the root and all its descendants."""
        processes = {pid: process for pid in _pids() if (process := _process(pid)) is not None}
        family = {self.root} | {pid for pid, started in self.seen if _same(processes.get(pid), started)}
        while more := {pid for pid, process in processes.items() if process.parent in family} - family:
            family |= more
        for pid in family & set(processes):
            self._note(pid, processes[pid])

    def _note(self, pid: int, process: Process) -> None:
        seen = self.seen.setdefault((pid, process.started), _Seen())
        seen.cpu_seconds = process.cpu_seconds
        seen.peak_mb = max(seen.peak_mb, parse_size(_read(pid, "status"), "VmHWM"))
        name = _read(pid, "cmdline")
        seen.is_worker = seen.is_worker or (name.startswith("ray::") and not name.startswith("ray::IDLE"))
        if seen.is_worker:
            seen.pss_mb = max(seen.pss_mb, parse_size(_read(pid, "smaps_rollup"), "Pss"))


def run_watched(command: Sequence[object], *, log: Path, environment: Mapping[str, str] = {}) -> Finished:
    """Run a command of this Python (`-m carray classify ...`) in the clone until it ends; JobFailed on an error.

    The clock runs from before the process starts until it has ended. Every descendant counts, sampled twice a second,
    also those that outlive their parent. What was started is ended if we are.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[tuple[float, str]] = []
    surroundings = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_worker_niceness": "0",
        **environment,
    }  # 15 would matter only beside other work
    with log.open("w") as err, log.with_suffix(".out").open("w+") as out:
        started, started_at = time.monotonic(), time.time()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=surroundings,
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=_keep_lines, args=(process.stderr, err, lines, started), daemon=True)
        reader.start()
        watch = _Watch(process.pid)
        _wait(process, watch)
        wall_seconds = time.monotonic() - started
        reader.join(timeout=5)
        out.seek(0)
        printed = out.read().splitlines()
    if process.returncode:
        raise JobFailed(f"{' '.join(map(str, command[:4]))} ... failed:\n{log.read_text()[-3000:]}")
    return _finished(watch, process.pid, wall_seconds, started_at, lines, _last_json(printed))


def _wait(process: subprocess.Popen[str], watch: _Watch) -> None:
    try:
        while True:
            watch.look()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_EVERY_SECONDS)
                return
    finally:
        if process.poll() is None:  # we are being stopped
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _finished(
    watch: _Watch,
    root: int,
    wall_seconds: float,
    started_at: float,
    lines: list[tuple[float, str]],
    result: dict[str, Any],
) -> Finished:
    workers = [seen for seen in watch.seen.values() if seen.is_worker]
    return Finished(
        wall_seconds=wall_seconds,
        core_seconds=sum(seen.cpu_seconds for seen in watch.seen.values()),
        started_at=started_at,
        lines=lines,
        result=result,
        driver_peak_mb=max(seen.peak_mb for (pid, _), seen in watch.seen.items() if pid == root),
        worker_peak_mb=max((seen.peak_mb for seen in workers), default=0.0),
        worker_pss_mb=max((seen.pss_mb for seen in workers), default=0.0),
        workers=len(workers),
    )


def _keep_lines(stream: Any, log: TextIO, lines: list[tuple[float, str]], started: float) -> None:
    with stream:
        for line in stream:
            lines.append((time.monotonic() - started, line.rstrip("\n")))
            log.write(line)
            log.flush()


def _last_json(printed: list[str]) -> dict[str, Any]:
    try:
        return dict(json.loads(printed[-1]))
    except (IndexError, ValueError, TypeError):
        return {}


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _process(pid: int) -> Process | None:
    text = _read(pid, "stat")
    return parse_process(text) if text else None


def _same(process: Process | None, started: int) -> bool:
    return process is not None and process.started == started


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:  # it has ended meanwhile, or is somebody else's
        return ""


class Line(NamedTuple):
    """Seconds = start-up + images * seconds per image, through two measured sizes."""

    startup_seconds: float
    seconds_per_image: float

    def seconds_of(self, images: int) -> float:
        """Return the seconds for so many images."""
        return self.startup_seconds + images * self.seconds_per_image


class Process(NamedTuple):
    """A process, by /proc/PID/stat."""

    parent: int
    cpu_seconds: float
    """User and system, without its children."""
    started: int
    """Clock ticks since the machine started; with the pid it identifies a process."""


def fit_line(few: tuple[int, float], many: tuple[int, float]) -> Line:
    """Fit a line through (images, seconds) of a small and a large run."""
    if few[0] == many[0]:
        raise ValueError(f"both runs have {few[0]} images; a slope needs two sizes")
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return Line(few[1] - few[0] * slope, slope)


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


def spread(values: Sequence[float]) -> float:
    """Return by how much the largest value exceeds the smallest: 0.1 is 10 %."""
    return max(values) / min(values) - 1


def parse_process(stat: str) -> Process:
    """Parse /proc/PID/stat, whose second field may hold spaces and brackets."""
    fields = stat[stat.rindex(")") + 2 :].split()
    ticks = int(fields[11]) + int(fields[12])
    return Process(parent=int(fields[1]), cpu_seconds=ticks / _TICKS_PER_SECOND, started=int(fields[19]))


def parse_size(text: str, name: str) -> float:
    """Return a size of /proc/PID/status or smaps_rollup in MB (10^6 bytes); 0 if it is missing."""
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    return 0.0

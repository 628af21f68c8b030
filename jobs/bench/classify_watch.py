"""Runs one job as a whole process, timed and watched from outside: wall-clock, processor time, memory.

From: a command. To: a `Finished`.
Invariants: the clock runs from before the process starts until it has ended, interpreter and imports included; every
descendant counts, twice a second, also those that outlive their parent; what was started is ended if we are.
Ray gives its workers niceness 15, which matters only beside other work; here every job's Ray gives them 0.
"""

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
from pathlib import Path
from typing import Any, TextIO

from jobs.bench.classify_figures import Process, parse_process, parse_size
from jobs.bench.rows import ROOT

__all__ = ["Finished", "JobFailed", "run_watched"]

_EVERY_SECONDS = 0.5


class JobFailed(RuntimeError):
    """Says that a watched command ended with an error; its message holds the end of its log."""


@dataclass
class _Seen:
    """Is the most that was seen of one process."""

    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    pss_mb: float = 0.0
    is_worker: bool = False


@dataclass(frozen=True)
class Finished:
    """Says what a job cost. Memory is in MB (10^6 bytes); peak is the most resident, pss shares what is shared."""

    wall_seconds: float
    core_seconds: float
    started_at: float
    """Unix time, seconds."""
    lines: list[tuple[float, str]]
    """Of standard error, each with its seconds since the start."""
    result: dict[str, Any]
    """The JSON document that ends its standard output; empty without one."""
    driver_peak_mb: float
    worker_peak_mb: float
    """Of the largest scoring worker: a process that calls itself `ray::` and something other than IDLE."""
    worker_pss_mb: float
    workers: int

    def seconds_of_line(self, beginning: str) -> float | None:
        """Give when a line that begins so was written, in seconds since the start; None if none was."""
        return next((seconds for seconds, line in self.lines if line.startswith(beginning)), None)


@dataclass
class _Watch:
    root: int
    seen: dict[tuple[int, int], _Seen] = field(default_factory=dict)

    def look(self) -> None:
        """Take one sample of the root and all its descendants."""
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
    """Run a command of this Python (`-m carray classify ...`) in the clone until it ends.

    Raises:
        JobFailed: it ended with an error.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[tuple[float, str]] = []
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_worker_niceness": "0", **environment}
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
        if process.poll() is None:  # we are being stopped: what we started goes first
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

"""What the drills share: command lines, kinds of blow in turn, and processes that are found and killed by a mark.

A command carries the mark in its environment, and Ray's processes inherit it. Only processes with the mark are killed,
each by its id.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from jobs.bench.rows import ROOT, Program

AGENTS_SECONDS = 120
"""After their raylet was killed, Ray's agents report that to a server that died with it, and end when they give up
(ray/_private/process_watcher.py): half a minute and more."""
_MARK = "CARRAY_DRILL"


def drill_program(
    description: str | None, table: str, *, times: int, seed: bool = True, kinds: Sequence[str] = ()
) -> Program:
    """Make a drill's command line, and let SIGTERM end this program so that what was started is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    program = Program(description, table)
    program.option("--times", default=times, type=int, help="how many drills")
    if seed:
        program.option("--seed", default=0, type=int, help="of the kinds and the moments")
    if kinds:
        program.option("--only", choices=kinds, nargs="+", default=list(kinds), help="some kinds instead of all")
    return program


def kinds_of(times: int, seed: int, kinds: Sequence[str]) -> list[str]:
    """Draw the kind of each drill: every kind once in a random order, then again in another."""
    dice = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < times:
        drawn += dice.sample(kinds, len(kinds))
    return drawn[:times]


def verdict(complaints: Sequence[str], *, good: str = "all right") -> str:
    """Return what a drill's line says of its outcome."""
    return "WRONG: " + "; ".join(complaints)[:2000] if complaints else good


@dataclass
class Command:
    """A command that can be started again and again, and killed with all its processes."""

    words: Sequence[str]
    log: Path
    mark: str
    environment: Mapping[str, str] = field(default_factory=dict)
    patience_seconds: float = 180
    codes: list[int | None] = field(default_factory=list)
    """Exit code of each run; None for one that had to be killed."""
    process: subprocess.Popen[bytes] | None = None
    _said_before: int = 0

    def start(self, *more: str) -> None:
        """Start the command, with more arguments."""
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        self.process = start_marked([*self.words, *more], mark=self.mark, log=self.log, environment=self.environment)

    @property
    def alive(self) -> bool:
        """Return whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def wait(self, seconds: float | None = None) -> int | None:
        """Wait for the command's end; returns its exit code, None if it had to be killed."""
        assert self.process is not None
        try:
            code: int | None = self.process.wait(seconds or self.patience_seconds)
        except subprocess.TimeoutExpired:
            self.kill_all()
            self.process.wait()
            code = None
        self.codes.append(code)
        return code

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False if the command ended or took too long before that."""
        until = time.monotonic() + self.patience_seconds
        while self.alive and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.05)
        return False

    def said(self) -> str:
        """Return what the last run printed."""
        with self.log.open("rb") as file:
            file.seek(self._said_before)
            return file.read().decode(errors="replace")

    def kill(self) -> None:
        """Kill the command's own process alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_all(self) -> None:
        """Kill the command, its Ray and its workers, as a power failure would."""
        kill_marked(self.mark, self.process)

    def left(self, seconds: float = AGENTS_SECONDS) -> list[str]:
        """Name the processes that are still there some time after the end, and kill them."""
        until = time.monotonic() + seconds
        while (pids := marked_pids(self.mark)) and time.monotonic() < until:
            time.sleep(0.2)
        left = [title(pid).split("/")[-1][:60].strip() for pid in pids]
        self.kill_all()
        return left


def start_marked(
    command: Sequence[str], *, mark: str, log: Path, environment: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """Start a command in its own session and with no Ray to attach to; its output is appended to `log`."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    wanted = {**inherited, "PYTHONPATH": str(ROOT), **environment, _MARK: mark}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=wanted, stdout=file, stderr=file, start_new_session=True)


def marked_pids(mark: str) -> list[int]:
    """List every process that carries a mark."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_marked(mark: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Kill every process that carries a mark."""
    for _ in range(100):
        pids = marked_pids(mark)
        for pid in pids:
            kill(pid)
        if process is not None:
            process.poll()
        if not pids:
            return
        time.sleep(0.05)


def kill(pid: int) -> None:
    """Kill one process, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def title(pid: int) -> str:
    """Return a process's command line, empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def files_below(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Read every file below a folder; returns the bytes by prefix and relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(folder)}": path.read_bytes() for path in paths}

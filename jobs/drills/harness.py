"""What the drills share: command lines, the loop over drills, and commands that are killed and started again."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.bench.rows import Program
from jobs.processes import kill_marked, marked_pids, start_marked, title

AGENTS_SECONDS = 120
"""After their raylet was killed, Ray's agents report that to a server that died with it, and end when they give up
(ray/_private/process_watcher.py): half a minute and more."""
_ATTEMPTS = 5
"""Attempts at a drill before one that never disturbed its command counts as wrong."""


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


@dataclass
class Outcome:
    """How a drill went."""

    said: str
    """What was done to the command and when; empty if the command had ended before."""
    complaints: list[str]
    """What is lost, doubled, or wrong."""
    codes: dict[str, list[int | None]] = field(default_factory=dict)
    """Exit codes of the runs of each command; None for one that had to be killed."""
    left: Sequence[str] = ()
    """Processes that outlived the command."""
    note: str = ""
    """More to say of a drill that went well."""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Return whether something was done and nothing went wrong."""
        return bool(self.said) and not self.complaints

    def text(self) -> str:
        """Describe it in one line."""
        codes = [f"{name} {' '.join(map(str, codes))}".strip() for name, codes in self.codes.items()]
        facts = [self.said or "nothing was done, since the command had ended", f"exit codes {', '.join(codes)}"]
        facts += [f"left running: {', '.join(self.left)}"] if self.left else []
        good = self.note or "all right" if self.said else "drawn again"
        wrong = f"WRONG: {'; '.join(self.complaints)[:2000]}" if self.complaints else good
        return "; ".join([*facts, f"{self.seconds:.0f} s", wrong])


def run_drills(times: int, drill: Callable[[int, int], Outcome]) -> Iterator[Outcome]:
    """Run drills, and print a line for each; one that came too late to disturb its command is repeated.

    Args:
        times: Number of drills.
        drill: Runs one, given its number and that of the attempt, from 0.
    """
    for number in range(times):
        for attempt in range(_ATTEMPTS):
            started = time.monotonic()
            outcome = drill(number, attempt)
            outcome.seconds = time.monotonic() - started
            print(f"drill {number + 1}/{times}: {outcome.text()}", flush=True)
            if outcome.said:
                break
        yield outcome


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


def files_below(folder: Path, prefix: str = "") -> dict[str, bytes]:
    """Read every file below a folder; returns the bytes by prefix and relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {f"{prefix}{path.relative_to(folder)}": path.read_bytes() for path in paths}

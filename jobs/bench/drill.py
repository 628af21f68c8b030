"""Kills searches at random moments, lets them go on, and compares them with one that nobody disturbed.

From: drawn vehicles. To: an `Outcome` a drill.
Invariants: one trial runs at a time, on one core, so that what is undisturbed has one order of decisions only; a kill
is SIGKILL, of processes that carry this drill's mark in their environment and of no others; the moment is drawn from
the search's own progress, a number of logged epochs and a fraction of a second, so that it may fall into anything.
A trial's process is killed in the midst of an epoch: lost between two trials, it would make the next one begin after
others, and decisions come in another order, which is lawful but not comparable; such a blow is drawn again.
Cost: about 35 s a drill on two cores, most of it Ray and torch starting anew.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.bench.drill_compare import changed, differences, other_winner
from jobs.bench.rows import ROOT

__all__ = ["KINDS", "Outcome", "Search", "drill", "run_undisturbed"]

KINDS = ("machine", "driver", "worker")
"""What is killed: every process of the search, Ray's too; the command's own process; the process of a trial."""
_MARK = "CARRAY_DRILL"
_PATIENCE_SECONDS = 240
_LONGEST_WAIT_SECONDS = 1.0
"""After the drawn number of epochs: longer than an epoch and the writing of its files."""
_SETTLED_SECONDS = 0.3
"""After a kill: by then what the process had reported is decided and logged."""

SETTINGS: dict[str, Any] = {
    "search": {"trials": 7, "epochs": 4, "seed": 3, "reduction_factor": 2, "cpus_per_trial": 1},
    "pixels": {"decode_size": 56, "input_size": 48},
    "families": {
        "cnn": {
            "default": {"input_size": 48, "stages": 3, "width": 8, "batch_images": 16},
            "space": {"learning_rate": {"log_uniform": [1e-4, 1e-2]}, "dropout": {"uniform": [0.0, 0.5]}},
        }
    },
}


@dataclass(frozen=True)
class Outcome:
    """Says how a drill went."""

    kills: list[str]
    """What was killed and when, in words."""
    complaints: list[str]
    """Each way in which it differs from the undisturbed search; none when it is the same."""
    seconds: float
    void: bool = False
    """Whether a blow fell between two trials, or after the end, so that there is nothing to compare."""
    left: int = 0
    """Processes that were still there half a minute after the end; they are killed and counted."""


@dataclass
class Search:
    """Is one search in a run folder, driven by a process that can be killed."""

    manifest: str
    run: str
    log: Path
    mark: str
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start the command, or repeat it."""
        environment = {**os.environ, _MARK: self.mark, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "jobs.bench.drill", self.manifest, self.run]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def alive(self) -> bool:
        """Say whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def entries(self) -> list[dict[str, Any]]:
        """Read the log as it stands."""
        from carray.trials.format import read_log

        return read_log(self.run)

    def wait_for_epochs(self, count: int) -> bool:
        """Wait until so many epochs are logged; gives whether the command still runs then."""
        from carray.core.storage import join, list_files

        until = time.monotonic() + _PATIENCE_SECONDS
        while self.alive and time.monotonic() < until:
            if len(list_files(join(self.run, "log"))) >= count:
                return True
            time.sleep(0.05)
        return self.alive

    def wait(self) -> int:
        """Wait for the command's end and give its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill_all()
            return -1

    def pids(self) -> list[int]:
        """Give every process that carries this search's mark."""
        wanted = f"{_MARK}={self.mark}".encode()
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (place / "environ").read_bytes().split(b"\0"):
                    found.append(int(place.name))
            except OSError:  # it ended meanwhile, or is somebody else's
                continue
        return found

    def kill_all(self) -> None:
        """Kill the command, its Ray and its workers, as a machine that loses power would."""
        for _ in range(100):
            pids = self.pids()
            for pid in pids:
                _kill(pid)
            if self.process is not None:
                self.process.poll()
            if not pids:
                return
            time.sleep(0.05)

    def kill_driver(self) -> None:
        """Kill the command's own process alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_worker(self) -> bool:
        """Kill the process of a trial in the midst of an epoch; gives whether it was still in it when it died."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while self.alive and time.monotonic() < until:
            logged = len(self.entries())
            training = [pid for pid in self.pids() if re.match(r"ray::\w+\.train\b", _title(pid))]
            if training:
                _kill(training[0])
                time.sleep(_SETTLED_SECONDS)
                entries = self.entries()
                return len(entries) == logged or entries[-1]["decision"] == "continue"
            time.sleep(0.02)
        return False


def run_undisturbed(search: Search) -> tuple[list[dict[str, Any]], dict[str, Any], float]:
    """Run a search that nobody disturbs: its log, its outcome and its seconds."""
    started = time.monotonic()
    search.start()
    code = search.wait()
    if code:
        raise SystemExit(f"the undisturbed search failed:\n{search.log.read_text()[-3000:]}")
    return search.entries(), _done(search), time.monotonic() - started


def drill(
    search: Search,
    kinds: Sequence[str],
    reference: Sequence[Mapping[str, Any]],
    reference_done: Mapping[str, Any],
    dice: random.Random,
) -> Outcome:
    """Kill a search once for each of `kinds`, at moments that the dice choose, let it go on, and compare."""
    started, kills, complaints = time.monotonic(), [], []
    void = False
    for kind in kinds:
        if not search.alive:
            search.start()
        there = len(search.entries())
        if there >= len(reference):
            break
        search.wait_for_epochs(dice.randint(there, len(reference) - 1))
        time.sleep(dice.uniform(0, _LONGEST_WAIT_SECONDS))
        if not search.alive:
            break
        void = void or not _strike(search, kind)
        before = search.entries()
        kills.append(f"{kind} at epoch {len(before)} of {len(reference)}")
        if kind != "worker":
            search.start()
        # What stood in the log when the blow fell must stand there when the search goes on, word for word.
        search.wait_for_epochs(len(before) + 1)
        complaints += changed(before, search.entries())
    code = search.wait()
    if code:
        complaints.append(f"the command ended with {code}: {search.log.read_text()[-500:]}")
    else:
        complaints += differences(reference, search.entries()) + other_winner(reference_done, _done(search))
    return Outcome(kills, complaints, time.monotonic() - started, void or not kills, _left(search))


def _strike(search: Search, kind: str) -> bool:
    if kind == "worker":
        return search.kill_worker()
    if kind == "driver":
        search.kill_driver()
    else:
        search.kill_all()
    return True


def _done(search: Search) -> dict[str, Any]:
    from carray.core.storage import join, read_json

    return dict(read_json(join(search.run, "done.json")))


def _left(search: Search) -> int:
    until = time.monotonic() + 30
    while search.pids() and time.monotonic() < until:
        time.sleep(0.2)
    left = len(search.pids())
    search.kill_all()
    return left


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def main(manifest: str, run: str) -> None:
    """Run, or go on with, the drilled search, on a private Ray of one core."""
    from carray.core.on_ray import start_ray
    from carray.core.settings import parse_settings
    from carray.trials.on_ray import search
    from carray.trials.space import TuneSettings

    with start_ray(num_cpus=1):
        print(json.dumps(search(manifest, run=run, settings=parse_settings(TuneSettings, SETTINGS))))


if __name__ == "__main__":
    main(*sys.argv[1:])

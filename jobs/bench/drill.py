"""Kills searches at random moments, lets them go on, and compares them with one that nobody disturbed.

From: drawn vehicles. To: an `Outcome` a drill.
Invariants: one trial runs at a time, on one core, so that what is undisturbed has one order of decisions only; a kill
is SIGKILL, of processes that carry this drill's mark in their environment and of no others; the moment is drawn from
the search's own progress, a number of logged epochs and a fraction of a second, so that it may fall into anything.
When a trial's process alone is killed, Ray hands its core to the trial that waits already, and the lost one goes on
after it. ASHA then sees the same epochs in another order, and may rightly decide otherwise; so after such a kill each
epoch must have the figures of the same epoch in a search that stops nobody, and each decision must follow from the log.
Cost: about 35 s a drill on two cores, most of it Ray and torch starting anew.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.bench.drill_compare import Reference, changed, differences, disagreements, other_winner
from jobs.bench.processes import AGENTS_SECONDS, kill, kill_marked, marked_pids, start_marked, title

__all__ = ["KINDS", "Outcome", "Search", "drill", "run_references"]

KINDS = ("machine", "driver", "worker")
"""What is killed: every process of the search, Ray's too; the command's own process; the process of a trial."""
_PATIENCE_SECONDS = 240
_LONGEST_WAIT_SECONDS = 1.0
"""After the drawn number of epochs: longer than an epoch and the writing of its files."""
_WORKERS = ("TrialRunner", "ResourceTrainable")
"""In the title of a trial's process, while it works and while it waits."""

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
    """What is lost, doubled, or other than it must be; none when all is right."""
    seconds: float
    other_order: bool = False
    """Whether all is right, but the epochs came in another order than in the undisturbed search."""
    void: bool = False
    """Whether no blow fell, since the search had ended."""
    left: Sequence[str] = ()
    """Processes that were still there two minutes after the end; they are killed and counted."""


@dataclass
class Search:
    """Is one search in a run folder, driven by a process that can be killed."""

    manifest: str
    run: str
    log: Path
    mark: str
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self, scheduler: str = "asha") -> None:
        """Start the command, or repeat it."""
        command = [sys.executable, "-m", "jobs.bench.drill", self.manifest, self.run, scheduler]
        self.process = start_marked(command, mark=self.mark, log=self.log)

    @property
    def alive(self) -> bool:
        """Say whether the command runs."""
        return self.process is not None and self.process.poll() is None

    def entries(self) -> list[dict[str, Any]]:
        """Read the log as it stands."""
        from carray.search.run_folder import read_log

        return read_log(self.run)

    def wait_for_epochs(self, count: int) -> bool:
        """Wait until so many epochs are logged; gives whether the command still runs then."""
        from carray.core.store.files import join, list_files

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
        return marked_pids(self.mark)

    def kill_all(self) -> None:
        """Kill the command, its Ray and its workers, as a machine that loses power would."""
        kill_marked(self.mark, self.process)

    def kill_driver(self) -> None:
        """Kill the command's own process alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_worker(self) -> bool:
        """Kill a trial's process, whatever it is at; gives whether there was one."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while self.alive and time.monotonic() < until:
            workers = [pid for pid in self.pids() if any(name in title(pid) for name in _WORKERS)]
            if workers:
                kill(workers[0])
                return True
            time.sleep(0.02)
        return False


def run_references(undisturbed: Search, unpruned: Search) -> tuple[Reference, float]:
    """Run a search that nobody disturbs, and one that stops nobody; gives both logs and the first one's seconds."""
    started = time.monotonic()
    for search, scheduler in ((undisturbed, "asha"), (unpruned, "none")):
        search.start(scheduler)
        if search.wait():
            raise SystemExit(f"the undisturbed search failed:\n{search.log.read_text()[-3000:]}")
        if search is undisturbed:
            seconds = time.monotonic() - started
    return Reference(undisturbed.entries(), unpruned.entries(), _done(undisturbed)), seconds


def drill(search: Search, kinds: Sequence[str], reference: Reference, dice: random.Random) -> Outcome:
    """Kill a search once for each of `kinds`, at moments that the dice choose, let it go on, and compare."""
    started, kills, complaints = time.monotonic(), [], []
    for kind in kinds:
        if not search.alive:
            search.start()
        there = len(search.entries())
        if there >= len(reference.entries):
            break
        search.wait_for_epochs(dice.randint(there, len(reference.entries) - 1))
        time.sleep(dice.uniform(0, _LONGEST_WAIT_SECONDS))
        if not search.alive or not _strike(search, kind):
            break
        before = search.entries()
        kills.append(f"{kind} at epoch {len(before)} of {len(reference.entries)}")
        if kind != "worker":
            search.start()
        # What stood in the log when the blow fell must stand there when the search goes on, word for word.
        search.wait_for_epochs(len(before) + 1)
        complaints += changed(before, search.entries())
    code = search.wait()
    if code:
        complaints.append(f"the command ended with {code}: {search.log.read_text()[-500:]}")
        return Outcome(kills, complaints, time.monotonic() - started, left=_left(search))
    other = differences(reference.entries, search.entries()) + other_winner(reference.done, _done(search))
    strict = not any(kill.startswith("worker") for kill in kills)
    complaints += other if strict else _unlawful(search, reference)
    seconds = time.monotonic() - started
    return Outcome(kills, complaints, seconds, other_order=bool(other), void=not kills, left=_left(search))


def _unlawful(search: Search, reference: Reference) -> list[str]:
    """Say what cannot be explained by another order of the same trials."""
    from carray.search.replay_on_ray import replay

    return disagreements(reference, search.entries(), _done(search)) + replay(search.run)


def _strike(search: Search, kind: str) -> bool:
    if kind == "worker":
        return search.kill_worker()
    if kind == "driver":
        search.kill_driver()
    else:
        search.kill_all()
    return True


def _done(search: Search) -> dict[str, Any]:
    from carray.core.store.files import join, read_json

    return dict(read_json(join(search.run, "done.json")))


def _left(search: Search) -> list[str]:
    until = time.monotonic() + AGENTS_SECONDS
    while search.pids() and time.monotonic() < until:
        time.sleep(0.2)
    left = [title(pid)[:80] for pid in search.pids()]
    search.kill_all()
    return left


def main(manifest: str, run: str, scheduler: str) -> None:
    """Run, or go on with, the drilled search, on a private Ray of one core."""
    from carray.core.ray.connect import start_ray
    from carray.core.settings import parse_settings
    from carray.search.search_on_ray import search
    from carray.search.space import TuneSettings

    wanted = {**SETTINGS, "search": {**SETTINGS["search"], "scheduler": scheduler}}
    with start_ray(num_cpus=1):
        print(json.dumps(search(manifest, run=run, settings=parse_settings(TuneSettings, wanted))))


if __name__ == "__main__":
    main(*sys.argv[1:])

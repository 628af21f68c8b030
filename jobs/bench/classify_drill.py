"""Drills the classification job once: start it, strike it, run it again until all is scored, and look at every row.

From: a kind of fault, a fresh output folder. To: an `Outcome`.
Cost: about 25 s on two cores, most of it Ray starting.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.classify_check import inspect_output
from jobs.bench.classify_faults import Scene, Strike, full_disk, restore, strike, two_nodes
from jobs.bench.classify_job import Job

__all__ = ["Outcome", "drill"]

_SURVIVED = ("worker", "raylet", "denied", "deleted", "replaced", "version")
"""Faults that must not end the job."""
_MOST_RUNS = 4
_STORAGE_REFUSED = 4


@dataclass(frozen=True)
class Outcome:
    """Says how a drill went."""

    kind: str
    said: str
    """What was done and when; empty when the job had ended before."""
    codes: list[int | None]
    """The exit codes of its runs."""
    refetched: int
    """Rows of status fetch_error that --retry-failed had to read again."""
    complaints: list[str]
    seconds: float
    left: list[str]
    """Processes that were still there half a minute after the end; they are ended."""


def drill(kind: str, job: Job, scene: Scene, dice: random.Random, work: Path) -> Outcome:
    """Run a job, do to it what `kind` says, run it again until every image that can be read is scored, and compare."""
    started = time.monotonic()
    complaints: list[str] = []
    refetched = 0
    with _lying_in_wait(kind, job, scene, dice, work) as end_fault:
        job.start()
        blow = strike(kind, job, scene, dice)
        try:
            complaints += blow.complaints
            if kind == "driver" and blow.said:
                assert job.process is not None
                job.codes.append(job.process.wait())
                time.sleep(dice.choice([0, 3]))  # its workers may be at work still when the next one starts
            elif kind != "term" or not blow.said:
                job.wait()
                complaints += _check_end(kind, job)
            refetched = _check_denied(job, complaints) if kind == "denied" else 0
            end_fault()
            refetched = max(refetched, _finish(job, blow, complaints))
            complaints += inspect_output(job.out, blow.truth)
        finally:
            restore(scene, {*blow.truth.deleted, *blow.truth.replaced})
        left = job.left()
        # The helpers of a Ray whose driver was killed may take a minute to notice; a scorer must not outlive it.
        complaints += [f"{name} goes on" for name in left]
    return Outcome(kind, blow.said, job.codes, refetched, complaints, time.monotonic() - started, left)


def _finish(job: Job, blow: Strike, complaints: list[str]) -> int:
    """Run the command until it ends well and nothing more can be fetched; gives how many rows were fetched again."""
    refetched = 0
    while len(job.codes) < _MOST_RUNS:
        failed = job.fetch_errors()
        if job.codes[-1] == 0 and (not failed or blow.truth.deleted):
            return refetched
        refetched = max(refetched, failed)
        job.start(retry_failed=True)
        if job.wait():
            complaints.append(f"run {len(job.codes)}, undisturbed, ended with {job.codes[-1]}: {job.said()[-600:]}")
    if job.codes[-1] != 0 or job.fetch_errors():
        complaints.append(f"after {len(job.codes)} runs {job.fetch_errors()} rows are fetch_error")
    return refetched


def _check_end(kind: str, job: Job) -> list[str]:
    """Look at how a disturbed run ended: well, or by storage's exit code, in one sentence beside how to go on."""
    code, said = job.codes[-1], job.said()
    if code is None:
        return [f"it did not end by itself: {said[-600:]}"]
    due = {0} if kind in _SURVIVED else {_STORAGE_REFUSED} if kind == "disk" else {0, _STORAGE_REFUSED}
    complaints = [] if code in due else [f"exit code {code}, not {due}: {said[-600:]}"]
    sentences = [text for text in re.findall(r"^carray: .*", said, re.MULTILINE) if "; to go on, run" not in text]
    if code and (len(sentences) != 1 or "Traceback" in said):
        complaints.append(f"{len(sentences)} sentences where one is due: {said[-600:]}")
    if kind == "disk" and code and "free space" not in said:
        complaints.append(f"it does not say what to do about the full disk: {sentences}")
    return complaints


def _check_denied(job: Job, complaints: list[str]) -> int:
    failed = job.fetch_errors()
    if not failed:
        complaints.append("no row is fetch_error, though a prefix was denied")
    return failed


@contextmanager
def _lying_in_wait(kind: str, job: Job, scene: Scene, dice: random.Random, work: Path) -> Iterator[Callable[[], None]]:
    """Prepare what a kind needs before its job starts; gives a function that ends the fault."""
    from carray.testing.drawing import DEMO_CLASSES
    from carray.testing.fault_proxy import Rule

    with ExitStack() as stack:
        if kind == "disk":
            yield stack.enter_context(full_disk(Path(job.out).parent, kilobytes=dice.randint(60, 300)))
        elif kind == "denied":
            rule = Rule(
                "answer",
                status=403,
                code="AccessDenied",
                method="GET",
                key=f"/{scene.prefix}{dice.choice(DEMO_CLASSES[:3])}/",
            )
            scene.proxy.add(rule)
            yield lambda: scene.proxy.withdraw(rule)
        else:
            if kind == "raylet":
                job.environment = stack.enter_context(two_nodes(job, work / f"ray-{len(list(work.iterdir()))}"))
            yield lambda: None

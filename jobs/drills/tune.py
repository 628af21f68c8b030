"""Kills a search with SIGKILL, resumes it, and checks that it ends as an undisturbed one does; many times.

    python -m jobs.drills.tune --times 10 [--s3] [--seed 0]

Uses drawn vehicles; with --s3 the runs lie in a real object store on loopback (extra `dev`). Prints a line per drill,
appends a row to results/drill_tune.csv, and ends with one JSON line; exit code 1 if a drill went wrong. Cost: about
40 s a drill on two cores.

One trial runs at a time on one core, so an undisturbed search has one order of decisions only. The moment of a kill is
a random number of logged epochs and a fraction of a second. After a trial's process alone is killed, Ray gives its core
to the trial that waits, so ASHA sees the same epochs in another order and may decide otherwise. After such a kill each
epoch must have the figures of the same epoch in a search that stops nobody, and each decision must follow from the log.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carray.core.store.files import join, list_files, read_json
from carray.manifest.prepare import prepare
from carray.search.run_folder import read_log
from carray.testing.drawing import draw_dataset
from carray.testing.object_store import start_store
from jobs.drills.harness import Command, Outcome, drill_program, run_drills
from jobs.drills.search_log import Reference, changed, differences, disagreements, other_winner
from jobs.processes import kill, marked_pids, title

KINDS = ("machine", "driver", "worker")
"""What is killed: every process of the search and its Ray; the command's own process; a trial's process."""
IMAGES_PER_CLASS = 60
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


def main() -> None:
    """Run the drills, and write the results."""
    program = drill_program(__doc__, "drill_tune.csv", times=10)
    program.option("--s3", action="store_true", help="keep the runs in an object store")
    given = program.parse()
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        row = drill_searches(Path(work), times=given.times, seed=given.seed, s3=given.s3)
    program.record([row])
    print(json.dumps(row))
    sys.exit(0 if row["right"] == row["drills"] and not row["processes_left"] else 1)


@dataclass
class Search(Command):
    """A search in a run folder."""

    run: str = ""

    def entries(self) -> list[dict[str, Any]]:
        """Read the log."""
        return read_log(self.run)

    def done(self) -> dict[str, Any]:
        """Read the outcome of a finished search."""
        return dict(read_json(join(self.run, "done.json")))

    def wait_for_epochs(self, count: int) -> None:
        """Wait until so many epochs are logged, or the command has ended."""
        self.wait_until(lambda: len(list_files(join(self.run, "log"))) >= count)

    def strike(self, kind: str) -> bool:
        """Kill what `kind` says; returns whether something was killed."""
        if kind == "driver":
            self.kill()
        elif kind == "machine":
            self.kill_all()
        else:
            return self.wait_until(self._kill_worker)
        return True

    def _kill_worker(self) -> bool:
        workers = [pid for pid in marked_pids(self.mark) if any(name in title(pid) for name in _WORKERS)]
        if workers:
            kill(workers[0])
        return bool(workers)


def drill_searches(work: Path, *, times: int, seed: int, s3: bool) -> dict[str, Any]:
    """Run the undisturbed searches and `times` drills; returns a row."""
    os.environ["CARRAY_CACHE"] = str(work / "cache")
    manifest, mark = str(work / "manifest.parquet"), secrets.token_hex(8)
    draw_dataset(work / "images", images_per_class=IMAGES_PER_CLASS)
    prepare(str(work / "images"), out=manifest)
    started: list[Search] = []
    with _folder_of_runs(work, s3) as folder:

        def new(name: str, scheduler: str = "asha") -> Search:
            run = f"{folder}/{name}"
            program = f"from jobs.drills.tune import search; search({manifest!r}, {run!r}, {scheduler!r})"
            words, log = [sys.executable, "-c", program], work / f"{name}.log"
            started.append(Search(words, log, f"{mark}-{name}", patience_seconds=_PATIENCE_SECONDS, run=run))
            return started[-1]

        def drill_one(number: int, attempt: int) -> Outcome:
            dice = random.Random(f"{seed}-{number}-{attempt}")
            return drill(new(f"drill-{number}-{attempt}"), kills_of(number, dice), reference, dice)

        try:
            reference, undisturbed_seconds = run_references(new("undisturbed"), new("unpruned", "none"))
            outcomes = list(run_drills(times, drill_one))
        finally:
            for search in started:
                search.kill_all()
    kills = Counter(kind for outcome in outcomes for kind in outcome.figures["kills"])
    right = [outcome for outcome in outcomes if outcome.right]
    return {
        "storage": "s3" if s3 else "local",
        "seed": seed,
        "drills": times,
        "right": len(right),
        "same_order": sum(not outcome.note for outcome in right),
        "kills": kills.total(),
        **{f"kills_{kind}": kills[kind] for kind in KINDS},
        "trials": reference.done["trials"],
        "epochs": len(reference.entries),
        "undisturbed_seconds": round(undisturbed_seconds, 1),
        "median_drill_seconds": round(statistics.median(outcome.seconds for outcome in outcomes), 1),
        "processes_left": sum(len(outcome.left) for outcome in outcomes),
    }


def search(manifest: str, run: str, scheduler: str) -> None:
    """Start or resume the drilled search, on a private Ray of one core."""
    from carray.core.ray.connect import start_ray
    from carray.core.settings import parse_settings
    from carray.search.search_on_ray import search
    from carray.search.space import TuneSettings

    wanted = {**SETTINGS, "search": {**SETTINGS["search"], "scheduler": scheduler}}
    with start_ray(num_cpus=1):
        print(json.dumps(search(manifest, run=run, settings=parse_settings(TuneSettings, wanted))))


@contextmanager
def _folder_of_runs(work: Path, s3: bool) -> Iterator[str]:
    """Yield a local folder, or a bucket of an object store that is started for it."""
    if not s3:
        yield str(work)
        return
    with start_store(work / "store") as store:
        os.environ.update(store.environment)
        store.create_bucket("drills")
        yield "s3://drills"


def kills_of(number: int, dice: random.Random) -> list[str]:
    """Draw what a drill kills, in order: the kinds in turn, and sometimes one or two more."""
    more = dice.choice([0, 0, 1, 2])
    return [KINDS[number % len(KINDS)], *(dice.choice(KINDS) for _ in range(more))]


def run_references(undisturbed: Search, unpruned: Search) -> tuple[Reference, float]:
    """Run an undisturbed search, and one that stops nobody; returns both logs and the seconds of the first."""
    started, seconds = time.monotonic(), 0.0
    for search in (undisturbed, unpruned):
        search.start()
        if search.wait():
            raise SystemExit(f"the undisturbed search failed:\n{search.log.read_text()[-3000:]}")
        seconds = seconds or time.monotonic() - started
    reference = Reference(undisturbed.entries(), unpruned.entries(), undisturbed.done())
    print(
        f"undisturbed: {reference.done['trials']} trials, {len(reference.entries)} epochs, {seconds:.0f} s", flush=True
    )
    return reference, seconds


def drill(search: Search, kinds: Sequence[str], reference: Reference, dice: random.Random) -> Outcome:
    """Kill a search once for each of `kinds` at random moments, resume it, and compare."""
    moments: list[str] = []
    complaints: list[str] = []
    for kind in kinds:
        if not search.alive:
            search.start()
        logged = len(search.entries())
        if logged >= len(reference.entries):
            break
        search.wait_for_epochs(dice.randint(logged, len(reference.entries) - 1))
        time.sleep(dice.uniform(0, _LONGEST_WAIT_SECONDS))
        if not search.alive or not search.strike(kind):
            break
        before = search.entries()
        moments.append(f"{kind} at epoch {len(before)} of {len(reference.entries)}")
        if kind != "worker":
            search.start()
        # What was logged before the kill must be unchanged when the search has resumed.
        search.wait_for_epochs(len(before) + 1)
        complaints += changed(before, search.entries())
    killed, note = list(kinds[: len(moments)]), ""
    if search.wait() != 0:
        complaints.append(f"the command ended with {search.codes[-1]}: {search.log.read_text()[-500:]}")
    elif other := differences(reference.entries, search.entries()) + other_winner(reference.done, search.done()):
        note = "the same figures in another order"
        complaints += _unexplained(search, reference) if "worker" in killed else other
    said = f"killed {', '.join(moments)}" if moments else ""
    return Outcome(said, complaints, {"": search.codes}, search.left(), note, {"kills": killed})


def _unexplained(search: Search, reference: Reference) -> list[str]:
    """List what another order of the same trials does not explain."""
    from carray.search.run_log import check_decisions

    return disagreements(reference, search.entries(), search.done()) + check_decisions(search.run)


if __name__ == "__main__":
    main()

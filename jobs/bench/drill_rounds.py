"""Runs many drills one after another, in folders or in a bucket.

From: a number of times and a seed. To: a row of results/drill_tune.csv.
Invariants: the kinds of kill take turns, and half of the drills have a second or third kill of a drawn kind; everything
that was started is ended.
"""

from __future__ import annotations

import os
import random
import secrets
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.bench.drill import KINDS, Outcome, Search, drill, run_references

__all__ = ["kinds_of", "run_rounds"]

IMAGES_PER_CLASS = 60
_MOST_VOID = 5
"""Blows drawn for one drill before it counts as wrong."""


def run_rounds(work: Path, *, times: int, seed: int, s3: bool) -> dict[str, Any]:
    """Run one search undisturbed and `times` drills, and say of each in a line how it went."""
    os.environ["CARRAY_CACHE"] = str(work / "cache")
    manifest = _draw(work)
    mark = secrets.token_hex(8)
    with _runs_in(work, s3) as place:
        begun: list[Search] = []

        def new(name: str) -> Search:
            begun.append(Search(manifest, f"{place}/{name}", work / f"{name}.log", f"{mark}-{name}"))
            return begun[-1]

        try:
            return _run(new, times=times, seed=seed) | {"storage": "s3" if s3 else "local"}
        finally:
            for search in begun:
                search.kill_all()


def _run(new: Callable[[str], Search], *, times: int, seed: int) -> dict[str, Any]:
    reference, undisturbed_seconds = run_references(new("undisturbed"), new("unpruned"))
    trials, epochs = reference.done["trials"], len(reference.entries)
    print(f"undisturbed: {trials} trials, {epochs} epochs, {undisturbed_seconds:.0f} s", flush=True)
    outcomes = []
    for i in range(times):
        dice = random.Random(f"{seed}-{i}")
        for again in range(_MOST_VOID):
            outcome = drill(new(f"drill-{i}-{again}"), kinds_of(i, dice), reference, dice)
            print(_line(i, times, outcome), flush=True)
            if not outcome.void:
                break
        outcomes.append(outcome)
    counts = Counter(kill.split()[0] for outcome in outcomes for kill in outcome.kills)
    left = [title for outcome in outcomes for title in outcome.left]
    right = [outcome for outcome in outcomes if not outcome.complaints and not outcome.void]
    print(f"processes left running: {', '.join(left) or 'none'}", flush=True)
    return {
        "seed": seed,
        "drills": times,
        "right": len(right),
        "same_order": sum(not outcome.other_order for outcome in right),
        "kills": sum(counts.values()),
        **{f"kills_{kind}": counts[kind] for kind in KINDS},
        "trials": trials,
        "epochs": epochs,
        "undisturbed_seconds": round(undisturbed_seconds, 1),
        "median_drill_seconds": round(statistics.median(outcome.seconds for outcome in outcomes), 1),
        "processes_left": len(left),
    }


def kinds_of(number: int, dice: random.Random) -> list[str]:
    """Give what a drill kills, in order: the kind whose turn it is, and sometimes one or two more."""
    more = dice.choice([0, 0, 1, 2])
    return [KINDS[number % len(KINDS)], *(dice.choice(KINDS) for _ in range(more))]


def _line(number: int, times: int, outcome: Outcome) -> str:
    verdict = "the same"
    if outcome.complaints:
        verdict = "WRONG: " + "; ".join(outcome.complaints)[:2000]
    elif outcome.void:
        verdict = "void, since the search had ended; drawn again"
    elif outcome.other_order:
        verdict = "the same figures in another order"
    killed = ", ".join(outcome.kills) or "nothing"
    verdict += f"; {len(outcome.left)} processes left" if outcome.left else ""
    return f"drill {number + 1}/{times}: killed {killed}; {outcome.seconds:.0f} s; {verdict}"


def _draw(work: Path) -> str:
    from carray.manifest.prepare import prepare
    from carray.testing.drawing import draw_dataset

    manifest = str(work / "manifest.parquet")
    draw_dataset(work / "images", images_per_class=IMAGES_PER_CLASS)
    prepare(str(work / "images"), out=manifest)
    return manifest


@contextmanager
def _runs_in(work: Path, s3: bool) -> Iterator[str]:
    """Give the place of the runs: a folder, or a bucket of an object store that is started for them."""
    if not s3:
        yield str(work)
        return
    from carray.testing.object_store import start_store

    with start_store(work / "store") as store:
        os.environ.update(store.environment)
        store.client().create_bucket(Bucket="drills")
        yield "s3://drills"

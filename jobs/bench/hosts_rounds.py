"""Runs many drills of several hosts one after another, on one cluster.

From: a number of times and a seed. To: a row a drill, for results/drill_cluster.csv.
Invariants: every kind of loss has its turn before one has its second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.bench.classify_rounds import kinds_of
from jobs.bench.hosts_drill import Outcome, drill
from jobs.bench.hosts_losses import KINDS
from jobs.bench.hosts_scene import set_scene

__all__ = ["COLUMNS", "run_rounds"]

COLUMNS = ["seed", "drill", "kind", "right", "said", "search_codes", "classification_codes", "finished_before"]
COLUMNS += ["seconds"]


def run_rounds(work: Path, *, times: int, seed: int, only: Sequence[str] = KINDS) -> Iterator[dict[str, Any]]:
    """Run both jobs undisturbed and `times` drills; says of each in a line how it went, and gives its row."""
    with set_scene(work) as scene:
        epochs, shards = len(scene.search.entries), scene.rows.shards
        print(f"undisturbed: {epochs} epochs; {shards} shards of {len(scene.rows.etags)} images", flush=True)
        for i, kind in enumerate(kinds_of(times, seed, only)):
            outcome = drill(kind, scene, seed=f"{seed}-{i}", name=f"drill-{i}")
            print(_line(i, times, outcome), flush=True)
            yield _row(i, outcome) | {"seed": seed}


def _row(number: int, outcome: Outcome) -> dict[str, Any]:
    return {
        "drill": number + 1,
        "kind": outcome.kind,
        "right": int(not outcome.complaints),
        "said": outcome.said,
        **{f"{name}_codes": " ".join(map(str, codes)) for name, codes in outcome.codes.items()},
        "finished_before": outcome.finished,
        "seconds": round(outcome.seconds, 1),
    }


def _line(number: int, times: int, outcome: Outcome) -> str:
    verdict = "WRONG: " + "; ".join(outcome.complaints)[:2000] if outcome.complaints else "all right"
    codes = ", ".join(f"{name} {codes}" for name, codes in outcome.codes.items())
    said = outcome.said or f"{outcome.kind}: too late"
    return f"drill {number + 1}/{times}: {said}; exit codes of {codes}; {outcome.seconds:.0f} s; {verdict}"

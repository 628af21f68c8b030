"""Measures what the driver itself can do: shards a second through Ray Data with workers that do nothing, in a process.

From: nothing. To: one JSON line. Everything but the scoring is `run_shards` itself.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from carray.classify.ledger import LedgerEntry
from carray.classify.worker_on_ray import Pool, run_shards
from carray.core.ray.connect import start_ray

__all__ = ["Idle", "hand_out"]


class Idle:
    """Stands for a scoring process, and answers at once."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Take what a worker is told."""

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Give the entry of a shard without an image."""
        counts = {"rows": 0, "scored": 0, "ok": 0, "fetch_errors": 0, "decode_errors": 0}
        entry = LedgerEntry(shard=int(row["shard"]), error_codes={}, seconds=0.0, **counts)
        return {"entry": entry.model_dump_json(), "refusal": "", "sentence": ""}


def hand_out(shards: int, workers: int) -> dict[str, float]:
    """Hand out shards; gives the seconds to the first answer and the rate from then on."""
    todo = [{"shard": shard, "retry": False} for shard in range(shards)]
    with start_ray(num_cpus=workers):
        started = time.perf_counter()
        entries = run_shards({}, todo, Pool(workers, workers, cpus=1), worker=Idle)
        done = {next(entries).shard}
        first = time.perf_counter()
        done.update(entry.shard for entry in entries)
        seconds = time.perf_counter() - first
    if done != set(range(shards)):
        raise SystemExit(f"{len(done)} of {shards} shards came back")
    return {"first_seconds": round(first - started, 2), "shards_per_second": round((shards - 1) / seconds, 1)}


if __name__ == "__main__":
    print(json.dumps(hand_out(int(sys.argv[1]), int(sys.argv[2]))))

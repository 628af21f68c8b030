"""Measures what a driver's parts do as a job grows, and simulates classification on 10, 100 and 1,000 machines.

    python -m jobs.bench.scale [--parts books,driver,search,simulation] [--small]

Books are kept in a temporary folder and in an object store on loopback. Appends rows to results/scale.csv: `part` says
whether a figure was measured or simulated. Cost: 10 minutes on two cores; `--small` tries it in one. Ends with one JSON
line.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carray.classify.ledger import LedgerEntry
from carray.testing.object_store import start_store
from jobs.bench.rows import Program, run_python
from jobs.bench.scale import books
from jobs.bench.scale.simulation import Constants, simulate

CORES = 16
"""Per simulated machine; each is a worker."""


def main() -> None:
    """Measure or simulate what the arguments ask for, and write the results."""
    program, count = Program(__doc__, "scale.csv"), 0
    program.option("--parts", default=",".join(PARTS), help="which, of these; all by default")
    program.option("--small", action="store_true", help="a hundredth of everything, to see that it runs")
    small = program.parse().small
    for part in program.parts("parts", PARTS):
        for row in PARTS[part](small):
            program.record([row])
            count += 1
    print(json.dumps({"rows": count}))


def measure_books(small: bool) -> Iterator[dict[str, Any]]:
    """Measure a ledger and a log of growing length, in a folder and in a bucket."""
    by = 100 if small else 1
    with tempfile.TemporaryDirectory() as folder:
        for shards in (10_000 // by, 100_000 // by):
            yield from _measured("local", books.ledger(f"{folder}/ledger-{shards}", shards))
        yield from _measured("local", books.log(f"{folder}/log", 1_000 // by, 5))
    with _bucket() as bucket:
        yield from _measured("s3", books.ledger(f"{bucket}/ledger", 10_000 // by))
        yield from _measured("s3", books.log(f"{bucket}/log", 1_000 // by, 5))


def measure_search(small: bool) -> Iterator[dict[str, Any]]:
    """Measure the decisions of a search of a thousand trials, and a proposal at its end."""
    for trials in (10, 50) if small else (100, 1_000):
        for scheduler in ("asha", "median"):
            yield from _measured("", books.decisions(scheduler, trials, 24))
        yield from _measured("", books.proposals(trials))


def measure_driver(small: bool) -> Iterator[dict[str, Any]]:
    """Measure how many shards a driver assigns, in its own process."""
    for shards in (50, 100) if small else (1_000, 5_000):
        child = f"from jobs.bench.scale.__main__ import assign_shards; assign_shards({shards}, 2)"
        found = json.loads(run_python("-c", child).splitlines()[-1])
        yield from _measured("", [("hand_out", found["shards_per_second"], "shards a second", shards)])
        yield from _measured("", [("first_shard", found["first_seconds"], "seconds", shards)])


def simulate_machines(small: bool) -> Iterator[dict[str, Any]]:
    """Simulate 10, 100 and 1,000 machines: few prefixes and many, shards for them and for few, a slow driver."""
    sizes = (10**6, 10**7, 10**8)
    cases = [(1, True, 100.0), (1_000, False, 100.0), (1_000, True, 100.0), (1_000, False, 40.0), (1_000, True, 40.0)]
    for images, machines, (prefixes, fitted, rate) in itertools.product(sizes, (10, 100, 1_000), cases):
        workers = machines * CORES
        cut_for = workers if fitted else 1
        constants = Constants(handed_out_per_second=rate)
        count = images // (100 if small else 1)
        found = simulate(count, workers, constants=constants, prefixes=prefixes, cut_for=cut_for)
        about = {"part": "simulated", "name": f"{machines} machines", "cut_for": cut_for}
        yield {**about, "handed_out_per_second": rate, **found}


class Idle:
    """A worker that scores nothing, and answers at once."""

    def __init__(self, job: dict[str, Any]) -> None:
        """Take a worker's arguments."""

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Return the ledger entry of a shard without images."""
        counts: dict[str, Any] = {"rows": 0, "scored": 0, "ok": 0, "fetch_errors": 0, "decode_errors": 0}
        entry = LedgerEntry(shard=int(row["shard"]), error_codes={}, seconds=0.0, **counts)
        return {"entry": entry.model_dump_json(), "refusal": "", "sentence": ""}


def assign_shards(shards: int, workers: int) -> None:
    """Assign shards to idle workers; prints the seconds to the first answer, and the rate from then on, as JSON."""
    from carray.classify.engine import Pool
    from carray.classify.worker_on_ray import run_shards
    from carray.core.ray.connect import start_ray

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
    print(
        json.dumps({"first_seconds": round(first - started, 2), "shards_per_second": round((shards - 1) / seconds, 1)})
    )


def _measured(storage: str, rows: Any) -> Iterator[dict[str, Any]]:
    for name, value, unit, of in rows:
        yield {"part": "measured", "name": name, "storage": storage, "of": of, "value": round(value, 3), "unit": unit}


@contextmanager
def _bucket() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder, start_store(Path(folder)) as store:
        os.environ.update(store.environment)
        bucket = f"scale-{secrets.token_hex(4)}"
        store.create_bucket(bucket)
        yield f"s3://{bucket}"


PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "books": measure_books,
    "driver": measure_driver,
    "search": measure_search,
    "simulation": simulate_machines,
}

if __name__ == "__main__":
    main()

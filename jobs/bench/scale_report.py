"""Says what bench_scale measures and simulates, part by part, as rows of one table."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.bench import scale_books as books
from jobs.bench.rows import ROOT
from jobs.bench.scale import Constants, simulate

__all__ = ["COLUMNS", "PARTS"]

COLUMNS = [
    *("part", "name", "storage", "of", "value", "unit"),
    *("images", "workers", "prefixes", "cut_for", "handed_out_per_second", "shards", "largest_shard", "seconds"),
    *("idle_fraction", "limit", "limit_seconds"),
]
CORES = 16
"""Of a simulated machine; each is a worker."""


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
    """Measure how many shards a driver hands out, in a process of its own."""
    for shards in (50, 100) if small else (1_000, 5_000):
        command = [sys.executable, "-m", "jobs.bench.scale_driver", str(shards), "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
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


PARTS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "books": measure_books,
    "driver": measure_driver,
    "search": measure_search,
    "simulation": simulate_machines,
}


def _measured(storage: str, rows: Any) -> Iterator[dict[str, Any]]:
    for name, value, unit, of in rows:
        yield {"part": "measured", "name": name, "storage": storage, "of": of, "value": round(value, 3), "unit": unit}


@contextmanager
def _bucket() -> Iterator[str]:
    from carray.testing.object_store import start_store

    with tempfile.TemporaryDirectory() as folder, start_store(Path(folder)) as store:
        os.environ.update(store.environment)
        bucket = f"scale-{secrets.token_hex(4)}"
        store.client().create_bucket(Bucket=bucket)
        yield f"s3://{bucket}"

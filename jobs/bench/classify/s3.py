"""Measures the processor time of reading an object: carray's way beside botocore's.

    python -m jobs.bench.classify.s3 --data ../shared/stanford-cars

Uploads a folder with cars_test/, or any folder of images, to a real store on loopback (extra `dev`). Appends rows to
results/s3.csv. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from carray.core.store.image_bytes import fetch_image
from carray.core.store.s3 import s3_client
from carray.testing.object_store import start_store
from jobs.bench.rows import Program
from jobs.processes import read_proc, times_of

THREADS = 16
"""Concurrent reads, as in a classification's worker."""
REPEATS = 3
_BUCKET = "photos"


def main() -> None:
    """Measure both arms, and write the results."""
    program = Program(__doc__, "s3.csv")
    program.option("--data", required=True, type=Path, help="folder of images, or one with cars_test/ in it")
    arguments = program.parse()
    folder = arguments.data / "cars_test" if (arguments.data / "cars_test").is_dir() else arguments.data
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_reads(sorted(path for path in folder.iterdir() if path.is_file()), Path(scratch))
    program.record(rows)
    ours, theirs = (row["client_milliseconds_per_image"] for row in rows)
    print(json.dumps({"client_milliseconds_per_image": ours, "times_botocore": round(theirs / ours, 2)}))


def measure_reads(photographs: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    """Read every photograph with each arm in turn, a few times; returns a row of medians for each."""
    with start_store(folder) as store, patch.dict(os.environ, store.environment):
        store.create_bucket(_BUCKET, {path.name: path for path in photographs})
        arms: dict[str, Callable[[str], object]] = {
            "carray": lambda name: fetch_image(f"s3://{_BUCKET}/{name}"),
            "botocore get_object": lambda name: s3_client().get_object(Bucket=_BUCKET, Key=name)["Body"].read(),
        }
        names = [path.name for path in photographs]
        server = store.process.pid if store.process else 0
        found: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in arms}
        for _ in range(REPEATS):
            for arm, read in arms.items():
                read(names[0])
                found[arm].append(_measure(read, names, server))
    return [{"arm": arm, "images": len(names), "threads": THREADS} | _medians(runs) for arm, runs in found.items()]


def _measure(read: Callable[[str], object], names: Sequence[str], server: int) -> tuple[float, float, float]:
    own, its, started = time.process_time(), times_of(read_proc(server, "stat"))[1], time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, names))
    count = len(names)
    spent = 1e3 * (time.process_time() - own) / count, 1e3 * (times_of(read_proc(server, "stat"))[1] - its) / count
    return *spent, count / (time.monotonic() - started)


def _medians(runs: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    client, server, rate = (sorted(values)[len(values) // 2] for values in zip(*runs, strict=True))
    return {
        "repeats": len(runs),
        "client_milliseconds_per_image": round(client, 3),
        "server_milliseconds_per_image": round(server, 3),
        "images_per_second": round(rate, 1),
    }


if __name__ == "__main__":
    main()

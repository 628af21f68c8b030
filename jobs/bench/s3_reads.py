"""Measures what reading an image from an object store costs in processor time: carray's way beside botocore's own.

From: photographs, uploaded to a real store on loopback. To: a row of results/s3.csv for each arm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from carray.core.store.image_bytes import fetch_image
from carray.core.store.s3 import s3_client
from carray.testing.object_store import start_store

__all__ = ["COLUMNS", "THREADS", "measure_reads"]

THREADS = 16
"""As many requests under way as a classification's worker has."""
COLUMNS = [
    *("arm", "images", "threads", "repeats", "client_milliseconds_per_image", "server_milliseconds_per_image"),
    "images_per_second",
]
REPEATS = 3
_BUCKET = "photos"


def measure_reads(photographs: Sequence[Path], place: Path) -> list[dict[str, Any]]:
    """Read every photograph with each arm in turn, a few times; gives the medians, processor time in milliseconds."""
    with start_store(place) as store, patch.dict(os.environ, store.environment):
        client = store.client()
        client.create_bucket(Bucket=_BUCKET)
        for path in photographs:
            client.put_object(Bucket=_BUCKET, Key=path.name, Body=path.read_bytes())
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
    own, its, started = time.process_time(), _cpu_seconds(server), time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, names))
    count = len(names)
    spent = 1e3 * (time.process_time() - own) / count, 1e3 * (_cpu_seconds(server) - its) / count
    return *spent, count / (time.monotonic() - started)


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _medians(runs: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    client, server, rate = (sorted(values)[len(values) // 2] for values in zip(*runs, strict=True))
    return {
        "repeats": len(runs),
        "client_milliseconds_per_image": round(client, 3),
        "server_milliseconds_per_image": round(server, 3),
        "images_per_second": round(rate, 1),
    }

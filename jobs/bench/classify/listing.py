"""Measures how fast a bucket is listed into shards, and in how much memory, at 1, 10 and 100 million keys.

    python -m jobs.bench.classify.listing [--keys 1e6,1e7,1e8] [--layout flat,uuid] [--threads 16]

A loopback server lists made-up keys (layouts: carray/testing/list_server.py). Appends rows to results/list.csv. Each
listing runs in its own process, the server in another, so it takes at least two cores; shards go to the temporary
folder, 8 to 16 bytes a key. Cost: about 6 minutes for 100 million keys. Ends with one JSON line.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from carray.testing.list_server import list_environment, read_stats, start_lister
from jobs.bench.rows import Program, run_python
from jobs.processes import read_proc, size_of


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    program, done = Program(__doc__, "list.csv"), []
    program.option("--keys", default="1e6,1e7,1e8", help="how many keys the made-up buckets have")
    program.option("--layout", default="flat", help="form of the keys: flat, uuid, dated, unicode, lopsided")
    program.option("--threads", default=16, type=int, help="concurrent requests")
    arguments = program.parse()
    for layout in arguments.layout.split(","):
        for keys in arguments.keys.split(","):
            done.append(measure_listing(int(float(keys)), layout, arguments.threads))
            program.record(done[-1:])
    largest = max(done, key=lambda row: row["keys"])
    print(json.dumps({name: largest[name] for name in ("keys", "keys_per_second", "peak_memory_mb", "shards")}))


def measure_listing(keys: int, layout: str, threads: int) -> dict[str, Any]:
    """Measure `plan_run` in its own process; memory_before_mb is what its imports take."""
    with start_lister(keys, layout) as endpoint:
        child = f"from jobs.bench.classify.listing import plan; plan({threads})"
        row: dict[str, Any] = json.loads(run_python("-c", child, **list_environment(endpoint)).splitlines()[-1])
        server = read_stats(endpoint)
    if row.pop("images") != keys:
        raise SystemExit(f"{keys} keys were there, but the plan has another number of images")
    row |= {"requests": int(server["requests"]) - 1, "server_cpu_seconds": round(server["cpu_seconds"], 1)}
    return {"keys": keys, "layout": layout, "threads": threads} | row


def plan(threads: int) -> None:
    """Plan a run over the made-up bucket, and print the figures as JSON."""
    from carray.classify.ledger import RunRecord
    from carray.classify.plan import plan_run
    from carray.classify.predictions_folder import ClassifySettings

    names: dict[str, Any] = {"run_id": "r", "bundle_id": "b", "bundle": "b", "source": "s3://bucket", "runtime": "fp32"}
    wanted = RunRecord(version=1, **names, split=None, all_files=False, columns=[], created_at="", software={})
    with tempfile.TemporaryDirectory() as out:
        before, started, cpu = _memory_mb("VmRSS"), time.perf_counter(), time.process_time()
        _, totals = plan_run(out, wanted, ClassifySettings(listing_threads=threads), uses_boxes=False)
        row = {
            "images": totals.images,
            "seconds": round(seconds := time.perf_counter() - started, 2),
            "keys_per_second": round(totals.images / seconds),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_memory_mb": _memory_mb("VmHWM"),
            "memory_before_mb": before,
            "shards": totals.shards,
            "shards_mb": round(sum(path.stat().st_size for path in Path(out).rglob("*.arrow")) / 1e6, 1),
        }
    print(json.dumps(row))


def _memory_mb(name: str) -> int:
    return round(size_of(read_proc(os.getpid(), "status"), name))


if __name__ == "__main__":
    main()

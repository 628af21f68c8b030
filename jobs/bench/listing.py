"""Plans a run over a made-up bucket, in a process of its own, and says how fast that was and in how much memory.

From: a number of keys and a layout of `carray.testing.list_server`, which answers from another process. To: one row.
Invariants: what is measured is `plan_run` itself, shards written and all; the keys that it found are counted against
those that there are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT

sys.path.insert(0, str(ROOT / "tests"))

from carray.testing.list_server import list_environment, read_stats, start_lister

__all__ = ["COLUMNS", "measure_listing"]

COLUMNS = [
    *["keys", "layout", "threads", "seconds", "keys_per_second", "requests", "cpu_seconds", "server_cpu_seconds"],
    *["peak_memory_mb", "memory_before_mb", "shards", "shards_mb"],
]


def measure_listing(keys: int, layout: str, threads: int) -> dict[str, Any]:
    """Measure one listing; `peak_memory_mb` is the planning process's, `memory_before_mb` what its imports take."""
    command = [sys.executable, "-m", "jobs.bench.listing", str(keys), layout, str(threads)]
    with start_lister(keys, layout) as endpoint:
        environment = {**os.environ, **list_environment(endpoint), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        server = read_stats(endpoint)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if row.pop("images") != keys:
        raise SystemExit(f"{keys} keys were there, but the plan has another number of images")
    row |= {"requests": int(server["requests"]) - 1, "server_cpu_seconds": round(server["cpu_seconds"], 1)}
    return {"keys": keys, "layout": layout, "threads": threads} | row


def _plan(layout: str, threads: int) -> dict[str, Any]:
    from carray.classify.ledger import RunRecord
    from carray.classify.plan import plan_run
    from carray.classify.predictions_folder import ClassifySettings

    names: dict[str, Any] = {"run_id": "r", "bundle_id": "b", "bundle": "b", "source": "s3://bucket", "runtime": "fp32"}
    wanted = RunRecord(version=1, **names, split=None, all_files=False, columns=[], created_at="", software={})
    with tempfile.TemporaryDirectory() as out:
        before, started, cpu = _memory_mb("VmRSS"), time.perf_counter(), time.process_time()
        _, totals = plan_run(out, wanted, ClassifySettings(listing_threads=threads), uses_boxes=False)
        return {
            "images": totals.images,
            "seconds": round(seconds := time.perf_counter() - started, 2),
            "keys_per_second": round(totals.images / seconds),
            "cpu_seconds": round(time.process_time() - cpu, 2),
            "peak_memory_mb": _memory_mb("VmHWM"),
            "memory_before_mb": before,
            "shards": totals.shards,
            "shards_mb": round(sum(path.stat().st_size for path in Path(out).rglob("*.arrow")) / 1e6, 1),
        }


def _memory_mb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    print(json.dumps(_plan(sys.argv[2], int(sys.argv[3]))))

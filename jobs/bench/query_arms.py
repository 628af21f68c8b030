"""One measured question in a process of its own: how long it takes from start to answer, and its memory at most.

From: a question's name and the folders it is asked of. To: a row's figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT

__all__ = ["ARMS", "COLUMNS", "measure"]

COLUMNS = ["question", "rows", "files", "answer_rows", "seconds", "answer_seconds", "peak_memory_mb", "read_mb"]

_SQL = "SELECT make, body, count(*) AS images, avg(score) AS mean_score FROM predictions WHERE score > 0.9 GROUP BY ALL"
ARMS = {
    "summary": "len(queries.summarize(a))",
    "by-make": "len(queries.by_make(a))",
    "by-label": "len(queries.by_label(a))",
    "by-year": "len(queries.by_year(a))",
    "uncertain": "len(queries.uncertain(a))",
    "failed": "len(queries.failed(a))",
    "failed-all": "len(queries.failed(a, limit=None))",
    "near-duplicates": "len(queries.near_duplicates(a))",
    "accuracy": "len(queries.accuracy(a, labels))",
    "accuracy-by-class": "len(queries.accuracy_by_class(a, labels))",
    "disagreements": "len(queries.disagreements(a, b))",
    "sql": f"len(queries.query(a, {_SQL!r}))",
    "sql-through-arrow": f"len(queries.query(a_as_pattern, {_SQL!r}))",
    "read-two-columns": "len(queries.read_predictions(a, ['make', 'score'], [('score', '<', 0.5)]))",
    "compare": "compare_runs(a, b)['agreement']['images'] and 1",
}
"""Each by what gives the length of its answer. A folder whose name DuckDB would take for a pattern is read through
Arrow, as S3 is: `sql-through-arrow` shows what that costs."""

_PROGRAM = """
import json, sys, time
from pathlib import Path
from carray import queries
from carray.comparison.build import compare_runs

a, a_as_pattern, b, labels = sys.argv[1:]
started = time.perf_counter()
answer_rows = {ask}
seconds = time.perf_counter() - started
texts = [Path("/proc/self", name).read_text() for name in ("status", "io")]
figures = dict(line.split(":", 1) for text in texts for line in text.splitlines())
peak_mb = int(figures["VmHWM"].split()[0]) / 1024
print(json.dumps([answer_rows, seconds, peak_mb, int(figures["rchar"]) / 2**20]))
"""


def measure(name: str, a: str, b: str, labels: str) -> dict[str, Any]:
    """Ask one question of run `a` (and `b`, and the labels) in a new Python; ends the program if that fails."""
    pattern = Path(f"{a} [1]")
    if not pattern.exists():
        pattern.symlink_to(a)
    started = time.perf_counter()
    command = [sys.executable, "-c", _PROGRAM.replace("{ask}", ARMS[name]), a, str(pattern), b, labels]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    answer_rows, answer_seconds, peak_mb, read_mb = json.loads(done.stdout.splitlines()[-1])
    return {
        "files": len(list(Path(a).glob("*.parquet"))),
        "answer_rows": answer_rows,
        "seconds": round(seconds, 2),
        "answer_seconds": round(answer_seconds, 2),
        "peak_memory_mb": round(peak_mb),
        "read_mb": round(read_mb),
    }

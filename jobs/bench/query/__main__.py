"""Measures the named questions, free SQL, the summary and a comparison over made-up predictions: seconds, peak memory.

    python -m jobs.bench.query [--rows 1e7] [--work runs/query] [--questions by-make,compare]

Writes two runs of ROWS rows, and labels of every hundredth, below WORK once, in the real schema. Appends rows to
results/query.csv. Each question is asked in its own process: `seconds` includes its start and imports, `answer_seconds`
does not. `--rows 200000 --work /tmp/try --results /tmp/try.csv` tries everything in a minute. Cost: 10 million rows
take 2 minutes to write, 4 GB of disk, and 3 minutes to ask. Ends with one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jobs.bench.query.made_up import write_labels, write_run
from jobs.bench.rows import ROOT, Program

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
"""The expression of each question, which returns the length of its answer. A folder whose name DuckDB would take for a
pattern is read through Arrow, as S3 is: `sql-through-arrow` shows the cost of that."""

_PROGRAM = """
import json, sys, time
from pathlib import Path
from carray import queries
from carray.pages.comparison import compare_runs

a, a_as_pattern, b, labels = sys.argv[1:]
started = time.perf_counter()
answer_rows = {ask}
seconds = time.perf_counter() - started
texts = [Path("/proc/self", name).read_text() for name in ("status", "io")]
figures = dict(line.split(":", 1) for text in texts for line in text.splitlines())
peak_mb = int(figures["VmHWM"].split()[0]) / 1024
print(json.dumps([answer_rows, seconds, peak_mb, int(figures["rchar"]) / 2**20]))
"""


def main() -> None:
    """Write the tables if they are missing, ask every question, and write the results."""
    program = Program(__doc__, "query.csv")
    program.option("--rows", default="1e7", help="rows of each run")
    program.option("--work", default=ROOT / "runs" / "query", type=Path, help="folder of the tables")
    program.option("--questions", default=",".join(ARMS), help="which to ask, of these; all by default")
    arguments = program.parse()
    questions = program.parts("questions", ARMS)
    rows = int(float(arguments.rows))
    folder = arguments.work.resolve() / f"rows-{rows}"
    sides = [write_run(folder / name, rows, run=run) for run, name in enumerate(("a", "b"))]
    labels = write_labels(folder / "labels.parquet", rows)
    done = []
    for name in questions:
        done.append({"question": name, "rows": rows, **measure(name, sides[0], sides[1], labels)})
        program.record(done[-1:])
    print(json.dumps({row["question"]: {key: row[key] for key in ("seconds", "peak_memory_mb")} for row in done}))


def measure(name: str, a: str, b: str, labels: str) -> dict[str, Any]:
    """Ask one question of run `a` (and `b`, and the labels) in a new Python; returns its figures."""
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


if __name__ == "__main__":
    main()

"""Measures the named questions, free SQL, the summary and a comparison over made-up predictions: seconds, peak memory.

    python jobs/bench_query.py [--rows 1e7] [--work runs/query] [--questions by-make,compare]

From: nothing; two runs of ROWS rows and labels of every hundredth are written below WORK once, in the real schema, and
kept. To: rows of results/query.csv. Each question is asked in a process of its own: `seconds` holds its start and
imports, `answer_seconds` does not. `--rows 200000 --work /tmp/try --results /tmp/try.csv` tries everything in
a minute. Cost: 10 million rows take 2 minutes to write, 4 GB of disk, and 3 minutes to ask. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench.query_arms import ARMS, COLUMNS, measure
from jobs.bench.query_rows import write_labels, write_run
from jobs.bench.rows import ORIGIN, ROOT, append_rows, origin, table_text


def main() -> None:
    """Write the tables if they are not there, ask every question, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1e7", help="rows of each run")
    parser.add_argument("--work", default=ROOT / "runs" / "query", type=Path, help="where the tables lie")
    parser.add_argument("--questions", default=",".join(ARMS), help="which to ask, of these; all by default")
    parser.add_argument("--results", default=ROOT / "results" / "query.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    if unknown := set(arguments.questions.split(",")) - set(ARMS):
        parser.error(f"--questions: {', '.join(sorted(unknown))} is none of {', '.join(ARMS)}")
    rows = int(float(arguments.rows))
    folder = arguments.work.resolve() / f"rows-{rows}"
    sides = [write_run(folder / name, rows, run=run) for run, name in enumerate(("a", "b"))]
    labels = write_labels(folder / "labels.parquet", rows)
    about = origin(f"jobs/bench_query.py --rows {rows} --questions {arguments.questions}")
    done = []
    for name in arguments.questions.split(","):
        row = {"question": name, "rows": rows, **measure(name, sides[0], sides[1], labels)}
        append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row])
        print(table_text([row], COLUMNS), flush=True)
        done.append(row)
    print("\n" + table_text(done, COLUMNS))
    print(json.dumps({row["question"]: {key: row[key] for key in ("seconds", "peak_memory_mb")} for row in done}))


if __name__ == "__main__":
    main()

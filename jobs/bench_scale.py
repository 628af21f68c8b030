"""Measures what a driver's parts do as a job grows, and simulates classification on 10, 100 and 1,000 machines.

    python jobs/bench_scale.py [--parts books,driver,search,simulation] [--small]

From: nothing; books are kept in a temporary folder and in an object store on loopback. To: rows of results/scale.csv:
`part` says whether a figure was measured or simulated. Cost: 10 minutes on two cores; `--small` tries it in one.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jobs.bench.rows import ORIGIN, append_rows, origin, table_text
from jobs.bench.scale_report import COLUMNS, PARTS


def main() -> None:
    """Measure or simulate what the arguments ask for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, of these; all by default")
    parser.add_argument("--small", action="store_true", help="a hundredth of everything, to see that it runs")
    parser.add_argument("--results", default=ROOT / "results" / "scale.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    words = ["--parts", arguments.parts, *(["--small"] if arguments.small else [])]
    about = origin(" ".join(["jobs/bench_scale.py", *words]))
    count = 0
    for part in parts:
        for row in PARTS[part](arguments.small):
            append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row])
            print(table_text([row], [name for name in COLUMNS if name in row]), flush=True)
            count += 1
    print(json.dumps({"rows": count}))


if __name__ == "__main__":
    main()

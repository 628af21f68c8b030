"""Throws bytes at every reader of foreign files, and keeps what breaks one.

    python jobs/fuzz.py pixels --seconds 300
    python jobs/fuzz.py all --seconds 60

Each target of tests/fuzzing/targets.py runs in a child process under Atheris, which looks for inputs that reach new
lines of Python (the decoders' own C is not instrumented). An input that raises anything but a `CarrayError`, ends the
process, takes over 10 seconds or 2 GB is written to tests/fuzzing/found/TARGET/, where the tests replay it for ever.
Adds a row a target to results/fuzz.csv. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "fuzzing")]

from jobs.bench.fuzzing import COLUMNS, fuzz_target, target_names
from jobs.bench.rows import ORIGIN, append_rows, origin, table_text


def main() -> None:
    """Fuzz one target after another, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="a target's name, or all")
    parser.add_argument("--seconds", default=60, type=int, help="for each target")
    parser.add_argument("--corpus", type=Path, help="folder that keeps interesting inputs for the next time")
    parser.add_argument("--results", default=ROOT / "results" / "fuzz.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    names = target_names()
    if arguments.target not in (*names, "all"):
        raise SystemExit(f"{arguments.target!r} is no target; there are {', '.join(names)} and all.")
    rows = []
    for name in names if arguments.target == "all" else [arguments.target]:
        rows.append(fuzz_target(name, seconds=arguments.seconds, corpus=arguments.corpus))
        append_rows(arguments.results, [*ORIGIN, *COLUMNS], [origin("jobs/fuzz.py") | rows[-1]])
    print(table_text(rows, COLUMNS))
    findings = sum(row["findings"] for row in rows)
    print(
        json.dumps({"targets": len(rows), "executions": sum(row["executions"] for row in rows), "findings": findings})
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()

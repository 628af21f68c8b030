"""Stops each long command by Ctrl-C and SIGTERM, at many moments, and looks at exit codes, last lines and what is left.

    python jobs/drill_stop.py --times 12 [--only tune classify ...]

From: nothing but this package (drawn vehicles, extra `dev`). To: a line a stop, a row a command of
results/drill_stop.csv, and one JSON line; exit code 1 where one went wrong.
Cost: about 15 s a stop of tune, train and classify on two cores, 5 s of the others.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jobs.bench.rows import ORIGIN, append_rows, origin
from jobs.bench.stops import COMMANDS, run_stops, set_scene

COLUMNS = [*ORIGIN, "stopped", "stops", "right", "slowest_seconds", "drill_seconds"]


def main() -> None:
    """Run the drills, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default=12, type=int, help="how many stops of each command")
    parser.add_argument("--only", choices=COMMANDS, nargs="+", default=COMMANDS, help="some commands instead of all")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of drill_stop.csv")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        scene = set_scene(Path(work))
        rows = run_stops(scene, arguments.only, times=arguments.times, say=print)
    only = f" --only {' '.join(arguments.only)}" if arguments.only != COMMANDS else ""
    about = origin(f"jobs/drill_stop.py --times {arguments.times}{only}")
    append_rows(arguments.results / "drill_stop.csv", COLUMNS, [about | row for row in rows])
    print(json.dumps(rows))
    sys.exit(0 if all(row["right"] == row["stops"] for row in rows) else 1)


if __name__ == "__main__":
    main()

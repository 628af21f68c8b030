"""Kills a search with SIGKILL, lets it go on, and checks that it ends as one that nobody disturbed does; many times.

    python jobs/drill_tune.py --times 10 [--s3] [--seed 0]

From: nothing but this package (drawn vehicles; with --s3 the runs lie in a real object store on loopback, extra `dev`).
To: a line a drill, a row of results/drill_tune.csv, and one JSON line; exit code 1 where one went wrong.
Cost: about 40 s a drill on two cores.
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

from jobs.bench.drill_rounds import run_rounds
from jobs.bench.rows import ORIGIN, append_rows, origin

COLUMNS = [
    *ORIGIN,
    "storage",
    "seed",
    "drills",
    "right",
    "same_order",
    "kills",
    "kills_machine",
    "kills_driver",
    "kills_worker",
]
COLUMNS += ["trials", "epochs", "undisturbed_seconds", "median_drill_seconds", "processes_left"]


def main() -> None:
    """Run the drills, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default=10, type=int, help="how many drills")
    parser.add_argument("--seed", default=0, type=int, help="of the moments and kinds of the kills")
    parser.add_argument("--s3", action="store_true", help="keep the runs in an object store")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of drill_tune.csv")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        row = run_rounds(Path(work), times=arguments.times, seed=arguments.seed, s3=arguments.s3)
    words = ["jobs/drill_tune.py", f"--times {arguments.times}", f"--seed {arguments.seed}"]
    about = origin(" ".join([*words, *(["--s3"] if arguments.s3 else [])]))
    append_rows(arguments.results / "drill_tune.csv", COLUMNS, [about | row])
    print(json.dumps(row))
    sys.exit(0 if row["right"] == row["drills"] and not row["processes_left"] else 1)


if __name__ == "__main__":
    main()

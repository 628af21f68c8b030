"""Disturbs a classification job in every way that a cluster knows, runs it again, and looks at every row; many times.

    python jobs/drill_classify.py --times 20 [--seed 0] [--only KIND ...]

From: nothing but this package (drawn photographs in a real object store on loopback, extra `dev`; the kind `disk`
mounts a small disk, which needs root). To: a line a drill, a row of results/drill_classify.csv, and one JSON line;
exit code 1 where a row was lost, doubled or wrong.
Cost: about 30 s a drill on two cores.
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

from jobs.bench.classify_faults import KINDS
from jobs.bench.classify_rounds import run_rounds
from jobs.bench.rows import ORIGIN, append_rows, origin

COLUMNS = [*ORIGIN, "seed", "drills", "right", "images", "shards", "runs", "refetched_rows"]
COLUMNS += ["median_drill_seconds", "processes_left", *(f"drills_{kind}" for kind in KINDS)]


def main() -> None:
    """Run the drills, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default=20, type=int, help="how many drills")
    parser.add_argument("--seed", default=0, type=int, help="of the order of the kinds and of the moments")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="some kinds of fault instead of all")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of drill_classify.csv")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        row = run_rounds(Path(work), times=arguments.times, seed=arguments.seed, only=arguments.only)
    only = f" --only {' '.join(arguments.only)}" if arguments.only != KINDS else ""
    about = origin(f"jobs/drill_classify.py --times {arguments.times} --seed {arguments.seed}{only}")
    append_rows(arguments.results / "drill_classify.csv", COLUMNS, [about | row])
    print(json.dumps(row))
    sys.exit(0 if row["right"] == row["drills"] else 1)


if __name__ == "__main__":
    main()

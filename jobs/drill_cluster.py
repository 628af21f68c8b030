"""Disturbs both jobs on a cluster of several hosts, submits again what ended, and compares all that they left.

    python jobs/drill_cluster.py --times 12 [--seed 0] [--only KIND ...]

From: nothing but this package (hosts are network namespaces, which need Linux, root and iproute2; the object store is
the extra `dev`). To: a line and a row of results/drill_cluster.csv a drill, and one JSON line; exit code
1 where one went wrong.
Cost: 3 minutes, and about 2 minutes a drill on two cores.
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

from jobs.bench.hosts_losses import KINDS
from jobs.bench.hosts_rounds import COLUMNS, run_rounds
from jobs.bench.rows import ORIGIN, append_rows, origin


def main() -> None:
    """Run the drills, and say how they went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", default=12, type=int, help="how many drills")
    parser.add_argument("--seed", default=0, type=int, help="of the order of the kinds and of the moments")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="some kinds of loss instead of all")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of drill_cluster.csv")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    only = f" --only {' '.join(arguments.only)}" if arguments.only != KINDS else ""
    about = origin(f"jobs/drill_cluster.py --times {arguments.times} --seed {arguments.seed}{only}")
    right = 0
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        for row in run_rounds(Path(work), times=arguments.times, seed=arguments.seed, only=arguments.only):
            append_rows(arguments.results / "drill_cluster.csv", [*ORIGIN, *COLUMNS], [about | row])
            right += row["right"]
    print(json.dumps({"drills": arguments.times, "right": right}))
    sys.exit(0 if right == arguments.times else 1)


if __name__ == "__main__":
    main()

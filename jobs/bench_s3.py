"""Measures what an image costs to read from an object store: processor time of carray's way, and of botocore's.

    python jobs/bench_s3.py --data ../shared/stanford-cars

From: a folder with cars_test/, or any folder of images, uploaded to a real store on loopback (extra `dev`). To: rows of
results/s3.csv. Reads go through sixteen threads, as in a classification's worker. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jobs.bench.rows import ORIGIN, append_rows, origin, table_text
from jobs.bench.s3_reads import COLUMNS, measure_reads


def main() -> None:
    """Measure both arms, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of images, or one with cars_test/ in it")
    parser.add_argument("--results", default=ROOT / "results" / "s3.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    folder = arguments.data / "cars_test" if (arguments.data / "cars_test").is_dir() else arguments.data
    with tempfile.TemporaryDirectory() as place:
        rows = measure_reads(sorted(path for path in folder.iterdir() if path.is_file()), Path(place))
    about = origin("jobs/bench_s3.py")
    append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row for row in rows])
    print(table_text(rows, COLUMNS))
    ours, theirs = (row["client_milliseconds_per_image"] for row in rows)
    print(json.dumps({"client_milliseconds_per_image": ours, "times_botocore": round(theirs / ours, 2)}))


if __name__ == "__main__":
    main()

"""Measures the check for damaged pixels: false alarms on photographs, how much damage it sees, and what it costs.

    python jobs/bench_decode.py --data ../shared/stanford-cars

From: a folder with JPEGs in cars_train/ and cars_test/, or any folder of JPEGs. To: rows of results/decode.csv, one a
kind of damage. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench.damage import COLUMNS, measure_cost, measure_kinds
from jobs.bench.rows import ORIGIN, ROOT, append_rows, origin, table_text


def main() -> None:
    """Measure, write the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder of JPEGs, or one with cars_test/ in it")
    parser.add_argument("--results", default=ROOT / "results" / "decode.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    folders = [path for path in (arguments.data / "cars_train", arguments.data / "cars_test") if path.is_dir()]
    photographs = sorted(path for folder in folders or [arguments.data] for path in folder.glob("*.jpg"))
    if not photographs:
        parser.error(f"--data is {arguments.data}, which holds no *.jpg")
    rows = measure_kinds(photographs)
    rows[0] |= measure_cost(photographs)
    about = origin("jobs/bench_decode.py")
    append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row for row in rows])
    print(table_text(rows, COLUMNS))
    false_alarms, percent = rows[0]["images"] - rows[0]["ok"], rows[0]["check_percent"]
    print(json.dumps({"images": rows[0]["images"], "false_alarms": false_alarms, "check_percent": percent}))


if __name__ == "__main__":
    main()

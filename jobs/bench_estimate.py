"""Holds `carray estimate` against what then happens: a classification and a search, each estimated and then run.

    python jobs/bench_estimate.py --bundle run/bundle --images FOLDER --manifest manifest.parquet [--times 3]

From: a bundle and a folder of images, and a manifest. To: rows of results/estimate.csv, one a job: the range that was
said, the seconds that it took, and whether they lie inside. Cost: with jobs/configs/quick.yaml and 5,700 photographs
about ten minutes a time. An estimate is of a machine that does nothing else: so should this one be. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jobs.bench.estimates import COLUMNS, check_classify, check_tune
from jobs.bench.rows import ORIGIN, append_rows, origin, table_text


def main() -> None:
    """Estimate, run and compare what the arguments name, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="to classify --images with")
    parser.add_argument("--images", help="folder of images")
    parser.add_argument("--manifest", help="to search over")
    parser.add_argument("--config", default=str(ROOT / "jobs/configs/quick.yaml"), help="of the search")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="setting of the search; repeatable")
    parser.add_argument("--times", type=int, default=1, help="how often each is estimated and run")
    parser.add_argument("--results", default=ROOT / "results/estimate.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    about, rows = origin("jobs/bench_estimate.py"), []
    for _ in range(arguments.times):
        checks = [check_classify(arguments.bundle, arguments.images)] if arguments.bundle else []
        checks += [check_tune(arguments.manifest, arguments.config, arguments.changes)] if arguments.manifest else []
        append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row for row in checks])
        print(table_text(checks, COLUMNS), flush=True)
        rows += checks
    print(json.dumps({"estimates": len(rows), "inside": sum(row["inside"] for row in rows)}))


if __name__ == "__main__":
    main()

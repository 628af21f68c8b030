"""Measures what corrupted pictures cost a bundle, and how well ood_score tells images without cars, on Stanford Cars.

    python jobs/bench_evaluate.py --bundle runs/cars/run/bundle --manifest runs/cars/manifest.parquet [--images 300]

From: what jobs/bench_cars.py leaves, and photographs that installed packages ship (jobs/bench/outside.py). To: rows of
results/robustness.csv and results/outliers.csv, and the tables under --work. Cost: that of classifying 22 images for
each one, about 8 minutes for all 815 test images on two cores. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench.outside import make_outside
from jobs.bench.rows import ORIGIN, ROOT, append_rows, origin, table_text
from jobs.bench.stress import measure


def main() -> None:
    """Measure, write the results, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cars = ROOT / "runs" / "cars"
    parser.add_argument("--bundle", default=cars / "run" / "bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--manifest", default=cars / "manifest.parquet", type=Path, help="of the bundle's own classes")
    parser.add_argument("--images", default=0, type=int, help="of the test split; 0 takes all")
    parser.add_argument("--seed", default=0, type=int, help="of the draw, the tiles, the drawings and the intervals")
    parser.add_argument("--work", default=ROOT / "runs" / "stress", type=Path, help="where images and tables lie")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    if not (arguments.bundle / "bundle.json").exists():
        parser.error(f"--bundle is {arguments.bundle}, which holds no bundle.json; run jobs/bench_cars.py, or name one")
    outside = make_outside(arguments.work / "outside", seed=arguments.seed)
    about = origin(f"jobs/bench_evaluate.py --images {arguments.images} --seed {arguments.seed}")
    tables = measure(
        arguments.bundle,
        arguments.manifest,
        outside=outside,
        out=arguments.work / "tables",
        images=arguments.images,
        seed=arguments.seed,
    )
    for name, rows in tables.items():
        append_rows(arguments.results / f"{name}.csv", [*ORIGIN, *rows[0]], [about | row for row in rows])
        print(table_text(rows, list(rows[0])), end="\n\n")
    written = {row["kind"]: row["auroc"] for row in tables["outliers"]}
    print(json.dumps({"top1": tables["robustness"][0]["top1"], "auroc_of_ood_score": written}))


if __name__ == "__main__":
    main()

"""Measures how fast a bucket is listed into shards, and in how much memory, at 1, 10 and 100 million keys.

    python jobs/bench_list.py [--keys 1e6,1e7,1e8] [--layout flat,uuid] [--threads 16]

From: nothing; a loopback server speaks ListObjectsV2 over made-up keys (layouts: carray/testing/list_server.py). To: rows of
results/list.csv. Each listing runs in a process of its own, the server in another, so two cores are the least; shards
go to the temporary folder, 8 to 16 bytes a key. Cost: about 6 minutes for 100 million keys. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.bench.listing import COLUMNS, measure_listing
from jobs.bench.rows import ORIGIN, ROOT, append_rows, origin, table_text


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", default="1e6,1e7,1e8", help="how many keys the made-up buckets have")
    parser.add_argument("--layout", default="flat", help="how they are named: flat, uuid, dated, unicode, lopsided")
    parser.add_argument("--threads", default=16, type=int, help="requests under way at once")
    parser.add_argument("--results", default=ROOT / "results" / "list.csv", type=Path, help="where rows are added")
    arguments = parser.parse_args()
    words = ["--keys", arguments.keys, "--layout", arguments.layout, "--threads", str(arguments.threads)]
    about = origin(" ".join(["jobs/bench_list.py", *words]))
    done = []
    for layout in arguments.layout.split(","):
        for keys in arguments.keys.split(","):
            row = measure_listing(int(float(keys)), layout, arguments.threads)
            append_rows(arguments.results, [*ORIGIN, *COLUMNS], [about | row])
            print(table_text([row], COLUMNS), flush=True)
            done.append(row)
    largest = max(done, key=lambda row: row["keys"])
    print(json.dumps({name: largest[name] for name in ("keys", "keys_per_second", "peak_memory_mb", "shards")}))


if __name__ == "__main__":
    main()

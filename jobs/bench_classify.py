"""Measures classification: beside timm's inference and Ray's recipe, against its own ceiling, growing, cold, enlarged.

    python jobs/bench_classify.py --data ../shared/stanford-cars [--bundle runs/cars/run/bundle] [--parts peers,cold]

From: the devkit layout (cars_train/, cars_test/, devkit/), and a bundle; without one EfficientNet-Lite0 is trained for
three epochs at 224 pixels first. To: rows of results/classify.csv, one a measured job. Every job is a process of its
own, timed from outside with its start-up, in turn with the others, on the same images. The object store is real, on
loopback (extra `dev`).

    peers      carray classify, timm's inference.py and the recipe of Ray's documentation; local files and S3
    ceiling    steady state of the job over decode + forward in bare loops, one process a core
    scaling    the cost of an image at 1,000, 10,000 and 100,000 images, start-up taken off, and peak memory
    nets       peers and ceiling with EfficientNet-Lite4 and ResNet-50 of random weights
    cold       the first finished shard after Ray is there, Ray's own start, memory of a worker
    enlarged   cars_test at 1,600 pixels: decoding at reduced and at full scale, speed and accuracy

`--images 300 --peer-images 100 --sizes 100,300 --results /tmp/try` tries everything in minutes. Open: a GPU's row.
Ends with one JSON line; its figures are int8's where the bundle has int8.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jobs.bench.classify_report import COLUMNS, PARTS, read_arguments, summarise
from jobs.bench.rows import ORIGIN, append_rows, origin, table_text


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    bench, parts, results, command = read_arguments(__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    bench.work.mkdir(parents=True, exist_ok=True)
    about = origin(command)
    shown = [name for name in COLUMNS if name not in {*ORIGIN, "note"}]
    done: list[dict[str, Any]] = []
    for part in parts:
        print(f"== {part}", flush=True)
        rows = PARTS[part](bench)
        append_rows(results / "classify.csv", COLUMNS, [about | row for row in rows])
        print(table_text(rows, shown), flush=True)
        done += rows
    print("\n" + table_text(done, shown))
    print(json.dumps(summarise(done)))


if __name__ == "__main__":
    main()

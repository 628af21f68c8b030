"""Measures classification: beside Daft, timm's inference and Ray's recipe, against a ceiling, growing, cold.

    python -m jobs.bench.classify --data ../shared/stanford-cars [--bundle runs/cars/run/bundle] [--parts peers,cold]

Without --bundle, EfficientNet-Lite0 is trained for three epochs at 224 pixels first. Appends rows to
results/classify.csv, one per job. Every job is a process of its own, timed from outside with its start-up, on the same
images; the object store is real, on loopback (extra `dev`).

    peers          carray classify on both engines, Daft, timm's inference.py and the recipe of Ray's documentation
    peers-256      the same with 256 photographs
    peers-65160    the same with ten copies of each photograph; the slow peers are scaled up
    peers-large    the same with cars_test enlarged to 1,600 pixels
    peers-s3       the same with the photographs in an object store
    ceiling        steady state of the job over an independent ceiling, one process per core, three times
    scaling        the cost of an image at 1,000, 10,000 and 100,000 images without start-up, and peak memory
    nets           peers and ceiling with EfficientNet-Lite4 and ResNet-50 of random weights
    cold           256 images: the first finished shard, memory of a worker

`--images 300 --peer-images 100 --sizes 100,300 --results /tmp/try.csv` tries everything in minutes. No GPU is measured.
Parts in one command share the runs of the slow peers. Ends with one JSON line: the times as long that the peers took as
`carray classify` on the local engine with int8 (with fp32: `_fp32`), by part, and the rows.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.classify import parts, peers
from jobs.bench.classify.setup import Bench
from jobs.bench.rows import Program

PEERS = ("peers", "peers-256", "peers-65160", "peers-large", "peers-s3")
PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    **{name: partial(peers.measure_peers, part=name) for name in PEERS},
    "ceiling": parts.measure_ceilings,
    "scaling": parts.measure_scaling,
    "nets": parts.measure_nets,
    "cold": parts.measure_cold,
}


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    program = Program(__doc__, "classify.csv")
    program.cars_options("bench-classify")
    program.option("--bundle", type=Path, help="a finished bundle of a timm network; one is trained without it")
    program.option("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    program.option("--images", type=int, help="for a try, the first so many photographs")
    program.option("--peer-images", type=int, help="at most so many for the peers; all for timm, 2,000 for Ray's")
    program.option("--sizes", default="1000,10000,100000", help="images of the part scaling, ascending")
    program.option("--engine", default="local", help="local or ray: of the parts without peers")
    program.option("--input-size", default=224, type=int, help="of networks made here, pixels")
    given = program.parse()
    program.check_cars()
    bench = Bench(
        data=given.data.resolve(),
        work=given.work.resolve(),
        images=given.images,
        peer_images=given.peer_images,
        sizes=tuple(sorted(int(size) for size in given.sizes.split(","))),
        engine=given.engine,
        input_size=given.input_size,
        given_bundle=given.bundle and str(given.bundle.resolve()),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    bench.work.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, Any]] = []
    for part in program.parts("parts", PARTS):
        print(f"== {part}", flush=True)
        rows = PARTS[part](bench)
        program.record(rows, hidden=["note"])
        done += rows
    print(json.dumps({**peers.headline_times(done), "rows": done}))


if __name__ == "__main__":
    main()

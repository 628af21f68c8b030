"""Measures classification: beside timm's inference and Ray's recipe, against its own ceiling, growing, cold, enlarged.

    python -m jobs.bench.classify --data ../shared/stanford-cars [--bundle runs/cars/run/bundle] [--parts peers,cold]

Without --bundle, EfficientNet-Lite0 is trained for three epochs at 224 pixels first. Appends rows to
results/classify.csv, one per job. Every job is a process of its own, timed from outside with its start-up, on the same
images; the object store is real, on loopback (extra `dev`).

    peers      carray classify, timm's inference.py and the recipe of Ray's documentation; local files and S3
    ceiling    steady state of the job over decode + forward in bare loops, one process per core
    scaling    the cost of an image at 1,000, 10,000 and 100,000 images without start-up, and peak memory
    nets       peers and ceiling with EfficientNet-Lite4 and ResNet-50 of random weights
    cold       the first finished shard after Ray has started, Ray's own start, memory of a worker
    enlarged   cars_test at 1,600 pixels: decoding at reduced and at full scale, speed and accuracy

`--images 300 --peer-images 100 --sizes 100,300 --results /tmp/try.csv` tries everything in minutes. No GPU is measured.
Ends with one JSON line; its figures are int8's if the bundle has int8.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.classify import parts
from jobs.bench.classify.peers import measure_peers
from jobs.bench.classify.setup import Bench
from jobs.bench.classify.watch import spread
from jobs.bench.rows import Program

PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "peers": measure_peers,
    "ceiling": parts.measure_ceilings,
    "scaling": parts.measure_scaling,
    "nets": parts.measure_nets,
    "cold": parts.measure_cold,
    "enlarged": parts.measure_enlarged,
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
    program.option("--input-size", default=224, type=int, help="of networks made here, pixels")
    given = program.parse()
    program.check_cars()
    bench = Bench(
        data=given.data.resolve(),
        work=given.work.resolve(),
        images=given.images,
        peer_images=given.peer_images,
        sizes=sorted(int(size) for size in given.sizes.split(",")),
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
    print(json.dumps(summarise(done)))


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the main figures, with int8 if the bundle has it; null where a part was not run."""
    runtimes = {row["runtime"] for row in rows if row["arm"] == "carray"}
    runtime = "int8" if "int8" in runtimes else "fp32"

    def of(name: str, part: str, **wanted: Any) -> Any:
        wanted = {"part": part, "arm": "carray", "runtime": runtime, **wanted}
        return next((row.get(name) for row in rows if wanted.items() <= row.items()), None)

    warm = of("whole_seconds", "peers", arm="timm compiled before", runtime="torch fp32")
    ours = of("wall_seconds", "peers", storage="local")
    costs = [row["milliseconds_per_image"] for row in rows if row.get("milliseconds_per_image")]
    return {
        "runtime": runtime,
        "times_timm": of("times_timm", "peers", storage="local"),
        "times_ray_recipe": of("times_ray_recipe", "peers", storage="local"),
        "times_timm_s3": of("times_timm", "peers", storage="s3"),
        "times_ray_recipe_s3": of("times_ray_recipe", "peers", storage="s3"),
        "times_timm_compiled_before": round(warm / ours, 2) if warm and ours else None,
        "times_timm_fp32": of("times_timm", "peers", storage="local", runtime="fp32"),
        "times_ray_recipe_fp32": of("times_ray_recipe", "peers", storage="local", runtime="fp32"),
        "fraction_of_ceiling": of("fraction_of_ceiling", "ceiling"),
        "images_per_second_per_core": of("images_per_second_per_core", "peers", storage="local"),
        "core_hours_per_million": of("core_hours_per_million", "peers", storage="local"),
        "cost_spread": round(spread(costs), 3) if len(costs) > 1 else None,
        "first_seconds": of("first_seconds", "cold"),
        "worker_peak_mb": of("worker_peak_mb", "cold"),
    }


if __name__ == "__main__":
    main()

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

`--images 300 --peer-images 100 --sizes 100,300 --results /tmp/try` tries everything in minutes. Not measured: a GPU.
Ends with one JSON line; its figures are int8's if the bundle has int8.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench import rows as tables
from jobs.bench.classify import parts
from jobs.bench.classify.peers import measure_peers
from jobs.bench.classify.setup import Bench
from jobs.bench.classify.watch import spread
from jobs.bench.rows import CARS, ORIGIN, ROOT

PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "peers": measure_peers,
    "ceiling": parts.measure_ceilings,
    "scaling": parts.measure_scaling,
    "nets": parts.measure_nets,
    "cold": parts.measure_cold,
    "enlarged": parts.measure_enlarged,
}
COLUMNS = [
    *ORIGIN,
    *["part", "arm", "net", "runtime", "storage", "images", "input_size", "batch_images", "repeats"],
    *["wall_seconds", "core_seconds", "images_per_second", "images_per_second_per_core", "core_hours_per_million"],
    *["startup_seconds", "steady_images_per_second", "whole_seconds", "times_timm", "times_ray_recipe"],
    *["ceiling_images_per_second", "decode_images_per_second", "forward_images_per_second", "fraction_of_ceiling"],
    *["milliseconds_per_image", "ray_seconds", "ray_ready_seconds", "first_seconds"],
    *["driver_peak_mb", "worker_peak_mb", "worker_pss_mb", "agreement", "top1", "note"],
]


def main() -> None:
    """Measure what the arguments ask for, and write the results."""
    bench, chosen, results, command = _read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    bench.work.mkdir(parents=True, exist_ok=True)
    about = tables.origin(command)
    shown = [name for name in COLUMNS if name not in {*ORIGIN, "note"}]
    done: list[dict[str, Any]] = []
    for part in chosen:
        print(f"== {part}", flush=True)
        rows = PARTS[part](bench)
        tables.append_rows(results / "classify.csv", COLUMNS, [about | row for row in rows])
        print(tables.table_text(rows, shown), flush=True)
        done += rows
    print("\n" + tables.table_text(done, shown))
    print(json.dumps(summarise(done)))


def _read_arguments() -> tuple[Bench, list[str], Path, str]:
    """Read the command line; returns the bench, the parts, the folder of classify.csv, and the command to repeat."""
    parser = tables.new_parser(__doc__)
    parser.add_argument("--data", default=CARS, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--bundle", help="a finished bundle of a timm network; one is trained without it")
    parser.add_argument("--work", default=ROOT / "runs" / "bench-classify", type=Path, help="folder for everything")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of classify.csv")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--images", type=int, help="for a try, the first so many photographs")
    parser.add_argument("--peer-images", type=int, help="at most so many for the peers; all for timm, 2,000 for Ray's")
    parser.add_argument("--sizes", default="1000,10000,100000", help="images of the part scaling, ascending")
    parser.add_argument("--input-size", default=224, type=int, help="of networks made here, pixels")
    parser.add_argument("--timm-inference", type=Path, metavar="PATH", help="timm's own inference.py, if you have it")
    given = parser.parse_args()
    chosen = tables.choose(parser, "--parts", given.parts, PARTS)
    tables.check_devkit(parser, given.data)
    script = given.timm_inference
    if script and not script.is_file():
        parser.error(f"--timm-inference is {script}, which is no file; give timm's inference.py, or leave it out")
    hidden = {"bundle": "BUNDLE", "timm_inference": "PATH"}  # paths of this machine
    words = ["jobs.bench.classify"]
    for name in ("parts", "images", "peer_images", "sizes", "input_size", "bundle", "timm_inference"):
        if getattr(given, name) != parser.get_default(name):
            words += [f"--{name.replace('_', '-')}", str(hidden.get(name, getattr(given, name)))]
    bench = Bench(
        data=given.data.resolve(),
        work=given.work.resolve(),
        images=given.images,
        peer_images=given.peer_images,
        sizes=sorted(int(size) for size in given.sizes.split(",")),
        input_size=given.input_size,
        given_bundle=given.bundle and str(Path(given.bundle).resolve()),
        timm_inference=script and script.resolve(),
    )
    return bench, chosen, given.results, " ".join(words)


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

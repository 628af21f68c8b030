"""Says what bench_classify.py is told, which part measures what, and what its last line says.

From: words of a command line. To: a `Bench`; from rows, the summary.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.classify_figures import spread
from jobs.bench.classify_parts import (
    measure_ceilings,
    measure_cold,
    measure_enlarged,
    measure_nets,
    measure_scaling,
)
from jobs.bench.classify_peers import measure_peers
from jobs.bench.classify_setup import Bench
from jobs.bench.rows import ORIGIN, ROOT

__all__ = ["COLUMNS", "PARTS", "read_arguments", "summarise"]

PARTS: dict[str, Callable[[Bench], list[dict[str, Any]]]] = {
    "peers": measure_peers,
    "ceiling": measure_ceilings,
    "scaling": measure_scaling,
    "nets": measure_nets,
    "cold": measure_cold,
    "enlarged": measure_enlarged,
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


def read_arguments(description: str | None) -> tuple[Bench, list[str], Path, str]:
    """Read the command line; gives the bench, the parts, the folder of classify.csv, and the command to repeat."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))
    parser.add_argument("--data", default=beside, type=Path, help="Stanford Cars in its devkit's layout")
    parser.add_argument("--bundle", help="a finished bundle of a timm network; one is trained without it")
    parser.add_argument("--work", default=ROOT / "runs" / "bench-classify", type=Path, help="where everything is made")
    parser.add_argument("--results", default=ROOT / "results", type=Path, help="folder of classify.csv")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--images", type=int, help="for a try, the first so many photographs")
    parser.add_argument("--peer-images", type=int, help="at most so many for the peers; all for timm, 2,000 for Ray's")
    parser.add_argument("--sizes", default="1000,10000,100000", help="images of the part scaling, ascending")
    parser.add_argument("--input-size", default=224, type=int, help="of networks made here, pixels")
    parser.add_argument(
        "--timm-inference", type=Path, metavar="PATH", help="timm's own inference.py, where you have it"
    )
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    names = ("parts", "images", "peer_images", "sizes", "input_size", "bundle", "timm_inference")
    words = _words(
        {name: getattr(arguments, name) for name in names if getattr(arguments, name) != parser.get_default(name)}
    )
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"--parts has {', '.join(unknown)}; allowed are {', '.join(PARTS)}")
    if not (arguments.data / "devkit").is_dir():
        parser.error(f"--data is {arguments.data}, which holds no devkit/; give the folder of Stanford Cars")
    script = arguments.timm_inference
    if script and not script.is_file():
        parser.error(f"--timm-inference is {script}, which is no file; give timm's inference.py, or leave it out")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    bench = Bench(
        data=arguments.data.resolve(),
        work=arguments.work.resolve(),
        images=arguments.images,
        peer_images=arguments.peer_images,
        sizes=sorted(sizes),
        input_size=arguments.input_size,
        given_bundle=arguments.bundle and str(Path(arguments.bundle).resolve()),
        timm_inference=script and script.resolve(),
    )
    return bench, parts, arguments.results, " ".join(["jobs/bench_classify.py", *words])


def _words(given: dict[str, Any]) -> list[str]:
    """Give arguments as they are to be repeated, without places of this machine."""
    places = {"bundle": "BUNDLE", "timm_inference": "PATH"}
    return [
        word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(places.get(name, value)))
    ]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the figures that are looked for first, with int8 where the bundle has it; null where a part was not run."""
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

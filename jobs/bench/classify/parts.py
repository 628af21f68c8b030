"""Measures what a classification costs beside its ceiling, as it grows, with other networks, and cold."""

from __future__ import annotations

from functools import partial
from typing import Any

from jobs.bench.classify.arms import TimmSettings, classify, count_images, median_row
from jobs.bench.classify.ceiling import RUNS, measure_ceiling
from jobs.bench.classify.peers import compare, slow_peers
from jobs.bench.classify.setup import Bench, about_bundle, few, pack_random, runtimes_of
from jobs.bench.classify.watch import fit_line

NETS = ["tf_efficientnet_lite4", "resnet50"]
NETS_IMAGES, NETS_TIMM_IMAGES, NETS_RECIPE_IMAGES = 1500, 330, 160
NETS_TRIES = (
    TimmSettings(batch=64, workers=2),
    TimmSettings(batch=64, workers=2, compiled=True, frozen=True),
)
COLD_IMAGES, COLD_TIMES = 256, 3


def measure_ceilings(bench: Bench) -> list[dict[str, Any]]:
    """Measure how near the job comes to its ceiling, with each runtime of the bundle."""
    bundle, folder = bench.bundle(), bench.folder()
    return [
        about_bundle(bundle) | measure_ceiling(bench, bundle, folder, runtime, part="ceiling", runs=RUNS)
        for runtime in runtimes_of(bundle)
    ]


def measure_scaling(bench: Bench) -> list[dict[str, Any]]:
    """Measure the cost of an image at each size without start-up, and the peak memory, with the fastest runtime.

    It is the slope to the size before; for the first size, that of its steady state.
    """
    bundle = bench.bundle()
    runtime = runtimes_of(bundle)[0]
    rows: list[dict[str, Any]] = []
    for size in bench.sizes:
        name, folder = f"scaling-{size}", bench.folder(size)
        row = classify(bench, bundle, folder, runtime=runtime, engine=bench.engine, name=name).row
        if rows:
            startup, slope = fit_line((rows[-1]["images"], rows[-1]["wall_seconds"]), (size, row["wall_seconds"]))
            row["startup_seconds"] = round(startup, 2)
            row["milliseconds_per_image"] = round(1e3 * slope, 3)
        elif row["steady_images_per_second"]:
            row["milliseconds_per_image"] = round(1e3 / row["steady_images_per_second"], 3)
        rows.append(about_bundle(bundle) | row | {"part": "scaling"})
    return rows


def measure_nets(bench: Bench) -> list[dict[str, Any]]:
    """Measure other networks, with random weights, beside the same peers and their ceilings."""
    rows = []
    folder = few(bench.folder(), NETS_IMAGES)
    images = count_images(folder)
    for backbone in NETS:
        bundle = pack_random(backbone, bench)
        peers = {"timm_images": NETS_TIMM_IMAGES, "recipe_images": NETS_RECIPE_IMAGES}
        slow = slow_peers(bench, bundle, folder, images=images, tries=NETS_TRIES, **peers)
        rows += compare(bench, bundle, folder, slow, part="nets", images=images, with_ray=False)
        for runtime in runtimes_of(bundle):
            rows.append(
                about_bundle(bundle) | measure_ceiling(bench, bundle, folder, runtime, part="nets ceiling", runs=1)
            )
    return rows


def measure_cold(bench: Bench) -> list[dict[str, Any]]:
    """Measure a short job: the time to its first finished shard, and a worker's memory."""
    bundle, folder, rows = bench.bundle(), few(bench.folder(), COLD_IMAGES), []
    for runtime in runtimes_of(bundle):
        run = partial(classify, bench, bundle, folder, runtime=runtime, engine=bench.engine, name=f"cold-{runtime}")
        rows.append(about_bundle(bundle) | median_row([run().row for _ in range(COLD_TIMES)]) | {"part": "cold"})
    return rows

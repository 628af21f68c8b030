"""Measures what a classification costs as it grows, with other networks, cold, and on large photographs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from carray.bundle.bundle_folder import open_bundle
from carray.manifest.manifest_file import read_manifest
from jobs.bench.classify.arms import Arm, TimmSettings, classify, count_images
from jobs.bench.classify.ceiling import bare_rate, measure_ceiling
from jobs.bench.classify.peers import measure_local, median_row
from jobs.bench.classify.setup import Bench, few, full_decode_bundle, pack_random, runtimes_of, whole_folder
from jobs.bench.classify.watch import fit_line
from jobs.bench.rows import cores

NETS = ["tf_efficientnet_lite4", "resnet50"]
NETS_IMAGES, NETS_TIMM_IMAGES, NETS_RECIPE_IMAGES = 1500, 330, 160
NETS_TRIES = [
    TimmSettings(batch=64, workers=2),
    TimmSettings(batch=64, workers=2, compiled=True, frozen=True),
]
COLD_IMAGES, COLD_TIMES = 256, 3
LONG_SIDE = 1600
"""Pixels of an enlarged photograph."""


def measure_ceilings(bench: Bench) -> list[dict[str, Any]]:
    """Measure how near the job comes to bare loops, with each runtime of the bundle."""
    bundle, folder = bench.bundle(), bench.folder()
    about = _about(bundle)
    return [
        about | measure_ceiling(bench, bundle, folder, runtime, part="ceiling", net=about["net"])
        for runtime in runtimes_of(open_bundle(bundle))
    ]


def measure_scaling(bench: Bench) -> list[dict[str, Any]]:
    """Measure the cost of an image at each size without start-up, and the peak memory, with the fastest runtime.

    It is the slope to the size before; for the first size, that of its steady state.
    """
    bundle = bench.bundle()
    runtime = runtimes_of(open_bundle(bundle))[0]
    rows: list[dict[str, Any]] = []
    for size in bench.sizes:
        row = classify(bench, bundle, bench.folder(size), runtime=runtime, name=f"scaling-{size}").row
        if rows:
            startup, slope = fit_line((rows[-1]["images"], rows[-1]["wall_seconds"]), (size, row["wall_seconds"]))
            row["startup_seconds"] = round(startup, 2)
            row["milliseconds_per_image"] = round(1e3 * slope, 3)
        elif row["steady_images_per_second"]:
            row["milliseconds_per_image"] = round(1e3 / row["steady_images_per_second"], 3)
        rows.append(_about(bundle) | row | {"part": "scaling"})
    return rows


def measure_nets(bench: Bench) -> list[dict[str, Any]]:
    """Measure other networks, with random weights, beside the same peers and their ceilings."""
    rows = []
    folder = bench.folder()
    folder = few(folder, min(NETS_IMAGES, count_images(folder)))
    images = min(bench.peer_images or NETS_TIMM_IMAGES, NETS_TIMM_IMAGES)
    for backbone in NETS:
        bundle = pack_random(backbone, bench)
        recipe_images = min(images, NETS_RECIPE_IMAGES)
        rows += measure_local(
            bench, bundle, folder, part="nets", recipe_images=recipe_images, timm_images=images, tries=NETS_TRIES
        )
        for runtime in runtimes_of(open_bundle(bundle)):
            rows.append(
                _about(bundle) | measure_ceiling(bench, bundle, folder, runtime, part="nets ceiling", net=backbone)
            )
    return rows


def measure_cold(bench: Bench) -> list[dict[str, Any]]:
    """Measure the time from Ray to the first shard, Ray's own start, and a worker's memory."""
    bundle = bench.bundle()
    folder = few(bench.folder(), COLD_IMAGES)
    rows = []
    for runtime in runtimes_of(open_bundle(bundle)):
        runs = [
            classify(bench, bundle, folder, runtime=runtime, name=f"cold-{runtime}-{i}").row for i in range(COLD_TIMES)
        ]
        rows.append(_about(bundle) | median_row(runs) | {"part": "cold"})
    return rows


def measure_enlarged(bench: Bench) -> list[dict[str, Any]]:
    """Measure speed and accuracy on cars_test enlarged to large JPEGs, decoded at full and at reduced scale."""
    bundle, manifest = bench.bundle(), bench.manifest()
    folder = _enlarge(bench)
    full = full_decode_bundle(bundle, bench.work / "full-decode")
    truth = read_manifest(manifest).of_split("test")
    labels = {Path(uri).name: label for uri, label in zip(truth["uri"], truth["label"], strict=True)}
    rows = []
    for runtime in runtimes_of(open_bundle(bundle)):
        for arm, opened in (("reduced decode", bundle), ("full decode", full)):
            name = f"enlarged-{arm.split()[0]}-{runtime}"
            ran = classify(bench, opened, folder, runtime=runtime, name=name, labels=True)
            rates = {"decode_images_per_second": bare_rate(bench, opened, folder, runtime, what="decode")}
            top1 = _top1(ran, labels, open_bundle(opened).classes)
            note = f"cars_test enlarged to {LONG_SIDE} pixels, JPEG quality 90"
            rows.append(_about(opened) | ran.row | rates | {"part": "enlarged", "arm": arm, "top1": top1, "note": note})
    return rows


def _top1(arm: Arm, labels: dict[str, str], classes: Sequence[str]) -> float:
    right = [classes[index] == labels[name] for name, index in arm.labels.items()]
    return round(sum(right) / len(right), 4)


def _enlarge(bench: Bench) -> str:
    photographs = sorted((bench.data / "cars_test").iterdir())[: bench.images]
    folder = bench.work / f"enlarged-{len(photographs)}"
    if not folder.exists():
        with whole_folder(folder) as making, ProcessPoolExecutor(cores()) as pool:
            list(pool.map(_enlarge_one, photographs, [making] * len(photographs)))
    return str(folder)


def _enlarge_one(path: Path, folder: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        scale = LONG_SIDE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / path.name, "JPEG", quality=90)


def _about(bundle: str) -> dict[str, Any]:
    info = open_bundle(bundle)
    return {"net": info.net.get("backbone", "cnn"), "input_size": info.pixels.input_size, "storage": "local"}

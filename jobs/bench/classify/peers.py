"""Compares `carray classify` with timm's inference script and with the recipe of Ray's documentation, as whole jobs.

The jobs run in turn, ours before and after the slow peers; every second from starting Python counts. timm runs with the
one of a few settings that promises the shortest whole job, by its start-up and steady rate on a few hundred images.
Compiling counts as start-up, as on a new machine; a row of its own says what the job would take with a warm compile
cache. For a peer that gets fewer images than all, the others are added at its steady rate.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

from carray.bundle.bundle_folder import open_bundle
from carray.core.store.image_bytes import fetch_image
from carray.testing.object_store import S3Server, start_store
from jobs.bench.classify.arms import Arm, TimmSettings, classify, count_images, recipe, timm_inference
from jobs.bench.classify.setup import Bench, few, peer_network, runtimes_of
from jobs.bench.classify.watch import JobFailed

TRIAL_IMAGES = 330
"""For one try of timm's settings: a few batches, and a smaller last one, which torch.compile compiles anew."""
TRIES = [
    TimmSettings(batch=32, workers=2),
    TimmSettings(batch=64, workers=2),
    TimmSettings(batch=64, workers=1),
    TimmSettings(batch=64, workers=2, compiled=True),
    TimmSettings(batch=64, workers=2, compiled=True, frozen=True),
]
RECIPE_IMAGES = 2000
AT_ONCE = 16
"""Objects uploaded or fetched at once."""


def measure_peers(bench: Bench) -> list[dict[str, Any]]:
    """Measure all arms on local files, then with the images in an object store."""
    bundle, folder = bench.bundle(), bench.folder()
    with start_store(bench.out("store")) as store, patch.dict(os.environ, store.environment):
        rows = measure_local(bench, bundle, folder, part="peers", recipe_images=bench.peer_images or RECIPE_IMAGES)
        return rows + _measure_s3(bench, bundle, folder, store, rows)


def measure_local(
    bench: Bench,
    bundle: str,
    folder: str,
    *,
    part: str,
    recipe_images: int,
    timm_images: int | None = None,
    tries: Sequence[TimmSettings] = TRIES,
) -> list[dict[str, Any]]:
    """Measure `carray classify` with each runtime, timm and the recipe on one folder; returns a row each."""
    info, images = open_bundle(bundle), count_images(folder)
    network = peer_network(bundle, bench.work / "peers" / info.bundle_id)
    runtimes = runtimes_of(info)
    settings, rows = _best_timm(bench, network, few(folder, min(TRIAL_IMAGES, images)), images, tries)
    timm_images = min(timm_images or bench.peer_images or images, images)
    recipe_images = min(recipe_images, images)
    ours: dict[str, list[Arm]] = {runtime: [] for runtime in runtimes}
    for repeat in range(2):
        for runtime in runtimes:
            name = f"{part}-carray-{runtime}-{repeat}"
            ours[runtime].append(classify(bench, bundle, folder, runtime=runtime, name=name, labels=True))
        if repeat == 0:
            timm = timm_inference(bench, network, few(folder, timm_images), settings, name=f"{part}-timm")
            slow = recipe(bench, network, few(folder, recipe_images), recipe_images, name=f"{part}-recipe")
    reference = ours["fp32"][0].labels
    rows += [scale_up(arm.row, images) | {"agreement": _agreement(arm.labels, reference)} for arm in (timm, slow)]
    for runtime in runtimes:
        row = median_row([arm.row for arm in ours[runtime]])
        row["agreement"] = _agreement(ours[runtime][0].labels, reference)
        rows.append(row | _times(row["wall_seconds"], rows))
    about = {"part": part, "net": info.net["backbone"], "storage": "local", "input_size": info.pixels.input_size}
    return [about | row for row in rows]


def median_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows of the same arm: medians of figures, the first of everything else, and their number."""
    joined: dict[str, Any] = {"repeats": len(rows)}
    for name, value in rows[0].items():
        values = [row[name] for row in rows if row.get(name) is not None]
        alike = len(set(values)) <= 1 or any(isinstance(value, str) for value in values)
        joined[name] = value if alike else round(statistics.median(values), 3)
    return joined


def _measure_s3(
    bench: Bench, bundle: str, folder: str, store: S3Server, local: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Measure the same with the images in a bucket; timm cannot read one, so the images are fetched first."""
    info, images = open_bundle(bundle), count_images(folder)
    recipe_folder = few(folder, min(bench.peer_images or RECIPE_IMAGES, images))
    for prefix, source in (("all", folder), ("few", recipe_folder)):
        store.create_bucket("photos", {f"{prefix}/{path.name}": path for path in Path(source).iterdir()})
    download_seconds = _download(folder, bench.out("downloaded"))
    timm = next(row for row in local if row["arm"] == "timm")
    unknown = dict.fromkeys(("images_per_second", "images_per_second_per_core", "core_hours_per_million"))
    timm_row = (timm | unknown) | {
        "wall_seconds": round(timm["wall_seconds"] + download_seconds, 2),
        "whole_seconds": round(timm["whole_seconds"] + download_seconds, 1),
        "core_seconds": None,
        "note": f"fetched first in {download_seconds:.1f} s by carray's client, {AT_ONCE} at once; "
        f"then the local row's run; {timm['note']}",
    }
    network = bench.work / "peers" / info.bundle_id / "network.json"
    count = count_images(recipe_folder)
    rows = [timm_row, scale_up(recipe(bench, network, "s3://photos/few/", count, name="peers-s3-recipe").row, images)]
    for runtime in runtimes_of(info):
        ours = classify(bench, bundle, "s3://photos/all", runtime=runtime, name=f"peers-s3-{runtime}").row
        rows.append(ours | _times(ours["wall_seconds"], rows))
    about = {"part": "peers", "net": info.net["backbone"], "input_size": info.pixels.input_size}
    return [about | row | {"storage": "s3"} for row in rows]


def _best_timm(
    bench: Bench, network: Path, folder: str, images: int, tries: Sequence[TimmSettings]
) -> tuple[TimmSettings, list[dict[str, Any]]]:
    """Try settings on a few images; returns the best ones, and a row with a warm compile cache."""
    promised = {}
    for settings in tries:
        row = _try_timm(bench, network, folder, settings, images)
        promised[settings] = row["whole_seconds"] if row else float("inf")
        print(f"timm, {settings.text()}: promises {images:,} images in {promised[settings]:.0f} s", flush=True)
    best = min(promised, key=lambda settings: promised[settings])
    compiled = [settings for settings in promised if settings.compiled and promised[settings] < float("inf")]
    if not compiled:
        return best, []
    again = min(compiled, key=lambda settings: promised[settings])
    warm = _try_timm(bench, network, folder, again, images, fresh=False)
    return best, [warm | {"arm": "timm compiled before"}] if warm else []


def _try_timm(
    bench: Bench, network: Path, folder: str, settings: TimmSettings, images: int, *, fresh: bool = True
) -> dict[str, Any] | None:
    """Run timm's loop on a few images; returns its row scaled up to all, or None if it cannot run."""
    try:
        arm = timm_inference(bench, network, folder, settings, name="timm-try", fresh=fresh)
    except JobFailed as err:  # torch.compile wants a C++ compiler
        print(f"timm, {settings.text()}: {str(err).strip().splitlines()[-1]}", flush=True)
        return None
    return scale_up(arm.row, images)


def scale_up(row: dict[str, Any], images: int) -> dict[str, Any]:
    """Add to a peer's row the seconds of all images: measured if it had them all, else scaled up at its steady rate."""
    wall, steady = row["wall_seconds"], row["steady_images_per_second"]
    if row["images"] == images:
        scaled = {"whole_seconds": wall}
    elif steady:
        note = f"{row['note']}; whole_seconds scaled up from {row['images']} images at the steady rate"
        scaled = {"whole_seconds": round(wall + (images - row["images"]) / steady, 1), "note": note}
    else:
        note = f"{row['note']}; whole_seconds scaled up from {row['images']} images, start-up included"
        scaled = {"whole_seconds": round(wall / row["images"] * images, 1), "note": note}
    return row | scaled | {"startup_seconds": round(wall - row["images"] / steady, 2) if steady else None}


def _times(wall_seconds: float, peers: list[dict[str, Any]]) -> dict[str, Any]:
    columns = {"timm": "times_timm", "ray recipe": "times_ray_recipe"}
    found = {
        columns[row["arm"]]: round(row["whole_seconds"] / wall_seconds, 2) for row in peers if row["arm"] in columns
    }
    return found | {"whole_seconds": wall_seconds}


def _agreement(labels: dict[str, int], reference: dict[str, int]) -> float:
    return round(sum(reference[name] == label for name, label in labels.items()) / len(labels), 4)


def _download(folder: str, to: Path) -> float:
    """Fetch a folder's copy in the bucket with carray's client; returns the seconds."""
    to.mkdir(parents=True)
    names, started = sorted(os.listdir(folder)), time.monotonic()

    def get(name: str) -> None:
        (to / name).write_bytes(fetch_image(f"s3://photos/all/{name}").data)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(get, names))
    return time.monotonic() - started

"""Compares `carray classify` with Daft, timm's inference script and the recipe of Ray's documentation, as whole jobs.

The jobs run in turn, carray and Daft twice and the slow peers once; every second from starting Python counts. timm runs
with the one of a few settings that promises the shortest whole job, by its start-up and steady rate on a few hundred
images. Compiling counts as start-up, as on a new machine. For a peer that gets fewer images than all, the others are
added at its steady rate.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from carray.bundle.bundle_folder import open_bundle
from carray.core.store.image_bytes import fetch_image
from carray.testing.object_store import start_store
from jobs.bench.classify.arms import Arm, TimmSettings, classify, count_images, daft, median_row, recipe, timm_inference
from jobs.bench.classify.setup import Bench, about_bundle, daft_python, enlarge_test, few, peer_network, runtimes_of
from jobs.bench.classify.watch import JobFailed

TRIAL_IMAGES = 330
"""For one try of timm's settings: a few batches, and a smaller last one, which torch.compile compiles anew."""
TRIES = (
    TimmSettings(batch=32, workers=2),
    TimmSettings(batch=64, workers=2),
    TimmSettings(batch=64, workers=1),
    TimmSettings(batch=64, workers=2, compiled=True),
    TimmSettings(batch=64, workers=2, compiled=True, frozen=True),
)
TRY_SECONDS = 240
"""After which a try is given up: torch.compile takes minutes on some machines."""
RECIPE_IMAGES, LARGE_IMAGES, FEW_IMAGES, COPIES = 2000, 300, 256, 10
TIMES = {"timm": "times_timm", "daft": "times_daft", "ray recipe": "times_ray_recipe"}
"""The column of each peer's seconds over carray's."""
AT_ONCE = 16
"""Objects uploaded or fetched at once."""


def measure_peers(bench: Bench, part: str) -> list[dict[str, Any]]:
    """Measure all arms on all photographs, few, ten copies of all, cars_test enlarged, or all in a bucket."""
    bundle, folder = bench.bundle(), enlarge_test(bench) if part == "peers-large" else bench.folder()
    if part == "peers-256":
        folder = few(folder, FEW_IMAGES)
    images = count_images(folder) * (COPIES if part == "peers-65160" else 1)
    slow_images = LARGE_IMAGES if part == "peers-large" else RECIPE_IMAGES
    timm_images = slow_images if part == "peers-large" else None
    slow = slow_peers(bench, bundle, folder, images=images, timm_images=timm_images, recipe_images=slow_images)
    if part == "peers-s3":
        return _measure_s3(bench, bundle, folder, slow[0], slow[1].row["images"])
    if part == "peers-65160":  # the fastest runtime alone, since fp32 would take half an hour
        folder = bench.folder(images)
        return compare(bench, bundle, folder, slow, part=part, images=images, runtimes=runtimes_of(bundle)[:1])
    return compare(bench, bundle, folder, slow, part=part, images=images)


def _measure_s3(bench: Bench, bundle: str, folder: str, timm: Arm, count: int) -> list[dict[str, Any]]:
    """Measure all arms with the images in a bucket; timm cannot read one, so the images are fetched first."""
    with start_store(bench.out("store")) as store, patch.dict(os.environ, store.environment):
        for prefix, source in (("all", folder), ("few", few(folder, count))):
            store.create_bucket("photos", {f"{prefix}/{path.name}": path for path in Path(source).iterdir()})
        to, started = bench.out("downloaded"), time.monotonic()
        to.mkdir(parents=True)
        names = os.listdir(folder)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = pool.map(lambda name: fetch_image(f"s3://photos/all/{name}").data, names)
            for name, data in zip(names, found, strict=True):
                (to / name).write_bytes(data)
        seconds = time.monotonic() - started
        note = f"fetched first in {seconds:.1f} s by carray's client, {AT_ONCE} at once; then the run on files"
        row = {name: value for name, value in timm.row.items() if "per_" not in name or name.startswith("steady")}
        row |= {"wall_seconds": round(timm.row["wall_seconds"] + seconds, 2), "core_seconds": None}
        fetched = replace(timm, row=row | {"note": f"{note}; {timm.row['note']}"})
        slow = [fetched, recipe(bench, _network(bench, bundle), "s3://photos/few", count)]
        return compare(bench, bundle, "s3://photos/all", slow, part="peers-s3", images=count_images(folder))


def slow_peers(
    bench: Bench,
    bundle: str,
    folder: str,
    *,
    images: int,
    timm_images: int | None = None,
    recipe_images: int = RECIPE_IMAGES,
    tries: tuple[TimmSettings, ...] = TRIES,
) -> tuple[Arm, Arm]:
    """Run timm, with what promises `images` images soonest, and the recipe, each on at most so many of a folder."""
    network, trial = _network(bench, bundle), few(bench.folder(), TRIAL_IMAGES)
    tried = _try_timm(bench, network, trial, tries)
    promised = {settings: scale_up(arm.row, images)["whole_seconds"] for settings, arm in tried.items()}
    for settings, seconds in promised.items():
        print(f"timm, {settings}: promises {images:,} images in {seconds:.0f} s", flush=True)
    best = min(promised, key=lambda settings: promised[settings])
    most = bench.peer_images or images
    of_timm, of_recipe = (few(folder, min(count or most, most)) for count in (timm_images, recipe_images))
    recipe_arm = recipe(bench, network, of_recipe, count_images(of_recipe))
    return timm_inference(bench, network, of_timm, best), recipe_arm


def compare(
    bench: Bench,
    bundle: str,
    source: str,
    slow: Sequence[Arm],
    *,
    part: str,
    images: int,
    runtimes: Sequence[str] = (),
    with_ray: bool = True,
) -> list[dict[str, Any]]:
    """Measure `carray classify` and Daft in turn, twice, with each runtime, on Ray the first one; returns a row each.

    The rows of the slow peers come first, scaled up to `images`.
    """
    runtimes = runtimes or runtimes_of(bundle)
    kinds = [(runtime, arm) for runtime in runtimes for arm in ("local", *["daft"] * bool(daft_python()))]
    kinds += [(runtimes[0], "ray")] if with_ray else []
    runs: dict[tuple[str, str], list[Arm]] = {kind: [] for kind in kinds}
    for _ in range(2):
        for runtime, arm in kinds:
            asked = {"runtime": runtime, "name": f"{part}-{arm}-{runtime}"}
            if arm == "daft":  # 0.7.26 sometimes crashes when it ends
                runs[runtime, arm] += _runs(f"Daft, {runtime}", partial(daft, bench, bundle, source, **asked))
            else:
                runs[runtime, arm].append(classify(bench, bundle, source, engine=arm, labels=True, **asked))
    reference = runs["fp32", "local"][0].labels if "fp32" in runtimes else {}
    fast = [replace(of_kind[0], row=median_row([arm.row for arm in of_kind])) for of_kind in runs.values() if of_kind]
    rows = [scale_up(arm.row, images) | {"agreement": _agreement(arm.labels, reference)} for arm in (*slow, *fast)]
    about = about_bundle(bundle) | {"part": part, "storage": "s3" if source.startswith("s3://") else "local"}
    return [about | row | (_times(row, rows) if row["arm"] == "carray" else {}) for row in rows]


def headline_times(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Name how many times as long as carray on the local engine each peer took: by peer, part and, if fp32, runtime."""
    found: dict[str, float] = {}
    for row in (row for row in rows if row["part"].startswith("peers") and row.get("engine") == "local"):
        end = row["part"].removeprefix("peers").replace("-", "_") + "_fp32" * (row["runtime"] == "fp32")
        found |= {f"{name}{end}": row[name] for name in TIMES.values() if name in row}
    return found


def _network(bench: Bench, bundle: str) -> Path:
    return peer_network(bundle, bench.work / "peers" / open_bundle(bundle).bundle_id)


@cache
def _try_timm(bench: Bench, network: Path, folder: str, tries: Sequence[TimmSettings]) -> dict[TimmSettings, Arm]:
    """Try settings on a few images; those that cannot run (torch.compile wants a C++ compiler) are left out."""
    run = partial(timm_inference, bench, network, folder, most_seconds=TRY_SECONDS)
    return {settings: arm for settings in tries for arm in _runs(f"timm, {settings}", run, settings)}


def _runs(name: str, run: Callable[..., Arm], *arguments: object) -> list[Arm]:
    """Run an arm once; none, with a line, if it fails."""
    try:
        return [run(*arguments)]
    except JobFailed as err:
        print(f"{name}: a run is left out, {str(err).strip().splitlines()[-1]}", flush=True)
        return []


def scale_up(row: dict[str, Any], images: int) -> dict[str, Any]:
    """Add to a row the seconds of all images: measured if it had them all, else scaled up at its steady rate."""
    wall, steady, note = row["wall_seconds"], row["steady_images_per_second"], row.get("note", "")
    if row["images"] == images:
        return row | {"whole_seconds": wall}
    if steady:
        startup, whole = round(wall - row["images"] / steady, 2), round(wall + (images - row["images"]) / steady, 1)
        note = f"{note}; whole_seconds scaled up from {row['images']} images at the steady rate"
    else:
        startup, whole = None, round(wall / row["images"] * images, 1)
        note = f"{note}; whole_seconds scaled up from {row['images']} images, start-up included"
    return row | {"whole_seconds": whole, "startup_seconds": startup, "note": note}


def _times(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Divide the peers' seconds by a row's; Daft's is the one with the same runtime."""
    return {
        TIMES[peer["arm"]]: round(peer["whole_seconds"] / row["whole_seconds"], 2)
        for peer in rows
        if peer["arm"] in TIMES and (peer["arm"] != "daft" or peer["runtime"] == row["runtime"])
    }


def _agreement(labels: dict[str, int], reference: dict[str, int]) -> float | None:
    same = [reference[name] == label for name, label in labels.items()] if reference else []
    return round(sum(same) / len(same), 4) if same else None

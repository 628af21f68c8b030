"""Runs many drills of the classification job one after another, in front of one bucket.

From: a number of times and a seed. To: a row of results/drill_classify.csv.
Invariants: every kind has its turn before one has its second; outputs lie by turns in a folder and in a bucket;
everything that was started is ended.
"""

from __future__ import annotations

import os
import random
import secrets
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.bench.classify_check import Truth, read_truth
from jobs.bench.classify_drill import Outcome, drill
from jobs.bench.classify_faults import KINDS, Scene
from jobs.bench.classify_job import Job
from jobs.bench.processes import kill_marked

__all__ = ["kinds_of", "run_rounds", "set_scene"]

IMAGES_PER_CLASS = 80
_BUCKET = "drill"
_PREFIX = "photos/"
_READ_SECONDS = 0.1
"""How long the proxy makes each image take: a job of some seconds, most of which are reading."""
_MOST_VOID = 5
"""Jobs begun for one drill before it counts as wrong."""


def run_rounds(work: Path, *, times: int, seed: int, only: Sequence[str] = KINDS) -> dict[str, Any]:
    """Run one job undisturbed and `times` drills, and say of each in a line how it went."""
    mark = secrets.token_hex(8)
    with set_scene(work, mark) as (scene, bundle):
        outcomes = []
        for i, kind in enumerate(kinds_of(times, seed, only)):
            for again in range(_MOST_VOID):
                dice = random.Random(f"{seed}-{i}-{again}")
                outcome = run_one(kind, scene, bundle, work, dice, name=f"drill-{i}-{again}", s3=bool(i % 2))
                print(_line(i, times, outcome), flush=True)
                if outcome.said:
                    break
            outcomes.append(outcome)
        kinds = Counter(outcome.kind for outcome in outcomes)
        right = [outcome for outcome in outcomes if outcome.said and not outcome.complaints]
        return {
            "seed": seed,
            "drills": times,
            "right": len(right),
            "images": len(scene.truth.etags),
            "shards": scene.truth.shards,
            "runs": sum(len(outcome.codes) for outcome in outcomes),
            "refetched_rows": sum(outcome.refetched for outcome in outcomes),
            "median_drill_seconds": round(statistics.median(outcome.seconds for outcome in outcomes), 1),
            "processes_left": sum(len(outcome.left) for outcome in outcomes),
            **{f"drills_{kind}": kinds[kind] for kind in KINDS},
        }


def run_one(
    kind: str, scene: Scene, bundle: str, work: Path, dice: random.Random, *, name: str, s3: bool = False
) -> Outcome:
    """Run one drill in a fresh output folder; whatever it started is ended."""
    mark = f"{scene.mark}-{name}"
    out = f"s3://{_BUCKET}/out/{name}" if s3 and kind != "disk" else str(work / name / "out")
    job = Job(bundle, scene.uri(_PREFIX), out, work / f"{name}.log", mark, scene.environment)
    try:
        return drill(kind, job, scene, dice, work)
    finally:
        kill_marked(mark, job.process)


def kinds_of(times: int, seed: int, only: Sequence[str] = KINDS) -> list[str]:
    """Give what each drill does: every kind once in a drawn order, then again in another."""
    dice = random.Random(seed)
    drawn: list[str] = []
    while len(drawn) < times:
        drawn += dice.sample(only, len(only))
    return drawn[:times]


@contextmanager
def set_scene(work: Path, mark: str, *, images_per_class: int = IMAGES_PER_CLASS) -> Iterator[tuple[Scene, str]]:
    """Start an object store and a proxy before it, fill a bucket, pack a bundle, and run one job undisturbed."""
    from carray.testing.fault_proxy import Rule, start_proxy
    from carray.testing.object_store import start_store

    bodies = _draw(work / "images", images_per_class)
    bundle = _pack(work / "bundle")
    with start_store(work / "store") as store, start_proxy(store.endpoint) as proxy:
        os.environ.update(store.environment)
        client = store.client()
        client.create_bucket(Bucket=_BUCKET)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: client.put_object(Bucket=_BUCKET, Key=key, Body=bodies[key]), bodies))
        proxy.add(Rule("delay", method="GET", key=f"^/{_BUCKET}/{_PREFIX}", seconds=_READ_SECONDS))
        environment = {**store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        scene = Scene(_BUCKET, _PREFIX, store, proxy, Truth({}, {}, 0), bodies, mark, environment)
        yield replace(scene, truth=_run_undisturbed(scene, bundle, work)), bundle


def _run_undisturbed(scene: Scene, bundle: str, work: Path) -> Truth:
    job = Job(bundle, scene.uri(_PREFIX), str(work / "truth"), work / "truth.log", f"{scene.mark}-0", scene.environment)
    job.start()
    if job.wait():
        raise SystemExit(f"the undisturbed job failed:\n{job.said()[-3000:]}")
    truth = read_truth(job.out)
    statuses = Counter(row["status"] for row in truth.rows.values())
    told_apart = len({(row["phash"], row["score"]) for row in truth.rows.values()})
    print(f"undisturbed: {len(truth.etags)} images, {truth.shards} shards, {dict(statuses)}", flush=True)
    if set(truth.etags) != {scene.uri(key) for key in scene.bodies} or told_apart < 0.9 * len(truth.rows):
        raise SystemExit(f"the undisturbed job is no measure: {len(truth.etags)} rows, {told_apart} told apart")
    return truth


def _draw(folder: Path, images_per_class: int) -> dict[str, bytes]:
    """Draw photographs, broken files and odd names; gives the bytes of each key."""
    from carray.testing.drawing import draw_broken_files, draw_dataset

    draw_dataset(folder, images_per_class=images_per_class)
    draw_broken_files(folder / "odd")
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {f"{_PREFIX}{path.relative_to(folder)}": path.read_bytes() for path in paths}


def _pack(bundle: Path) -> str:
    """Pack a tiny untrained CNN: what it says of an image is arbitrary, and always the same."""
    import numpy as np
    import torch

    from carray.bundle.pack import pack_bundle
    from carray.images.pixels import PixelSettings
    from carray.search.train.hyperparameters import CnnHyper
    from carray.search.train.nets import build_net
    from carray.testing.drawing import DEMO_CLASSES

    torch.manual_seed(0)
    hyper = CnnHyper(input_size=40, stages=2, width=4)
    pack_bundle(
        build_net(hyper, class_count=len(DEMO_CLASSES)),
        str(bundle),
        classes=list(DEMO_CLASSES),
        pixels=PixelSettings(decode_size=48, input_size=40),
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=hyper.model_dump(mode="json"),
        search_note={"trial_id": "none"},
        parity_pixels_NHWC=np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8),
    )
    return str(bundle)


def _line(number: int, times: int, outcome: Outcome) -> str:
    verdict = "all right"
    if outcome.complaints:
        verdict = "WRONG: " + "; ".join(outcome.complaints)[:2000]
    elif not outcome.said:
        verdict = f"void, since the job had ended before {outcome.kind}; drawn again"
    codes = ", ".join("killed" if code is None else str(code) for code in outcome.codes)
    left = f", left: {outcome.left}" if outcome.left else ""
    said = outcome.said or "nothing"
    fetched = f", {outcome.refetched} rows fetched again" if outcome.refetched else ""
    return f"drill {number + 1}/{times}: {said}; exit codes {codes}{fetched}{left}; {outcome.seconds:.0f} s; {verdict}"

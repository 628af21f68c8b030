"""Disturbs a classification in every way that a cluster knows, resumes it, and checks every row; many times.

    python -m jobs.drills.classify --times 20 [--seed 0] [--only KIND ...]

Uses drawn photographs in a real object store on loopback (extra `dev`); the kind `disk` mounts a small disk, which
needs root. Outputs lie alternately in a folder and in a bucket, and two jobs of four run on a Ray, unless --engine is
given; `raylet` always does. Prints a line per drill, appends a row to
results/drill_classify.csv, and ends with one JSON line; exit code 1 if a row was lost, doubled or wrong. Cost: about
30 s a drill on two cores.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from carray.testing.bundles import pack_small
from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_dataset
from carray.testing.fault_proxy import Rule, start_proxy
from carray.testing.object_store import start_store
from jobs.bench.rows import set_words
from jobs.drills.faults import FAULTS, Drill, Job, Scene, prepare_fault, restore
from jobs.drills.harness import Outcome, drill_program, files_below, kinds_of, run_drills
from jobs.drills.prediction_rows import Truth, inspect_output, read_truth
from jobs.processes import kill_marked

KINDS = tuple(FAULTS)
ENGINES = ("local", "ray")
IMAGES_PER_CLASS = 80
_BUCKET = "drill"
_PREFIX = "photos/"
_READ_SECONDS = 0.1
"""The proxy delays each image by this, so that a job lasts some seconds, most of them reading."""
_SURVIVED = ("worker", "raylet", "denied", "deleted", "replaced", "version")
"""Faults that must not end the job."""
_MOST_RUNS = 4
_STORAGE_REFUSED = 4
_SHARDS = ("shard_images_first=16", "shard_images_max=32", "fetch_concurrency=4", "batch_images=8")
"""Some thirty shards of a few tenths of a second, so that a fault may fall between any two steps of a job."""


def main() -> None:
    """Run the drills, and write the results."""
    program = drill_program(__doc__, "drill_classify.csv", times=20, kinds=KINDS)
    program.option("--engine", choices=ENGINES, nargs="+", default=list(ENGINES), help="one engine instead of both")
    given = program.parse()
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work:
        row = drill_jobs(Path(work), times=given.times, seed=given.seed, only=given.only, engines=given.engine)
    program.record([row])
    print(json.dumps(row))
    sys.exit(0 if row["right"] == row["drills"] else 1)


def drill_jobs(
    work: Path, *, times: int, seed: int, only: Sequence[str] = KINDS, engines: Sequence[str] = ENGINES
) -> dict[str, Any]:
    """Run one job undisturbed and `times` drills; returns a row."""
    kinds = kinds_of(times, seed, only)
    with set_scene(work, secrets.token_hex(8)) as (scene, bundle):

        def drill_one(number: int, attempt: int) -> Outcome:
            dice, name = random.Random(f"{seed}-{number}-{attempt}"), f"drill-{number}-{attempt}"
            engine = engines[number // 2 % len(engines)]
            return run_one(kinds[number], scene, bundle, work, dice, name=name, engine=engine, s3=bool(number % 2))

        outcomes = list(run_drills(times, drill_one))
    counts = Counter(kinds)
    return {
        "seed": seed,
        "engines": " ".join(engines),
        "drills": times,
        "right": sum(outcome.right for outcome in outcomes),
        "images": len(scene.truth.etags),
        "shards": scene.truth.shards,
        "runs": sum(len(outcome.codes[""]) for outcome in outcomes),
        "refetched_rows": sum(outcome.figures["refetched"] for outcome in outcomes),
        "median_drill_seconds": round(statistics.median(outcome.seconds for outcome in outcomes), 1),
        "processes_left": sum(len(outcome.left) for outcome in outcomes),
        **{f"drills_{kind}": counts[kind] for kind in KINDS},
    }


def run_one(
    kind: str, scene: Scene, bundle: str, work: Path, dice: random.Random, *, name: str, engine: str, s3: bool = False
) -> Outcome:
    """Run one drill in a fresh output folder, and end whatever it started."""
    out = f"s3://{_BUCKET}/out/{name}" if s3 and kind != "disk" else ""
    job = _job(scene, bundle, work, name, engine="ray" if kind == "raylet" else engine, out=out)
    try:
        return run_drill(Drill(kind, job, scene, dice, scene.truth), work)
    finally:
        kill_marked(job.mark, job.process)


def _job(scene: Scene, bundle: str, work: Path, name: str, *, engine: str, out: str = "") -> Job:
    out = out or str(work / name / "out")
    words = [sys.executable, "-m", "carray", "classify", bundle, scene.uri(_PREFIX), "--out", out]
    words += ["--engine", engine, *set_words(_SHARDS)]
    return Job(words, work / f"{name}.log", f"{scene.mark}-{name}", scene.environment, out=out)


@contextmanager
def set_scene(work: Path, mark: str, *, images_per_class: int = IMAGES_PER_CLASS) -> Iterator[tuple[Scene, str]]:
    """Start an object store behind a proxy, fill a bucket, pack a bundle, and run one job undisturbed."""
    images, bundle = work / "images", pack_small(work / "bundle", DEMO_CLASSES)
    draw_dataset(images, images_per_class=images_per_class)
    draw_broken_files(images / "odd")
    bodies = files_below(images, _PREFIX)
    with start_store(work / "store") as store, start_proxy(store.endpoint) as proxy:
        os.environ.update(store.environment)
        store.create_bucket(_BUCKET, bodies)
        proxy.add(Rule("delay", method="GET", key=f"^/{_BUCKET}/{_PREFIX}", seconds=_READ_SECONDS))
        environment = {**store.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
        scene = Scene(_BUCKET, _PREFIX, store, proxy, Truth({}, {}, 0), bodies, mark, environment)
        yield replace(scene, truth=_run_undisturbed(scene, bundle, work)), bundle


def _run_undisturbed(scene: Scene, bundle: str, work: Path) -> Truth:
    job = _job(scene, bundle, work, "truth", engine="local", out=str(work / "truth"))
    job.start()
    if job.wait() != 0:
        raise SystemExit(f"the undisturbed job failed:\n{job.said()[-3000:]}")
    truth = read_truth(job.out)
    statuses = Counter(row["status"] for row in truth.rows.values())
    distinct = len({(row["phash"], row["score"]) for row in truth.rows.values()})
    print(f"undisturbed: {len(truth.etags)} images, {truth.shards} shards, {dict(statuses)}", flush=True)
    if set(truth.etags) != {scene.uri(key) for key in scene.bodies} or distinct < 0.9 * len(truth.rows):
        raise SystemExit(f"the undisturbed job is no reference: {len(truth.etags)} rows, {distinct} distinct")
    return truth


def run_drill(drill: Drill, work: Path) -> Outcome:
    """Run a job, disturb it, resume it until every readable image is scored, and compare."""
    kind, job, complaints = drill.kind, drill.job, drill.complaints
    with prepare_fault(drill, work) as end_fault:
        job.start()
        try:
            drill.strike()
            if kind == "driver" and drill.said:
                job.wait()
                time.sleep(drill.dice.choice([0, 3]))  # its workers may still be busy when the next one starts
            elif kind != "term" or not drill.said:
                job.wait()
                complaints += _check_end(kind, job)
            refetched = job.fetch_errors() if kind == "denied" else 0
            if kind == "denied" and not refetched:
                complaints.append("no row is fetch_error, though a prefix was denied")
            end_fault()
            refetched = max(refetched, _finish(job, drill.truth, complaints))
            complaints += inspect_output(job.out, drill.truth)
        finally:
            restore(drill.scene, {*drill.truth.deleted, *drill.truth.replaced})
        left = job.left()
        complaints += [f"{name} goes on" for name in left]
    note = f"all right, {refetched} rows fetched again" if refetched else ""
    return Outcome(drill.said, complaints, {"": job.codes}, left, note, {"refetched": refetched})


def _finish(job: Job, truth: Truth, complaints: list[str]) -> int:
    """Resume until the command succeeds and nothing more can be fetched; returns how many rows were fetched again."""
    refetched = 0
    while len(job.codes) < _MOST_RUNS:
        failed = job.fetch_errors()
        if job.codes[-1] == 0 and (not failed or truth.deleted):
            return refetched
        refetched = max(refetched, failed)
        job.start("--retry-failed")
        if job.wait() != 0:
            complaints.append(f"run {len(job.codes)}, undisturbed, ended with {job.codes[-1]}: {job.said()[-600:]}")
    if job.codes[-1] != 0 or job.fetch_errors():
        complaints.append(f"after {len(job.codes)} runs {job.fetch_errors()} rows are fetch_error")
    return refetched


def _check_end(kind: str, job: Job) -> list[str]:
    """Check how a disturbed run ended: well, or with storage's exit code and one sentence."""
    code, said = job.codes[-1], job.said()
    if code is None:
        return [f"it did not end by itself: {said[-600:]}"]
    due = {0} if kind in _SURVIVED else {_STORAGE_REFUSED} if kind == "disk" else {0, _STORAGE_REFUSED}
    complaints = [] if code in due else [f"exit code {code}, not {due}: {said[-600:]}"]
    sentences = [text for text in re.findall(r"^carray: .*", said, re.MULTILINE) if "run the same command" not in text]
    if code and (len(sentences) != 1 or "Traceback" in said):
        complaints.append(f"{len(sentences)} sentences where one is due: {said[-600:]}")
    if kind == "disk" and code and "free space" not in said:
        complaints.append(f"it does not say what to do about the full disk: {sentences}")
    return complaints


if __name__ == "__main__":
    main()

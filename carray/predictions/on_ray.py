"""Classifies a bucket: shards of keys over Ray Data's workers, each of which writes its own shard.

From: a bundle, and a folder, prefix or table of images. To: a run's folder (`predictions/__init__.py`), complete
exactly when `_carray/done.json` exists.
Invariants: rows out are images in, counted in the ledger and in the files; the same call again does only what is
missing; a worker that dies costs at most the shard it had in hand. Only numbers travel between processes, shards'
numbers in and counts out, so Ray Data needs no CPU for reading or writing, and one CPU is enough.
Cost: see `classify_*` in results/cars.csv; a worker imports neither torch nor timm and starts in about 2 s.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from carray.bundle.format import open_bundle
from carray.core import errors
from carray.core.errors import CarrayError, SettingsError, StorageError
from carray.core.on_ray import RunningRay, start_ray
from carray.core.progress import Progress, say
from carray.core.storage import absolute, aws_environment, delete, write_json
from carray.predictions.build import ShardScorer
from carray.predictions.format import ClassifySettings, record_place
from carray.predictions.ledger import (
    LedgerEntry,
    RunRecord,
    check_folder,
    count_rows,
    done_shards,
    forget_attempts,
    read_run,
)
from carray.predictions.plan import describe_run, plan_run

__all__ = ["classify"]


def classify(bundle: str, source: str, *, out: str, settings: ClassifySettings | None = None) -> dict[str, Any]:
    """Score every image of `source` into Parquet files in `out`, or what is missing of them; gives the run's counts.

    Raises:
        BundleError: the bundle is damaged, unfinished, or computes other logits on a worker.
        SettingsError: no image, another run in `out`, or a runtime or split that does not exist.
        SchemaError: a table of images cannot be read as one.
        StorageError: storage refused, or rows out are not images in.
        BudgetError: a shard lost its worker again and again.
    """
    started = time.monotonic()
    settings = settings or ClassifySettings()
    bundle, source, out = (absolute(uri).rstrip("/") or "/" for uri in (bundle, source, out))
    info = open_bundle(bundle)
    wanted = describe_run(info, bundle, source, settings)
    check_folder(out, wanted)
    run = read_run(out) or plan_run(out, wanted, settings, uses_boxes=info.uses_boxes)
    todo, images = _unfinished(out, run, settings)
    if todo:
        scored = _score_shards(bundle, out, run, settings, todo, images=images)
    else:
        scored = 0
        say(f"classify: nothing to do, all {run.images:,} images of {out} are scored")
    return _finish(out, run, scored, time.monotonic() - started)


def _unfinished(out: str, run: RunRecord, settings: ClassifySettings) -> tuple[list[dict[str, Any]], int]:
    """Give the shards to score, and how many images of theirs."""
    done = done_shards(out, run.shards)
    todo = [{"shard": shard, "retry": False} for shard in range(run.shards) if shard not in done]
    images = run.images - sum(entry.rows for entry in done.values())
    if settings.retry_failed:
        failed = [entry for entry in done.values() if entry.fetch_errors]
        todo += [{"shard": entry.shard, "retry": True} for entry in failed]
        images += sum(entry.fetch_errors for entry in failed)
    if todo and done:
        say(f"classify: {len(done):,} of {run.shards:,} shards are done already, {images:,} images are left")
    return todo, images


def _score_shards(
    bundle: str, out: str, run: RunRecord, settings: ClassifySettings, todo: list[dict[str, Any]], *, images: int
) -> int:
    """Score shards on Ray; gives the number of images read."""
    delete(record_place(out, "done.json"))
    with start_ray() as running:
        workers, cpus = _size_workers(running, settings, len(todo))
        say(f"classify: {len(todo):,} shards, {workers} workers of {cpus} CPU, runtime {run.runtime}")
        job = {
            "bundle": bundle,
            "out": out,
            "run": run.model_dump(),
            "settings": settings.model_copy(update={"threads": cpus}).model_dump(),
            # Workers of our own private Ray are this user's processes; a cluster has credentials of its own.
            "environment": dict(aws_environment()) if running.private else {},
        }
        with _blameless(out), Progress("classify", total=images) as progress:
            for entry in _run_shards(job, todo, workers=workers, cpus=cpus):
                progress.advance(entry.scored, errors=entry.fetch_errors + entry.decode_errors)
            return progress.done


def _size_workers(running: RunningRay, settings: ClassifySettings, shards: int) -> tuple[int, int]:
    """Give the number of workers and the CPUs of each: never more than a node has, or Ray would wait for ever."""
    cpus = min(settings.threads, max(running.node_cpus, 1))
    workers = settings.workers or max(1, running.cpus // cpus)
    return min(workers, shards), cpus


def _run_shards(job: dict[str, Any], todo: list[dict[str, Any]], *, workers: int, cpus: int) -> Iterator[LedgerEntry]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    shards = ray.data.from_items(todo, override_num_blocks=len(todo))
    worker: Any = _Worker  # Ray's annotation knows functions only
    # A worker that dies is started again and its shard given to it again, without end: Ray Data's default. The shard's
    # own notes (ledger.Attempt) bound that, and step over what killed it.
    counts = shards.map(
        worker,
        fn_constructor_kwargs={"job": job},
        # One shard at a time in a worker's hand: the next one goes to whoever is free first.
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
    )
    try:
        for row in counts.iter_rows():
            if row["refusal"]:
                raise getattr(errors, row["refusal"])(row["sentence"])
            yield LedgerEntry.model_validate_json(row["entry"])
    except RayError as err:
        if "No module named 'carray" not in str(err):
            raise
        raise SettingsError(
            "the machines of this Ray have no carray ('No module named carray'); install it in their image, or submit "
            "the command as a job with --working-dir."
        ) from err


class _Worker:
    """Is one scoring process."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.update(job["environment"])
        self._scorer = ShardScorer(
            job["bundle"],
            out=job["out"],
            run=RunRecord.model_validate(job["run"]),
            settings=ClassifySettings.model_validate(job["settings"]),
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            entry = self._scorer.score_shard(int(row["shard"]), retry_failed=bool(row["retry"]))
        except CarrayError as err:
            # Ray would wrap it, drop what it was, and print a stack: a sentence for the user travels as what it is.
            return {"entry": "", "refusal": type(err).__name__, "sentence": str(err)}
        return {"entry": entry.model_dump_json(), "refusal": "", "sentence": ""}


@contextmanager
def _blameless(out: str) -> Iterator[None]:
    """Take the workers' notes away when the job is stopped: no image is to blame for that."""
    try:
        yield
    except BaseException:
        with suppress(StorageError):  # what stopped the job says more
            forget_attempts(out)
        raise


def _finish(out: str, run: RunRecord, scored: int, seconds: float) -> dict[str, Any]:
    counts = count_rows(out, run)
    outcome = {
        "run_id": run.run_id,
        "bundle_id": run.bundle_id,
        "images": run.images,
        "rows": counts["rows"],
        "ok": counts["ok"],
        "fetch_errors": counts["fetch_errors"],
        "decode_errors": counts["decode_errors"],
        "repeated": run.repeated,
        "skipped_by_suffix": run.skipped_by_suffix,
        "seconds": round(seconds, 3),
        "images_per_second": round(scored / seconds, 2),
        "out": out,
    }
    write_json(record_place(out, "done.json"), outcome)
    return outcome

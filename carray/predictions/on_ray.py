"""Classifies a bucket: shards of keys over Ray Data's workers, each of which writes its own shard.

From: a bundle, and a folder, prefix or table of images. To: a run's folder (`predictions/__init__.py`), complete exactly
when `_carray/done.json` exists. Invariants: rows out are images in, counted in the ledger and in the files; the same call
again does only what is missing; a worker that dies costs at most the shard it had in hand. Only numbers travel between
processes: shards' numbers in, counts out. So Ray Data needs no CPU for reading or writing, and one CPU is enough.
Cost: see `classify` in results/README.md; a worker imports neither torch nor timm and starts in about 2 s.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy

from carray.bundle.format import BundleInfo, open_bundle
from carray.bundle.predict import resolve_runtime
from carray.core.errors import CarrayError, SettingsError
from carray.core.on_ray import RunningRay, start_ray
from carray.core.progress import Progress, say
from carray.core.storage import absolute, aws_environment, delete, join, write_json
from carray.predictions.build import ShardScorer
from carray.predictions.format import PREDICTION_SCHEMA, VERSION, ClassifySettings, record_place, run_id_of
from carray.predictions.ledger import (
    RunRecord,
    check_folder,
    count_rows,
    done_shards,
    forget_attempts,
    read_run,
    write_run,
)
from carray.predictions.listing import list_images, write_shards

__all__ = ["classify"]

RESTARTS = 100
"""Deaths of one worker that Ray mends: two for each of 50 deadly images; a worker that cannot even start then ends the job."""


def classify(
    bundle: str, source: str, *, out: str, settings: ClassifySettings = ClassifySettings()
) -> dict[str, Any]:
    """Score every image of `source` into Parquet files in `out`, or what is missing of them; gives the run's counts.

    Raises:
        BundleError: the bundle is damaged, unfinished, or computes other logits on a worker.
        SettingsError: no image, another run in `out`, or a runtime or split that does not exist.
        SchemaError: a table of images cannot be read as one.
        StorageError: storage refused, or rows out are not images in.
        BudgetError: a shard lost its worker again and again.
    """
    started = time.monotonic()
    bundle, source, out = absolute(bundle), absolute(source), absolute(out)
    info = open_bundle(bundle)
    wanted = _describe_run(info, bundle, source, settings)
    check_folder(out, wanted)
    run = read_run(out) or _plan(out, wanted, settings, info)
    todo = _unfinished(out, run, settings)
    scored = _score_shards(bundle, out, run, settings, todo) if todo else 0
    if not todo:
        say(f"classify: nothing to do, all {run.images:,} images of {out} are scored")
    return _finish(out, run, scored, time.monotonic() - started)


def _describe_run(info: BundleInfo, bundle: str, source: str, settings: ClassifySettings) -> RunRecord:
    runtime = resolve_runtime(settings.runtime, info)
    columns = PREDICTION_SCHEMA.names
    seen = {"uri": source, "split": settings.split, "all_files": settings.all_files}
    return RunRecord(
        version=VERSION,
        run_id=run_id_of(info.bundle_id, pixels=info.pixels, runtime=runtime, columns=columns, source=seen),
        bundle_id=info.bundle_id,
        bundle=bundle,
        source=source,
        split=settings.split,
        all_files=settings.all_files,
        runtime=runtime,
        columns=columns,
        images=0,
        repeated=0,
        skipped_by_suffix={},
        shards=0,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software={name: importlib.metadata.version(name) for name in ("ray", "onnxruntime", "numpy", "pyarrow")},
    )


def _plan(out: str, wanted: RunRecord, settings: ClassifySettings, info: BundleInfo) -> RunRecord:
    if settings.all_files and join(out, "").startswith(join(wanted.source, "")):
        raise SettingsError(f"{out} lies in {wanted.source}, whose every file is to be scored; give a folder outside it.")
    listing = list_images(wanted.source, settings, uses_boxes=info.uses_boxes)
    shards, images = write_shards(listing, settings, out)
    if info.uses_boxes and not listing.boxes:
        say("classify: the bundle was trained on images cut to boxes, but there are no boxes here; expect lower accuracy")
    run = wanted.model_copy(
        update={
            "images": images,
            "shards": shards,
            "repeated": listing.repeated,
            "skipped_by_suffix": dict(listing.skipped.most_common()),
        }
    )
    write_run(out, run)
    return run


def _unfinished(out: str, run: RunRecord, settings: ClassifySettings) -> list[dict[str, Any]]:
    done = done_shards(out, run.shards)
    todo = [{"shard": shard, "retry": False} for shard in range(run.shards) if shard not in done]
    if settings.retry_failed:
        todo += [{"shard": entry.shard, "retry": True} for entry in done.values() if entry.fetch_errors]
    if todo and done:
        say(f"classify: {run.shards - len(done):,} of {run.shards:,} shards are missing, {len(todo):,} to do")
    return todo


def _score_shards(
    bundle: str, out: str, run: RunRecord, settings: ClassifySettings, todo: list[dict[str, Any]]
) -> int:
    delete(record_place(out, "done.json"))
    with start_ray() as running:
        workers, cpus = _size_workers(running, settings, len(todo))
        say(f"classify: {len(todo):,} shards on {workers} workers with {cpus} CPUs each, runtime {run.runtime}")
        job = {
            "bundle": bundle,
            "out": out,
            "run": run.model_dump(),
            "settings": settings.model_copy(update={"threads": cpus}).model_dump(),
            # Workers of our own private Ray are this user's processes; a cluster has credentials of its own.
            "environment": dict(aws_environment()) if running.private else {},
        }
        total = run.images if len(todo) == run.shards else None
        with _plain_errors(out), Progress("classify", total=total) as progress:
            for entry in _run_shards(job, todo, workers=workers, cpus=cpus):
                progress.advance(entry["rows"], errors=entry["fetch_errors"] + entry["decode_errors"])
            return progress.done


def _size_workers(running: RunningRay, settings: ClassifySettings, shards: int) -> tuple[int, int]:
    """Give the number of workers and the CPUs of each: never more than a node has, or Ray would wait for ever."""
    cpus = min(settings.threads, max(running.node_cpus, 1))
    workers = settings.workers or max(1, running.cpus // cpus)
    return min(workers, shards), cpus


def _run_shards(job: dict[str, Any], todo: list[dict[str, Any]], *, workers: int, cpus: int) -> Iterator[dict[str, Any]]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    shards = ray.data.from_items(todo, override_num_blocks=len(todo))
    counts = shards.map(
        _Worker,
        fn_constructor_kwargs={"job": job},
        # One shard at a time in a worker's hand: the next one goes to whoever is free first.
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        max_restarts=RESTARTS,
        max_task_retries=-1,
    )
    yield from counts.iter_rows()


class _Worker:
    """Is one scoring process; opens the bundle with its first shard, so that a refusal is that shard's error."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.update(job["environment"])
        self._job = job
        self._scorer: ShardScorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._scorer is None:
            self._scorer = ShardScorer(
                self._job["bundle"],
                out=self._job["out"],
                run=RunRecord.model_validate(self._job["run"]),
                settings=ClassifySettings.model_validate(self._job["settings"]),
            )
        entry = self._scorer.score_shard(int(row["shard"]), retry_failed=bool(row["retry"]))
        return entry.model_dump(exclude={"error_codes"})


@contextmanager
def _plain_errors(out: str) -> Iterator[None]:
    """Raise a worker's error as it was raised there, without Ray's layers around it."""
    try:
        yield
    except BaseException as err:
        forget_attempts(out)  # the workers are being stopped: no image is to blame for that
        cause = _cause(err)
        if cause is not None:
            raise cause from None
        raise


def _cause(err: BaseException | None) -> CarrayError | None:
    while err is not None:
        if isinstance(err, CarrayError):
            return err
        err = getattr(err, "cause", None) or err.__cause__
    return None


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

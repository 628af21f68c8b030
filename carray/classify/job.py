"""Classifies a source: the whole job, from a folder, bucket or table to a folder of predictions.

Rows out are images in, counted in the ledger and in the files; the same call again resumes; a worker that dies costs at
most the shards it had in hand; one driver at a time (lease). Scoring begins while the listing goes on: in rounds, each
over what was listed when it began, so that there are few. Its processes are those of an engine: local or Ray's
(engine). Cost: see results/classify.csv.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from typing import Any

from carray.bundle.bundle_folder import BundleInfo, open_bundle
from carray.bundle.runtimes import uses_gpus
from carray.classify.attempts import forget_attempts
from carray.classify.engine import SHARDS_IN_HAND, Engine, Pool, Shards, size_pool
from carray.classify.ledger import (
    LedgerEntry,
    RunRecord,
    check_folder,
    count_rows,
    read_run,
    recover_ledger,
)
from carray.classify.local import start_local, visible_gpus
from carray.classify.plan import Plan, describe_run, open_plan
from carray.classify.predictions_folder import ClassifySettings, record_place
from carray.classify.since import EarlierRun
from carray.core.errors import BudgetError, SettingsError, StorageError
from carray.core.exit_lines import advise, stopping_in_order
from carray.core.limits import MOST_WORKERS
from carray.core.progress import Progress, breaking_silence, say
from carray.core.ray.metrics import Meter
from carray.core.ray.resources import is_cluster
from carray.core.store.files import absolute, delete, delete_unfinished, write_json
from carray.core.store.lease import Lease, hold_run

__all__ = ["FailureWatch", "classify"]

_STOPPED = "finished shards stay, and the same command resumes."
_FIRST_ROUND_SECONDS = 3.0
"""How long the first round waits for the listing, that it may give every worker something to do."""
_MEASURED_FROM_IMAGES = 20_000
"""From so many images on the runtimes are measured before one is chosen, which takes two to four seconds."""


def classify(bundle: str, source: str, *, out: str, settings: ClassifySettings | None = None) -> dict[str, Any]:
    """Score every image of `source` into Parquet files in `out`, or what is missing of them; gives the run's counts.

    Raises:
        BundleError: the bundle is damaged, unfinished, or computes other logits on a worker.
        SettingsError: no image, another run in `out`, or a runtime, split or earlier run that does not exist.
        SchemaError: a table of images cannot be read as one.
        StorageError: storage refused, or rows out are not images in.
        BudgetError: a shard lost its worker again and again, too many images failed, or another driver has the run.
        ClusterError: machines of Ray, or processes of this one, were lost for good.
        StoppedError: Ctrl-C or SIGTERM.
    """
    started = time.monotonic()
    settings = settings or ClassifySettings()
    bundle, source, out = (absolute(uri).rstrip("/") or "/" for uri in (bundle, source, out))
    info = open_bundle(bundle)
    with ExitStack() as stack:
        # A private Ray starts only when there is something to score.
        engine = _open_engine(settings, stack)
        pinned = _pinned(out, info, settings)
        device = _device(pinned, engine)
        here = engine is None or engine.resources.private

        def describe(measured: Mapping[str, float] | None = None) -> RunRecord:
            return describe_run(info, bundle, source, pinned, device=device, here=here, measured=measured)

        wanted = describe()
        check_folder(out, wanted)
        if wanted.since is not None:
            EarlierRun(wanted.since, wanted.bundle_id)  # refuses what is none before anything is listed
        lease = stack.enter_context(hold_run(out, record_place(out, "driver.json"), what="classify"))
        workers = settings.workers or (engine.resources.cpus if engine else os.cpu_count() or 1)
        rivals = list(wanted.images_per_second)
        hold = len(rivals) > 1 and read_run(out) is None
        plan = stack.enter_context(
            open_plan(out, wanted, settings, uses_boxes=info.uses_boxes, workers=workers, hold=hold)
        )
        job = _Job(bundle, out, plan.run, settings, device, lease, plan)
        if job.is_done():
            say(f"classify: nothing to do, all {plan.images:,} images of {out} are scored")
        else:
            # Left after a private Ray, whose workers write no more then.
            stack.enter_context(_blameless(out, lease.token))
            began = time.monotonic()
            engine = engine or stack.enter_context(_ray_engine(settings))
            ready = time.monotonic()
            if hold:
                job.choose_runtime(engine, rivals, describe)
            job.score(engine, ray_seconds=ready - began)
        return job.finish(started)


def _open_engine(settings: ClassifySettings, stack: ExitStack) -> Engine | None:
    """Open the engine that the settings name; None for a private Ray, which is yet to be started."""
    if settings.engine == "local" or (settings.engine == "auto" and not is_cluster()):
        return stack.enter_context(start_local())
    # Only a cluster knows whether it has GPUs.
    return stack.enter_context(_ray_engine(settings)) if is_cluster() else None


def _ray_engine(settings: ClassifySettings) -> AbstractContextManager[Engine]:
    from carray.classify.worker_on_ray import start_on_ray

    return start_on_ray({"CPU": 1.0, "GPU": float(settings.device == "cuda")})


def _device(settings: ClassifySettings, engine: Engine | None) -> str:
    if settings.device != "auto":
        return settings.device
    gpus = engine.resources.gpus if engine else len(visible_gpus())
    if not gpus:
        return "cpu"
    if not uses_gpus(settings.runtime):
        say(
            f"classify: CPUs score, not the {gpus} GPUs: runtime {settings.runtime} needs onnxruntime's CUDA provider "
            "for them, or name torch-bf16, which was never measured on a GPU"
        )
        return "cpu"
    return "cuda"


def _pinned(out: str, info: BundleInfo, settings: ClassifySettings) -> ClassifySettings:
    """Keep the runtime that a run was begun with, where `auto` might now choose another."""
    run = read_run(out)
    if run is None or settings.runtime != "auto" or run.bundle_id != info.bundle_id:
        return settings
    return settings.model_copy(update={"runtime": run.runtime})


class _Job:
    """A run that this driver scores."""

    def __init__(
        self,
        bundle: str,
        out: str,
        run: RunRecord,
        settings: ClassifySettings,
        device: str,
        lease: Lease,
        plan: Plan,
    ) -> None:
        self._bundle, self._out, self._run, self._settings = bundle, out, run, settings
        self._device, self._lease, self._plan = device, lease, plan
        self._watch = FailureWatch(settings.max_failed_fraction)
        done = recover_ledger(out, plan.shards)
        self._begun = set(done)
        self._retries = [entry for entry in done.values() if settings.retry_failed and entry.fetch_errors]
        self._again = {entry.shard for entry in self._retries}
        self._done_rows = sum(entry.rows + entry.known for entry in done.values())
        self._done_rows -= sum(entry.fetch_errors for entry in self._retries)
        for entry in done.values():
            if entry.shard not in self._again:
                self._watch.see(entry)
        self._scored, self._finished, self._peak_bytes = 0, len(done), 0
        self._engine: str | None = None
        self._ray_seconds = self._engine_ready = self._first = 0.0

    def is_done(self) -> bool:
        """Say whether every image has its row, and none is to be tried again."""
        return self._plan.complete and len(self._begun) == self._plan.shards and not self._retries

    def choose_runtime(
        self, engine: Engine, rivals: list[str], describe: Callable[[Mapping[str, float]], RunRecord]
    ) -> None:
        """Choose among certified runtimes by what a machine of this engine does, if the job is long enough for that.

        The listing goes on meanwhile; its first shard is written after the choice.
        """
        rates: dict[str, float] = {}
        with stopping_in_order(_STOPPED):
            if self._plan.is_long(_MEASURED_FROM_IMAGES, _FIRST_ROUND_SECONDS):
                rates = engine.measure(self._bundle, rivals)
        if rates:
            self._run = describe(rates)
            seen = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
            say(f"runtime: auto takes {self._run.runtime}, by images a second of one core measured here: {seen}")
        self._plan.settle(self._run)

    def score(self, engine: Engine, *, ray_seconds: float) -> None:
        """Score what is missing, in rounds, until the listing has ended and all of it is scored."""
        self._engine, self._ray_seconds, self._engine_ready = engine.name, ray_seconds, time.monotonic()
        delete(record_place(self._out, "done.json"))
        self._meter = Meter(self._out, private=engine.resources.private)
        if self._begun:
            left = len([1 for shard in range(self._plan.shards) if shard not in self._begun])
            say(f"classify: {len(self._begun):,} shards are done already, {left:,} of those listed so far are left")
        self._advise()
        try:
            with (
                stopping_in_order(_STOPPED),
                Progress("classify", total=None) as progress,
                breaking_silence(lambda: f"no shard has come back; {engine.usage()}") as hear,
            ):
                self._wait_for_some(engine)
                while todo := self._next_round():
                    with closing(self._round(engine, todo)) as entries:
                        for entry in entries:
                            hear()
                            self._take(entry, progress)
        finally:
            if engine.resources.private:  # no worker is left that writes; the listing and the lease write elsewhere
                for folder in (self._out, *(record_place(self._out, name) for name in ("ledger", "attempts"))):
                    delete_unfinished(folder)

    def finish(self, started: float) -> dict[str, Any]:
        """Check the books, and write that the run is complete."""
        totals = self._plan.totals()
        counts = count_rows(self._out, totals)
        seconds = time.monotonic() - started
        outcome = {
            "run_id": self._run.run_id,
            "bundle_id": self._run.bundle_id,
            "runtime": self._run.runtime,
            "engine": self._engine,
            "images": totals.images,
            **{name: counts[name] for name in ("rows", "ok", "fetch_errors", "decode_errors", "known")},
            "repeated": totals.repeated,
            "skipped_by_suffix": totals.skipped_by_suffix,
            "seconds": round(seconds, 3),
            "images_per_second": round(self._scored / seconds, 2),
            "ray_seconds": round(self._ray_seconds, 3),
            "first_seconds": round(self._first - self._engine_ready, 3) if self._first else None,
            "out": self._out,
        }
        self._lease.check()
        forget_attempts(self._out)  # all that is there now is what a worker left half-written when it was killed
        write_json(record_place(self._out, "done.json"), outcome)
        self._watch.check(finished=True)
        return outcome

    def _take(self, entry: LedgerEntry, progress: Progress) -> None:
        self._lease.check()
        self._first = self._first or time.monotonic()
        self._scored += entry.scored
        self._finished += entry.shard not in self._again
        self._advise()
        self._peak_bytes = max(self._peak_bytes, entry.worker_peak_bytes)
        _count(self._meter, entry)
        self._meter.record("carray_classify_worker_peak_memory_bytes", self._peak_bytes)
        self._meter.record("carray_classify_shards_finished", self._finished)
        self._meter.record("carray_classify_shards_listed", self._plan.shards)
        progress.total = self._plan.images - self._done_rows if self._plan.complete else None
        progress.advance(entry.scored, errors=entry.fetch_errors + entry.decode_errors)
        self._watch.see(entry)
        self._watch.check()

    def _advise(self) -> None:
        """Keep at hand what is to be said, should this job end now; nothing as long as nothing is listed."""
        if not self._plan.shards:
            return
        known = f"{self._plan.shards:,}" + ("" if self._plan.complete else " listed so far")
        advise(
            f"{self._finished:,} shards are finished and stay, of {known}; to go on, run the same command again; "
            f"OUT={self._out}"
        )

    def _wait_for_some(self, engine: Engine) -> None:
        """Wait until the first round has something for every worker to do; meanwhile the workers start."""
        until = time.monotonic() + _FIRST_ROUND_SECONDS
        pool = self._pool(engine, MOST_WORKERS)
        engine.prepare(self._worker_job(pool), pool)
        enough = pool.workers * SHARDS_IN_HAND
        while not self._plan.complete and self._plan.shards < enough and time.monotonic() < until:
            self._plan.wait(self._plan.shards, timeout_seconds=0.1)

    def _next_round(self) -> Shards:
        """Give the shards that were listed and not begun, as soon as there are any; none when all are done."""
        retries = [{"shard": entry.shard, "retry": True} for entry in self._retries]
        self._retries = []
        while True:
            complete, shards = self._plan.complete, self._plan.shards
            todo = [shard for shard in range(shards) if shard not in self._begun]
            if todo or retries or complete:
                self._begun.update(todo)
                return [{"shard": shard, "retry": False} for shard in todo] + retries
            self._plan.wait(shards)

    def _round(self, engine: Engine, todo: Shards) -> Generator[LedgerEntry]:
        self._advise()
        pool = self._pool(engine, len(todo))
        say(f"classify: {len(todo):,} shards, {pool}, engine {engine.name}, runtime {self._run.runtime}")
        return engine.run_shards(self._worker_job(pool), todo, pool)

    def _pool(self, engine: Engine, shards: int) -> Pool:
        return size_pool(engine.resources, self._settings, shards=shards, device=self._device)

    def _worker_job(self, pool: Pool) -> dict[str, Any]:
        settings = self._settings.model_copy(update={"threads": pool.cpus, "device": self._device})
        return {
            "bundle": self._bundle,
            "out": self._out,
            "run": self._run.model_dump(mode="json"),
            "settings": settings.model_dump(mode="json"),
            "driver": self._lease.token,
        }


FEWEST_IMAGES = 200
"""Below so many rows a fraction says too little to stop for."""
_KINDS_SHOWN = 3


class FailureWatch:
    """Adds up failures, and stops the job once their fraction passes the limit; without a limit it only counts."""

    def __init__(self, max_failed_fraction: float | None) -> None:
        self._limit = max_failed_fraction
        self._rows = 0
        self._codes: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def see(self, entry: LedgerEntry) -> None:
        """Count one finished shard."""
        self._rows += entry.rows
        self._codes.update(entry.error_codes)
        for code, uri in entry.examples.items():
            self._examples.setdefault(code, uri)

    def check(self, *, finished: bool = False) -> None:
        """Compare with the limit, as soon as there are rows enough to judge by, or when all are there.

        Raises:
            BudgetError: more failed than is allowed.
        """
        failed = self._codes.total()
        if self._limit is None or not failed or failed <= self._limit * self._rows:
            return
        if self._rows >= FEWEST_IMAGES or finished:
            raise BudgetError(
                f"{failed:,} of {self._rows:,} images failed ({failed / self._rows:.1%}, at most {self._limit:.1%} is "
                f"allowed by max_failed_fraction): {self._kinds()}; mend the input or allow more, and run the command "
                "again: what is scored stays."
            )

    def _kinds(self) -> str:
        kinds = [
            f"{code} {count:,} (as {self._examples[code]!r})" if code in self._examples else f"{code} {count:,}"
            for code, count in self._codes.most_common(_KINDS_SHOWN)
        ]
        return ", ".join(kinds)


def _count(meter: Meter, entry: LedgerEntry) -> None:
    """Count one finished shard; one that is tried again counts again."""
    statuses = {"ok": entry.ok, "fetch_error": entry.fetch_errors, "decode_error": entry.decode_errors}
    for status, images in {**statuses, "known": entry.known}.items():
        meter.record("carray_classify_images_total", images, status=status)
    for code, images in entry.error_codes.items():
        meter.record("carray_classify_failures_total", images, code=code)
    meter.record("carray_classify_read_bytes_total", entry.read_bytes)
    meter.record("carray_classify_shard_seconds", max(entry.seconds, 1e-3))


@contextmanager
def _blameless(out: str, driver: str) -> Iterator[None]:
    """Take the workers' notes away when the job is stopped: no image is to blame for that."""
    try:
        yield
    except BaseException:
        with suppress(StorageError, SettingsError):  # what stopped the job says more
            forget_attempts(out, driver=driver)
        raise

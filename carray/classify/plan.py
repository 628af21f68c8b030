"""Plans a run: lists its source and cuts shards, in the background, so that scoring begins before the listing ends.

From: what run is wanted. To: a `Plan`, whose shards can be read as they come; `run.json` before the first of them,
`listing.json` after the last: the listing is complete exactly when that exists.
Invariants: an interrupted listing goes on with what no shard covers, and shards that are there stay as they are, since
workers may have scored them. A source that turns out to hold nothing leaves nothing behind.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.runtimes import certified_rates, resolve_runtime
from carray.classify.ledger import PlanTotals, RunRecord, read_run, read_totals, write_run, write_totals
from carray.classify.predictions_folder import VERSION, ClassifySettings, prediction_schema, record_place, run_id_of
from carray.classify.shards import ShardCutter, ShardNote, read_notes, uncovered
from carray.classify.sources import Source, open_source
from carray.core.errors import SettingsError
from carray.core.progress import Progress, say
from carray.core.store.files import absolute, exists, join, read_json, write_json
from carray.core.store.image_bytes import IMAGE_SUFFIXES
from carray.core.store.listing import Gap, Piece

__all__ = ["Plan", "describe_run", "open_plan", "plan_run"]

STOP_SECONDS = 10
"""How long a plan that is closed waits for requests under way."""


def describe_run(
    info: BundleInfo,
    bundle: str,
    source: str,
    settings: ClassifySettings,
    *,
    device: str = "cpu",
    here: bool = True,
    measured: Mapping[str, float] | None = None,
) -> RunRecord:
    """Say what run a command asks for, before anything is listed.

    Args:
        info: The bundle's description.
        bundle: Its place.
        source: What is to be scored.
        settings: The settings of the command.
        device: cpu or cuda.
        here: Whether this machine scores.
        measured: Rates by runtime, by which `auto` chooses in place of those in the bundle.

    Raises:
        SettingsError: the bundle has no such runtime, or this machine cannot run it.
    """
    rates, chosen_by = dict(measured or {}), "measured" if measured else ""
    runtime = max(rates, key=lambda name: rates[name]) if rates else settings.runtime
    if not rates:
        runtime = resolve_runtime(settings.runtime, info, device=device, here=here)
        if settings.runtime == "auto" and device == "cpu":
            rates, chosen_by = certified_rates(info, here=here), "packed"
    columns = prediction_schema(settings.outputs).names
    seen: dict[str, Any] = {"uri": source, "split": settings.split, "all_files": settings.all_files}
    since = absolute(settings.since).rstrip("/") if settings.since else None
    seen |= {"since": since} if since else {}
    seen |= {"column": settings.column} if settings.column else {}
    # Only where there is one, so that the ids of runs begun before there were thresholds stay as they are.
    seen |= {"accept_threshold": info.accept_threshold} if info.accept_threshold is not None else {}
    return RunRecord(
        version=VERSION,
        run_id=run_id_of(info.bundle_id, pixels=info.pixels, runtime=runtime, columns=columns, source=seen),
        bundle_id=info.bundle_id,
        bundle=bundle,
        source=source,
        split=settings.split,
        column={str(what): name for what, name in settings.column.items()},
        all_files=settings.all_files,
        since=since,
        runtime=runtime,
        chosen_by=chosen_by,
        images_per_second=rates,
        accept_threshold=info.accept_threshold,
        columns=columns,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        software={name: importlib.metadata.version(name) for name in ("ray", "onnxruntime", "numpy", "pyarrow")},
    )


def plan_run(
    out: str, wanted: RunRecord, settings: ClassifySettings, *, uses_boxes: bool
) -> tuple[RunRecord, PlanTotals]:
    """List a run's images to the end, or find that this is done.

    Raises:
        SettingsError: there is no image, a split of something that has none, `out` among the files to be scored, or a
            table that changed since its listing was interrupted.
        SchemaError: a table of images cannot be read as one.
        StorageError: the listing or a write failed.
    """
    with open_plan(out, wanted, settings, uses_boxes=uses_boxes) as plan:
        return plan.run, plan.totals()


@contextmanager
def open_plan(
    out: str, wanted: RunRecord, settings: ClassifySettings, *, uses_boxes: bool, workers: int = 1, hold: bool = False
) -> Iterator[Plan]:
    """Begin a run's listing, go on with it, or find it complete; leaving the context stops it.

    The more `workers` are expected to score at once, the smaller are the shards that are still to be cut. With `hold`
    what is listed is kept in memory, and nothing written, until `Plan.settle`.

    Raises:
        SettingsError: a split of something that has none, `out` among the files to be scored, or an interrupted
            listing that cannot be gone on with.
        StorageError: the run's folder cannot be read.
    """
    run, totals = read_run(out), read_totals(out)
    if run is not None and totals is not None:
        yield Plan(out, run, settings, totals)
        return
    if settings.all_files and join(out, "").startswith(join(wanted.source, "")):
        raise SettingsError(
            f"{out} lies in {wanted.source}, whose every file is to be scored; give a folder outside it."
        )
    source = open_source(wanted.source, settings, uses_boxes=uses_boxes)
    notes = read_notes(out) if run is not None else {}
    _check_resumable(out, source, notes)
    plan = Plan(out, run or wanted, settings, None)
    if not hold:
        plan.settle(plan.run)
    plan.start(source, notes, uses_boxes=uses_boxes, workers=workers)
    try:
        yield plan
    finally:
        plan.close()


def _check_resumable(out: str, source: Source, notes: dict[int, ShardNote]) -> None:
    if not notes:
        return
    uri = record_place(out, "source.json")
    before = read_json(uri) if exists(uri) else None
    if before != source.mark:
        raise SettingsError(
            f"{source.uri} has changed since its listing into {out} was interrupted ({source.mark} instead of "
            f"{before}); put the old one back or give another folder."
        )
    if not all(note.ordered for note in notes.values()):
        raise SettingsError(
            f"{source.uri} lists its keys in no order, so its interrupted listing into {out} cannot be gone on with; "
            "give another folder."
        )


class Plan:
    """A run's list of shards, which grows until the listing ends."""

    def __init__(self, out: str, run: RunRecord, settings: ClassifySettings, totals: PlanTotals | None) -> None:
        self.run = run
        self._out, self._settings, self._totals = out, settings, totals
        self._change = threading.Condition()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._cutter: ShardCutter | None = None
        self._settled = threading.Event()
        self._holding = threading.Lock()
        self._held: list[Piece] = []
        self._listed, self._all_listed = 0, False

    @property
    def complete(self) -> bool:
        """Say whether the listing has ended, with every shard written."""
        return self._totals is not None

    @property
    def shards(self) -> int:
        """Give the number of shards that can be read: 0 and up."""
        return self._totals.shards if self._totals else self._cutter.shards if self._cutter else 0

    @property
    def images(self) -> int:
        """Give the number of images in the shards that are cut."""
        return self._totals.images if self._totals else self._cutter.cut_images if self._cutter else 0

    def wait(self, shards: int, timeout_seconds: float | None = None) -> bool:
        """Wait until there are more than `shards` shards or the listing has ended; says whether that came in time.

        Raises:
            CarrayError: what ended the listing before its time.
        """
        with self._change:
            came = self._change.wait_for(
                lambda: self._error is not None or self.complete or self.shards > shards, timeout_seconds
            )
        if self._error is not None:
            raise self._error
        return came

    def is_long(self, images: int, timeout_seconds: float) -> bool:
        """Wait until it is known whether the listing finds so many images; one that takes so long counts as long.

        Raises:
            CarrayError: what ended the listing before its time.
        """
        with self._change:
            self._change.wait_for(
                lambda: self._error is not None or self._all_listed or self._listed >= images, timeout_seconds
            )
        if self._error is not None:
            raise self._error
        return self._listed >= images or not self._all_listed

    def settle(self, run: RunRecord) -> None:
        """Say what run this is, so that what was held can be written."""
        self.run = run
        self._settled.set()

    def totals(self) -> PlanTotals:
        """Wait for the end of the listing, and give what it found.

        Raises:
            CarrayError: what ended the listing before its time.
        """
        while self._totals is None:
            self.wait(self.shards)
        return self._totals

    def start(self, source: Source, notes: dict[int, ShardNote], *, uses_boxes: bool, workers: int) -> None:
        """Begin or go on listing, in a thread of its own."""

        def begin() -> None:
            if source.mark is not None:
                write_json(record_place(self._out, "source.json"), source.mark)
            write_run(self._out, self.run)

        by_suffix = source.by_suffix
        self._cutter = ShardCutter(
            self._out, self._settings, by_suffix=by_suffix, notes=notes, begin=begin, workers=workers
        )
        arguments = (source, self._cutter, uncovered(notes.values()), uses_boxes)
        self._thread = threading.Thread(target=self._list, args=arguments, name="listing", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listing, if it has not ended."""
        self._stop.set()
        self._settled.set()
        if self._thread is not None:
            self._thread.join(timeout=STOP_SECONDS)

    def _list(self, source: Source, cutter: ShardCutter, gaps: list[Gap], uses_boxes: bool) -> None:
        def take(piece: Piece) -> None:
            if not self._stop.is_set() and self._may_cut(cutter, piece):
                cutter.take(piece)
            with self._change:
                progress.advance(piece.batch.num_rows)
                self._listed += piece.batch.num_rows
                self._change.notify_all()

        try:
            with Progress("listing", total=None, unit="keys") as progress:
                source.list(take, gaps=gaps, threads=self._settings.listing_threads, stop=self._stop)
                with self._change:
                    self._all_listed = True
                    self._change.notify_all()
                self._settled.wait()
                if self._stop.is_set():
                    return
                self._may_cut(cutter, None)
                cutter.finish()
            self._complete(source, cutter, uses_boxes=uses_boxes)
        except BaseException as err:
            self._error = err
        with self._change:
            self._change.notify_all()

    def _may_cut(self, cutter: ShardCutter, piece: Piece | None) -> bool:
        """Keep a piece until the run is settled; from then on cut what was kept, in its order, before anything else."""
        with self._holding:
            if piece is not None and not self._settled.is_set():
                self._held.append(piece)
                return False
            while self._held:
                cutter.take(self._held.pop(0))
        return True

    def _complete(self, source: Source, cutter: ShardCutter, *, uses_boxes: bool) -> None:
        if not cutter.cut_images:
            raise SettingsError(_nothing(source.uri, cutter, self._settings.split))
        totals = PlanTotals(
            images=cutter.cut_images,
            shards=cutter.shards,
            repeated=source.repeated,
            skipped_by_suffix=dict(cutter.skipped.most_common()),
        )
        write_totals(self._out, totals)
        if uses_boxes and not source.boxes:
            say("classify: the bundle was trained on images cut to boxes, but here are no boxes; expect lower accuracy")
        self._totals = totals


def _nothing(source: str, cutter: ShardCutter, split: str | None) -> str:
    of_split = f" in split {split!r}" if split else ""
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in cutter.skipped.most_common(5))
    seen = f"{cutter.skipped.total()} other files ({skipped})" if skipped else "nothing"
    return (
        f"{source} has no image to score{of_split}, but {seen}; images end in {', '.join(IMAGE_SUFFIXES)}, and "
        "all_files takes every file."
    )

"""Scores one shard: keys in, one Parquet file out, one row an image, whatever becomes of it.

From: a bundle, and a shard's keys. To: its Parquet file, then its ledger entry.
Invariants: an image that was in hand alone when its worker died is a row of code worker_lost; a shard that lost a
worker before is scored with no other beside it, so that the next death has one cause; a worker that was given up, and
whose shard went to another (attempts), writes nothing of it any more. Imports no Ray and no torch.
Cost: see results/classify.csv.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from carray.bundle.scorer import Scorer, score_columns
from carray.classify.attempts import (
    Attempt,
    Overtaken,
    check_turn,
    forget_attempt,
    read_attempt,
    write_attempt,
)
from carray.classify.ledger import LedgerEntry, RunRecord, enter_shard, read_entry, strike_shard
from carray.classify.predictions_folder import (
    KIND,
    VERSION,
    ClassifySettings,
    PlannedImage,
    part_name,
    prediction_schema,
)
from carray.classify.read_images import LOST, Arrival, ImageReader, read_ahead
from carray.classify.rows import ShardRows
from carray.classify.shards import read_shard
from carray.classify.since import EarlierRun
from carray.classify.turns import Turns
from carray.core.errors import BundleError, StorageError
from carray.core.store.files import join
from carray.core.tables import read_table, table_metadata, write_table
from carray.images.pixels import PixelSettings
from carray.images.read import ReadImage
from carray.images.vehicles import vehicle_columns

__all__ = ["ShardScorer"]

_OTHERS_SECONDS = 600
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


class ShardScorer:
    """Scores shards of one run; several threads may each score one, so that no read waits for a shard's end.

    The bundle is opened with the first shard, whose error it is if this machine cannot use it.
    """

    def __init__(
        self,
        bundle: str,
        *,
        out: str,
        run: RunRecord,
        settings: ClassifySettings,
        driver: str = "",
        machine: str = "",
        is_lost: Callable[[str], bool] = lambda machine: False,
        new_reader: Callable[[ClassifySettings, PixelSettings], ImageReader] = ImageReader,
    ) -> None:
        """Prepare to score.

        Args:
            bundle: Its URI.
            out: The run's folder.
            run: What the run is.
            settings: How to score.
            driver: Token of the driver that this worker is of (lease.Lease).
            machine: On which this worker runs.
            is_lost: Says whether a machine was lost, with every process on it.
            new_reader: What reads and decodes.
        """
        self._bundle, self._out, self._run, self._settings, self._driver = bundle, out, run, settings, driver
        self._machine, self._is_lost = machine, is_lost
        self._new_reader = new_reader
        self._schema = prediction_schema(settings.outputs)
        self._opening, self._turns = threading.Lock(), Turns()
        # Decoding and scoring take turns: side by side they would drive each other out of the core's caches.
        self._computing = threading.Lock()
        self._threads = settings.threads or 1
        self._decoders = ThreadPoolExecutor(self._threads) if self._threads > 1 else None
        self._scorer: Any = None
        self._reader: Any = None
        self._earlier: EarlierRun | None = None

    def score_shard(self, shard: int, *, retry_failed: bool = False) -> LedgerEntry:
        """Write a shard's Parquet file and ledger entry; with `retry_failed`, only rows of status fetch_error anew.

        Raises:
            BundleError: the bundle is damaged, computes other logits here, or is not the run's.
            StorageError: the keys cannot be read or the rows not be written.
            BudgetError: the shard has lost its worker too often.
        """
        note = self._begin(shard)
        try:
            return self._score_mine(note, retry_failed=retry_failed)
        except Overtaken:
            return self._await(shard)
        finally:
            forget_attempt(self._out, note)

    def _score_mine(self, note: Attempt, *, retry_failed: bool) -> LedgerEntry:
        started, shard = time.monotonic(), note.shard
        images = read_shard(self._out, shard)
        check = partial(check_turn, self._out, note, rewrites=retry_failed)
        with self._turns.take(alone=bool(note.suspects)):
            self._open()
            rows = ShardRows(self._schema)
            known = self._keep(shard, images, rows) if retry_failed else self._known(images)
            lost = set(note.lost) - rows.places - known
            rows.update({place: self._row(images[place], LOST) for place in lost})
            todo = [place for place in range(len(images)) if place not in rows.places and place not in known]
            kept_bytes = rows.size_bytes
            self._score_images(images, todo, note, rows, check)
            entry = _entry(shard, rows, known, scored=len(todo), kept_bytes=kept_bytes, started=started)
            self._write(entry, rows, known, check, rewrite=retry_failed)
        return entry

    def _await(self, shard: int) -> LedgerEntry:
        """Give the entry of a shard that another worker has taken over, once that one has finished it."""
        until = time.monotonic() + _OTHERS_SECONDS
        while time.monotonic() < until:
            if (entry := read_entry(self._out, shard)) is not None:
                return entry
            time.sleep(1)
        raise StorageError(
            f"{part_name(shard)} was taken over by another worker, which did not finish it; run the command again."
        )

    def _open(self) -> None:
        with self._opening:
            if self._scorer is not None:
                return
            device = "cuda" if self._settings.device == "cuda" else "cpu"
            scorer = Scorer(self._bundle, runtime=self._run.runtime, threads=self._threads, device=device)
            if scorer.info.bundle_id != self._run.bundle_id:
                raise BundleError(
                    f"{self._bundle} is now bundle {scorer.info.bundle_id}, but the run was begun with "
                    f"{self._run.bundle_id}; put that one back or start a run in another folder."
                )
            if scorer.info.accept_threshold != self._run.accept_threshold:
                raise BundleError(
                    f"{self._bundle} now accepts labels from a score of {scorer.info.accept_threshold}, but the run "
                    f"was begun with {self._run.accept_threshold}; set that again or start a run in another folder."
                )
            if self._run.since is not None:
                self._earlier = EarlierRun(self._run.since, self._run.bundle_id)
            self._reader = self._new_reader(self._settings, scorer.info.pixels)
            self._scorer = scorer

    def _begin(self, shard: int) -> Attempt:
        before = read_attempt(self._out, shard)
        note = Attempt(shard=shard, pid=0, images=[])
        if before is not None:
            note = before.after_death(self._driver, machine_lost=self._is_lost(before.machine))
        note = note.model_copy(update={"pid": os.getpid(), "machine": self._machine, "driver": self._driver})
        if before or self._scorer is None:  # opening the bundle may be what kills: that must be counted, too
            write_attempt(self._out, note)
        return note

    def _known(self, images: list[PlannedImage]) -> set[int]:
        return self._earlier.known(images) if self._earlier else set()

    def _keep(self, shard: int, images: list[PlannedImage], rows: ShardRows) -> set[int]:
        """Keep the rows that stay; gives the places that have none since an earlier run knows them."""
        uri = join(self._out, part_name(shard))
        known = {place for first, end in table_metadata(uri).get("known", []) for place in range(first, end)}
        before = read_table(uri, kind=KIND, required=self._run.columns).to_pylist()
        places = [place for place in range(len(images)) if place not in known]
        rows.update({place: row for place, row in zip(places, before, strict=True) if row["status"] != "fetch_error"})
        return known

    def _score_images(
        self, images: list[PlannedImage], todo: list[int], note: Attempt, rows: ShardRows, check: Callable[[], None]
    ) -> None:
        def keep(now: Attempt) -> None:
            check()
            write_attempt(self._out, now)

        batch: list[tuple[int, ReadImage]] = []
        size = self._settings.batch_images or self._scorer.batch_images
        with closing(read_ahead(self._reader, images, todo, note, keep, most=size)) as arrivals:
            for arrived in arrivals:
                with self._computing:
                    seen = self._finish(arrived)
                    rows.update({i: self._row(images[i], one) for i, one in seen if one.pixels_HWC is None})
                    batch += [(i, one) for i, one in seen if one.pixels_HWC is not None]
                    while len(batch) >= size:
                        rows.update(self._score(images, batch[:size]))
                        batch = batch[size:]
        if batch:
            with self._computing:
                rows.update(self._score(images, batch))

    def _finish(self, arrived: list[Arrival]) -> list[tuple[int, ReadImage]]:
        if self._decoders is None:
            return [(place, finish()) for place, finish in arrived]
        seen = self._decoders.map(lambda arrival: arrival[1](), arrived)
        return list(zip([place for place, _ in arrived], seen, strict=True))

    def _score(self, images: list[PlannedImage], batch: list[tuple[int, ReadImage]]) -> dict[int, dict[str, Any]]:
        pixels_BHWC = np.stack([one.pixels_HWC for _, one in batch if one.pixels_HWC is not None])
        logits_BK, embedding_BD = self._scorer.score(pixels_BHWC)
        outputs = self._settings.outputs
        columns = score_columns(logits_BK, self._scorer.info, embedding_BD=embedding_BD, outputs=outputs)
        columns |= vehicle_columns(columns["label"])
        return {
            index: self._row(images[index], one) | {name: values[i] for name, values in columns.items()}
            for i, (index, one) in enumerate(batch)
        }

    def _row(self, image: PlannedImage, read: ReadImage) -> dict[str, Any]:
        """Give an image's row, but for its scores."""
        run = self._run
        return {
            "uri": image.uri,
            **read.columns,
            "runtime": run.runtime,
            "run_id": run.run_id,
            "bundle_id": run.bundle_id,
            "scored_at": datetime.now(UTC),
        }

    def _write(
        self, entry: LedgerEntry, rows: ShardRows, known: set[int], check: Callable[[], None], *, rewrite: bool
    ) -> None:
        if rewrite:
            check()
            strike_shard(self._out, entry.shard)
        provenance: dict[str, Any] = {
            "run_id": self._run.run_id,
            "bundle_id": self._run.bundle_id,
            "shard": entry.shard,
        }
        provenance |= {"known": _ranges(sorted(known))} if known else {}
        place = join(self._out, part_name(entry.shard))
        write_table(rows.table(), place, kind=KIND, version=VERSION, provenance=provenance, check=check)
        enter_shard(self._out, entry, check)


def _ranges(places: Sequence[int]) -> list[list[int]]:
    """Pack sorted places into [first, end) pairs: what an earlier run knows comes in long stretches."""
    ranges: list[list[int]] = []
    for place in places:
        if ranges and ranges[-1][1] == place:
            ranges[-1][1] = place + 1
        else:
            ranges.append([place, place + 1])
    return ranges


def _entry(
    shard: int, rows: ShardRows, known: set[int], *, scored: int, kept_bytes: int, started: float
) -> LedgerEntry:
    return LedgerEntry(
        shard=shard,
        rows=len(rows.places),
        scored=scored,
        ok=rows.statuses["ok"],
        fetch_errors=rows.statuses["fetch_error"],
        decode_errors=rows.statuses["decode_error"],
        error_codes=dict(rows.error_codes.most_common()),
        examples=rows.examples,
        known=len(known),
        seconds=round(time.monotonic() - started, 3),
        read_bytes=rows.size_bytes - kept_bytes,
        worker_peak_bytes=_PEAK_UNIT * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )

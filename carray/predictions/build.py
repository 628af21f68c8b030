"""Scores one shard: keys in, one Parquet file out, one row an image, whatever becomes of it.

From: a bundle, and a shard's keys. To: its Parquet file, then its ledger entry.
Invariants: a failure to fetch or decode is a row; any other exception is a bug and stops the shard, with the image's
uri in its message; an image that was in hand alone when its worker died is a row too, of code worker_lost; at most two
windows of pixels are in memory, whatever the shard's length. Imports no Ray and no torch.
Cost: see `classify_*` in results/cars.csv.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.predict import Scorer, score_columns
from carray.core.errors import BundleError, CarrayError, DecodeError, FetchError
from carray.core.images import FetchedImage, fetch_image
from carray.core.storage import join
from carray.core.tables import read_table, table_from_rows, write_table
from carray.pixels import PixelSettings, decode, view
from carray.predictions.format import (
    KIND,
    PREDICTION_SCHEMA,
    VERSION,
    ClassifySettings,
    PlannedImage,
    part_name,
)
from carray.predictions.ledger import (
    Attempt,
    LedgerEntry,
    RunRecord,
    enter_shard,
    forget_attempt,
    read_attempt,
    strike_shard,
    write_attempt,
)
from carray.predictions.plan import read_shard
from carray.vehicles import vehicle_columns

__all__ = ["SeenImage", "ShardScorer", "decode_image"]

WINDOW_BATCHES = 4
"""Batches of one window: far enough ahead to keep every read under way, near enough to bound memory and suspects."""

LOST = DecodeError("worker_lost", "the worker process died each time it held this image")
_ERROR_LETTERS = 500


@dataclass(frozen=True, slots=True)
class SeenImage:
    """Is what became of one image: its row so far, and the network's input unless it failed."""

    row: dict[str, Any]
    pixels_HWC: npt.NDArray[np.uint8] | None
    """uint8, input_size x input_size x 3, RGB."""


def decode_image(fetched: FetchedImage, image: PlannedImage, settings: PixelSettings) -> SeenImage:
    """Turn an image's bytes into the network's input: `pixels.decode`, then `pixels.view`.

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    seen = decode(fetched.data, settings, box=image.box)
    row = {
        "uri": image.uri,
        "etag": fetched.etag,
        "size_bytes": len(fetched.data),
        "width": seen.width,
        "height": seen.height,
        "status": "ok",
        "phash": seen.phash,
    }
    return SeenImage(row, view(seen.pixels_HWC, settings))


class ShardScorer:
    """Scores shards of one run, one after another; one thread calls it, many work for it.

    The bundle is opened with the first shard, whose error it is if this machine cannot use it.
    """

    def __init__(self, bundle: str, *, out: str, run: RunRecord, settings: ClassifySettings) -> None:
        self._bundle, self._out, self._run, self._settings = bundle, out, run, settings
        self._scorer: Any = None
        self._pool = ThreadPoolExecutor(max_workers=settings.fetch_concurrency)
        # Many reads wait at once, but only so many originals are unpacked: one may take 270 MB.
        self._decoding = threading.Semaphore(settings.threads + 1)

    def _open(self) -> None:
        if self._scorer is not None:
            return
        import cv2

        cv2.setNumThreads(1)  # images are decoded side by side already
        scorer = Scorer(self._bundle, runtime=self._run.runtime, threads=self._settings.threads)
        if scorer.info.bundle_id != self._run.bundle_id:
            raise BundleError(
                f"{self._bundle} is now bundle {scorer.info.bundle_id}, but the run was begun with "
                f"{self._run.bundle_id}; put that one back or start a run in another folder."
            )
        self._scorer = scorer

    def score_shard(self, shard: int, *, retry_failed: bool = False) -> LedgerEntry:
        """Write a shard's Parquet file and ledger entry; with `retry_failed`, only rows of status fetch_error anew.

        Raises:
            BundleError: the bundle is damaged, computes other logits here, or is not the run's.
            StorageError: the keys cannot be read or the rows not be written.
            BudgetError: the shard has lost its worker too often.
        """
        started = time.monotonic()
        images = read_shard(self._out, shard)
        note = self._begin(shard)
        try:
            self._open()
            rows = self._kept_rows(shard) if retry_failed else {}
            rows |= {place: self._failed_row(images[place], LOST) for place in note.lost if place not in rows}
            todo = [place for place in range(len(images)) if place not in rows]
            rows |= self._scored_rows(images, todo, note)
            in_order = [rows[place] for place in range(len(images))]
            entry = _entry(shard, in_order, scored=len(todo), seconds=time.monotonic() - started)
            self._write(entry, in_order, rewrite=retry_failed)
        finally:
            forget_attempt(self._out, shard)  # the worker lives, so no image is to blame for anything
        return entry

    def _begin(self, shard: int) -> Attempt:
        before = read_attempt(self._out, shard)
        note = before.after_death() if before else Attempt(shard=shard, pid=0, images=[])
        note = note.model_copy(update={"pid": os.getpid()})
        write_attempt(self._out, note)  # opening the bundle may be what kills: that must be counted, too
        return note

    def _kept_rows(self, shard: int) -> dict[int, dict[str, Any]]:
        uri = join(self._out, part_name(shard))
        rows = read_table(uri, kind=KIND, required=PREDICTION_SCHEMA.names).to_pylist()
        return {place: row for place, row in enumerate(rows) if row["status"] != "fetch_error"}

    def _scored_rows(self, images: list[PlannedImage], todo: list[int], note: Attempt) -> dict[int, dict[str, Any]]:
        rows: dict[int, dict[str, Any]] = {}
        batch: list[tuple[int, SeenImage]] = []
        for place, seen in self._seen(images, todo, note):
            if seen.pixels_HWC is None:
                rows[place] = seen.row
                continue
            batch.append((place, seen))
            if len(batch) == self._settings.batch_images:
                rows |= self._score(batch)
                batch = []
        return rows | self._score(batch) if batch else rows

    def _seen(self, images: list[PlannedImage], todo: list[int], note: Attempt) -> Iterator[tuple[int, SeenImage]]:
        """Give each image of `todo` as it was seen, in order, reading one window ahead of what is asked for."""
        ahead: deque[list[tuple[int, Future[SeenImage]]]] = deque()
        for window in _windows(todo, set(note.suspects), self._settings.batch_images * WINDOW_BATCHES):
            alone = len(window) == 1 and window[0] in note.suspects
            while ahead and (alone or len(ahead) > 1):
                yield from _results(ahead.popleft())
            in_hand = [place for earlier in ahead for place, _ in earlier] + window
            write_attempt(self._out, note.model_copy(update={"images": in_hand, "alone": alone}))
            futures = [(place, self._pool.submit(self._see, images[place])) for place in window]
            if alone:
                yield from _results(futures)
            else:
                ahead.append(futures)
        for futures in ahead:
            yield from _results(futures)

    def _see(self, image: PlannedImage) -> SeenImage:
        try:
            fetched = fetch_image(image.uri, escaped=image.escaped)
            try:
                with self._decoding:
                    return decode_image(fetched, image, self._scorer.info.pixels)
            except DecodeError as err:
                return SeenImage(self._failed_row(image, err, fetched), None)
        except FetchError as err:
            return SeenImage(self._failed_row(image, err), None)
        except CarrayError:
            raise
        except Exception as err:  # a bug of ours: it stops the shard, and never counts as bad data
            raise RuntimeError(f"reading {image.uri!r} failed with {type(err).__name__}: {err}") from err

    def _score(self, batch: list[tuple[int, SeenImage]]) -> dict[int, dict[str, Any]]:
        pixels_BHWC = np.stack([seen.pixels_HWC for _, seen in batch if seen.pixels_HWC is not None])
        logits_BK, _ = self._scorer.score(pixels_BHWC)
        columns = score_columns(logits_BK, self._scorer.info)
        columns |= vehicle_columns(columns["label"])
        stamp = self._stamp()
        return {
            place: seen.row | stamp | {name: values[i] for name, values in columns.items()}
            for i, (place, seen) in enumerate(batch)
        }

    def _failed_row(
        self, image: PlannedImage, err: FetchError | DecodeError, fetched: FetchedImage | None = None
    ) -> dict[str, Any]:
        read = {"etag": fetched.etag, "size_bytes": len(fetched.data)} if fetched else {}
        status = "fetch_error" if isinstance(err, FetchError) else "decode_error"
        failure = {"uri": image.uri, "status": status, "error_code": err.code, "error": str(err)[:_ERROR_LETTERS]}
        return failure | read | self._stamp()

    def _stamp(self) -> dict[str, Any]:
        run = self._run
        return {
            "runtime": run.runtime,
            "run_id": run.run_id,
            "bundle_id": run.bundle_id,
            "scored_at": datetime.now(UTC),
        }

    def _write(self, entry: LedgerEntry, rows: list[dict[str, Any]], *, rewrite: bool) -> None:
        if rewrite:
            strike_shard(self._out, entry.shard)
        table = table_from_rows(rows, PREDICTION_SCHEMA)
        provenance = {"run_id": self._run.run_id, "bundle_id": self._run.bundle_id, "shard": entry.shard}
        write_table(table, join(self._out, part_name(entry.shard)), kind=KIND, version=VERSION, provenance=provenance)
        enter_shard(self._out, entry)


def _windows(todo: list[int], suspects: set[int], size: int) -> Iterator[list[int]]:
    """Cut places into windows of `size`; a suspect is a window of its own."""
    window: list[int] = []
    for place in todo:
        if place in suspects:
            if window:
                yield window
            yield [place]
            window = []
            continue
        window.append(place)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def _results(futures: Iterable[tuple[int, Future[SeenImage]]]) -> Iterator[tuple[int, SeenImage]]:
    for place, future in futures:
        yield place, future.result()


def _entry(shard: int, rows: list[dict[str, Any]], *, scored: int, seconds: float) -> LedgerEntry:
    statuses = Counter(row["status"] for row in rows)
    codes = Counter(row["error_code"] for row in rows if row.get("error_code"))
    return LedgerEntry(
        shard=shard,
        rows=len(rows),
        scored=scored,
        ok=statuses["ok"],
        fetch_errors=statuses["fetch_error"],
        decode_errors=statuses["decode_error"],
        error_codes=dict(codes.most_common()),
        seconds=round(seconds, 3),
    )

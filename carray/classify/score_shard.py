"""Scores one shard: keys in, one Parquet file out, one row an image, whatever becomes of it.

From: a bundle, and a shard's keys. To: its Parquet file, then its ledger entry.
An image that was in hand alone when its worker died is a row of code worker_lost; a shard that lost a worker before is
scored with no other beside it, so that the next death has one cause. Several workers may score one shard: the first to
create its file wins, and the others enter that one (ledger). Imports no Ray and no torch.
Cost: see results/classify.csv.
"""

from __future__ import annotations

import os
import resource
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from carray.bundle.scorer import Scorer, score_columns
from carray.classify.attempts import Attempt, AttemptFile
from carray.classify.ledger import LedgerEntry, RunRecord, enter_shard, entry_of_part
from carray.classify.predictions_folder import (
    KIND,
    ClassifySettings,
    PlannedImage,
    as_version,
    part_name,
    prediction_schema,
)
from carray.classify.read_images import LOST, Arrival, ImageReader, read_ahead
from carray.classify.shards import read_shard
from carray.classify.since import EarlierRun
from carray.core.errors import BundleError, StorageError
from carray.core.settings import parse_settings
from carray.core.store.conditional import create, read_version, replace
from carray.core.store.files import exists, join
from carray.core.tables import hashes_as_int64, pack_table, table_from_rows, unpack_table
from carray.images.pixels import PixelSettings
from carray.images.read import ReadImage
from carray.images.vehicles import vehicle_columns

__all__ = ["ShardRows", "ShardScorer"]

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


_PACK_ROWS = 1_000


class ShardRows:
    """The rows of a shard that is being scored, in any order, and their counts.

    A row is held as a Python mapping (4 kB) only until a thousand have come, then as Arrow (0.4 kB), so that a worker's
    memory hardly depends on the length of its shards.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._loose: dict[int, Mapping[str, Any]] = {}
        self._packed: list[pa.Table] = []
        self._examples: dict[str, tuple[int, str]] = {}
        self.indices: set[int] = set()
        """Places of the images that have a row."""
        self.statuses: Counter[str] = Counter()
        self.error_codes: Counter[str] = Counter()
        self.size_bytes = 0
        """Of the originals of all rows, as far as they were read."""

    def update(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Add rows, by their images' indices in the shard, each once."""
        for index, row in rows.items():
            self.indices.add(index)
            self.statuses[row["status"]] += 1
            self.size_bytes += row.get("size_bytes") or 0
            if code := row.get("error_code"):
                self.error_codes[code] += 1
                self._examples[code] = min((index, row["uri"]), self._examples.get(code, (index, row["uri"])))
        self._loose.update(rows)
        if len(self._loose) >= _PACK_ROWS:
            self._pack()

    @property
    def examples(self) -> dict[str, str]:
        """Give the first uri of each error code."""
        return {code: uri for code, (_, uri) in self._examples.items()}

    def table(self) -> pa.Table:
        """Give all rows in the order of their indices."""
        self._pack()
        return pa.concat_tables(self._packed).sort_by("index").drop_columns("index")

    def _pack(self) -> None:
        table = table_from_rows(self._loose.values(), self._schema)
        indices = pa.array(np.fromiter(self._loose, dtype=np.int64, count=len(self._loose)))
        self._packed.append(table.append_column("index", indices))
        self._loose = {}


@dataclass(frozen=True, slots=True)
class _Part:
    """One version of a shard's data file."""

    etag: str
    rows: list[dict[str, Any]]
    known: set[int]
    """Indices of images without a row, since an earlier run knows them."""
    entry: LedgerEntry | None
    """None if an earlier version of carray wrote the file."""


class SharedLock:
    """A lock that many threads hold together, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._holders = 0
        self._alone = False

    @contextmanager
    def hold(self, *, alone: bool) -> Iterator[None]:
        """Hold the lock; `alone` waits until no other holds it, and lets none in meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not (alone and self._holders))
            self._holders += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._changed:
                self._holders -= 1
                self._alone = False
                self._changed.notify_all()


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
        self._token = secrets.token_hex(8)
        self._opening, self._beside = threading.Lock(), SharedLock()
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
        notes = AttemptFile(self._out, shard)
        try:
            before = notes.read()
            if before is not None and not retry_failed and (entry := self._enter_part(shard)) is not None:
                return entry  # the worker before died between the shard's two files
            note = self._begin(notes, before, shard)
            images = read_shard(self._out, shard)
            with self._beside.hold(alone=bool(note.suspects)):
                return self._score_mine(images, note, notes, retry_failed=retry_failed)
        finally:
            notes.remove()

    def _score_mine(
        self, images: list[PlannedImage], note: Attempt, notes: AttemptFile, *, retry_failed: bool
    ) -> LedgerEntry:
        started = time.monotonic()
        self.open()
        rows = ShardRows(self._schema)
        before = self._read_part(note.shard) if retry_failed else None
        known = self._keep(before, images, rows) if before else self._known(images)
        lost = set(note.lost) - rows.indices - known
        rows.update({index: self._row(images[index], LOST) for index in lost})
        todo = [index for index in range(len(images)) if index not in rows.indices and index not in known]
        if before and before.entry and not todo and not lost:  # another worker has retried it
            enter_shard(self._out, before.entry)
            return before.entry
        kept_bytes = rows.size_bytes
        self._score_images(images, todo, note, rows, notes)
        entry = _entry(note.shard, rows, known, scored=len(todo), kept_bytes=kept_bytes, started=started)
        return self._write(entry, rows, known, before)

    def open(self) -> None:
        """Open the bundle, unless that is done; the first shard does it otherwise.

        Raises:
            BundleError: the bundle is damaged, computes other logits here, or is not the run's.
        """
        with self._opening:
            if self._scorer is not None:
                return
            device = "cuda" if self._settings.device == "cuda" else "cpu"
            scorer = Scorer(self._bundle, runtime=self._run.runtime, threads=self._threads, device=device, warns=False)
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

    def _begin(self, notes: AttemptFile, before: Attempt | None, shard: int) -> Attempt:
        note = Attempt(shard=shard, pid=0, images=[])
        if before is not None:
            # A worker whose own machine was given up comes late: the note is its successor's, who is alive.
            lost = self._is_lost(before.machine) or self._is_lost(self._machine)
            note = before.after_death(self._driver, machine_lost=lost)
        here = {"pid": os.getpid(), "worker": self._token, "machine": self._machine, "driver": self._driver}
        note = note.model_copy(update=here)
        if before or self._scorer is None:  # opening the bundle may be what kills: that must be counted, too
            notes.write(note)
        return note

    def _known(self, images: list[PlannedImage]) -> set[int]:
        return self._earlier.known(images) if self._earlier else set()

    def _read_part(self, shard: int) -> _Part:
        uri = join(self._out, part_name(shard))
        found = read_version(uri)
        if found is None:
            raise StorageError(f"{uri} does not exist any more; run the command again.")
        table, note = unpack_table(found[0], uri)
        entry = parse_settings(LedgerEntry, note["entry"]) if "entry" in note else None
        known = {index for first, end in note.get("known", []) for index in range(first, end)}
        return _Part(found[1], hashes_as_int64(table).to_pylist(), known, entry)

    def _keep(self, before: _Part, images: list[PlannedImage], rows: ShardRows) -> set[int]:
        """Keep the rows that stay; gives the indices that have none since an earlier run knows them."""
        indices = [index for index in range(len(images)) if index not in before.known]
        rows.update({i: row for i, row in zip(indices, before.rows, strict=True) if row["status"] != "fetch_error"})
        return before.known

    def _score_images(
        self, images: list[PlannedImage], todo: list[int], note: Attempt, rows: ShardRows, notes: AttemptFile
    ) -> None:
        batch: list[tuple[int, ReadImage]] = []
        size = self._settings.batch_images or self._scorer.batch_images
        with closing(read_ahead(self._reader, images, todo, note, notes.write, most=size)) as arrivals:
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
            return [(index, finish()) for index, finish in arrived]
        seen = self._decoders.map(lambda arrival: arrival[1](), arrived)
        return list(zip([index for index, _ in arrived], seen, strict=True))

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

    def _write(self, entry: LedgerEntry, rows: ShardRows, known: set[int], before: _Part | None) -> LedgerEntry:
        """Write the shard's file and its ledger entry; gives the entry of the file that is there then."""
        if before is not None:
            entry = entry.model_copy(update={"retry": (before.entry.retry if before.entry else 0) + 1})
        provenance: dict[str, Any] = {
            "run_id": self._run.run_id,
            "bundle_id": self._run.bundle_id,
            "shard": entry.shard,
            "worker": self._token,
            "entry": entry.model_dump(mode="json"),
        }
        provenance |= {"known": _ranges(sorted(known))} if known else {}
        table = as_version(rows.table(), self._run.version)
        data = pack_table(table, kind=KIND, version=self._run.version, provenance=provenance)
        uri = join(self._out, part_name(entry.shard))
        if replace(uri, data, before.etag) if before else create(uri, data):
            enter_shard(self._out, entry)
            return entry
        found = self._enter_part(entry.shard)
        if found is None:
            raise StorageError(
                f"{uri} was there already and is no shard of this run; delete it and run the command again."
            )
        return found

    def _enter_part(self, shard: int) -> LedgerEntry | None:
        """Enter the file that another worker has written, if there is one."""
        uri = join(self._out, part_name(shard))
        entry = entry_of_part(uri) if exists(uri) else None
        if entry is not None:
            enter_shard(self._out, entry)
        return entry


def _ranges(indices: Sequence[int]) -> list[list[int]]:
    """Pack sorted indices into [first, end) pairs: what an earlier run knows comes in long stretches."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1])
    return ranges


def _entry(
    shard: int, rows: ShardRows, known: set[int], *, scored: int, kept_bytes: int, started: float
) -> LedgerEntry:
    return LedgerEntry(
        shard=shard,
        rows=len(rows.indices),
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

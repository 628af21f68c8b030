"""Cuts what is listed into shards while it is being listed, and reads them again.

From: the pieces of a listing, from several threads. To: one Arrow file of images a shard, which says in its metadata
what part of the source it covers.
Invariants: every image is in exactly one shard, and shards cover only what they hold, so that what no shard covers is
what is left to list; a shard's file never changes. Memory: at most one shard a listing thread, packed.
"""

from __future__ import annotations

import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc

from carray.classify.predictions_folder import ClassifySettings, PlannedImage, record_place
from carray.core.errors import StorageError
from carray.core.settings import Settings
from carray.core.store.conditional import read_version
from carray.core.store.files import list_files, retry, write_bytes
from carray.core.store.image_bytes import IMAGE_SUFFIXES, key_suffix
from carray.core.store.listing import Gap, Piece
from carray.core.store.random_access import open_file
from carray.core.uri_tables import BOX
from carray.images.pixels import Box

__all__ = ["ShardCutter", "ShardNote", "read_notes", "read_shard", "shard_images", "uncovered"]

SHARD_SCHEMA = pa.schema(
    [
        *(("uri", pa.string()), ("escaped", pa.bool_()), ("etag", pa.string()), ("size_bytes", pa.int64())),
        *((name, pa.int32()) for name in BOX),
    ]
)
SHARES = 64
"""A shard is at most 1/64 of what lies before it: it grows with the run, and thirty workers end within half a share."""
SHARES_A_WORKER = 2
"""More workers get smaller shards, of half a worker's part at most: whenever the listing ends, all have something to
do, and none keeps the others waiting for long."""
WORKERS_AN_IMAGE = 2
"""But not smaller than an image for every two workers: a driver hands out some hundred shards a second, and workers
that wait for it are worse than workers that wait for the last (both simulated: results/scale.csv)."""

FEWEST_IMAGES = 8
"""Images of a shard where a short listing is shared out among the workers."""

_IMAGE_NAME = rf"\.(?i:{'|'.join(IMAGE_SUFFIXES)})/*$"
"""What `images.is_image_key` says, for a whole column at once."""
_NOTE = b"carray"


@dataclass
class ShardNote:
    """What a shard's file says of itself."""

    images: int = 0
    covers: list[Gap] = field(default_factory=list)
    """Parts of the source: all above the first and up to the second (None: to the end)."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Keys in those parts without an image's suffix, by suffix."""
    ordered: bool = True
    """Whether the source has an order; without one, `covers` says nothing."""


class _Note(Settings):
    """A ShardNote as it is stored."""

    images: int
    covers: list[Gap]
    skipped: dict[str, int]
    ordered: bool


@dataclass
class _Growing(ShardNote):
    batches: list[pa.RecordBatch] = field(default_factory=list)

    def add(self, rows: pa.RecordBatch, wanted: pa.Array | None, after: str, upto: str | None) -> None:
        if wanted is not None:
            self.skipped.update(
                key_suffix(uri) or "(none)" for uri in rows["uri"].filter(pc.invert(wanted)).to_pylist()
            )
            rows = rows.filter(wanted)
        if rows.num_rows:
            self.batches.append(rows)
            self.images += rows.num_rows
        if self.covers and self.covers[-1][1] == after:
            self.covers[-1] = (self.covers[-1][0], upto)
        else:
            self.covers.append((after, upto))

    def merge(self, other: _Growing) -> None:
        self.batches += other.batches
        self.covers += other.covers
        self.images += other.images
        self.skipped += other.skipped
        self.ordered &= other.ordered


class ShardCutter:
    """Takes pieces from any number of threads, and writes shards: numbered in the order in which they are cut.

    `notes` are those of the shards that are there already; without any, `begin` is called before the first is written.
    `workers` is how many are expected to score at once.
    """

    def __init__(
        self,
        out: str,
        settings: ClassifySettings,
        *,
        by_suffix: bool,
        notes: dict[int, ShardNote],
        begin: Callable[[], None],
        workers: int = 1,
    ) -> None:
        self._out, self._settings, self._by_suffix, self._workers = out, settings, by_suffix, workers
        self._begin = begin if not notes else None
        self._lock = threading.Lock()
        self._growing: dict[int, _Growing] = {}
        self._ended = _Growing()
        self._written = set(notes)
        self._numbers = (number for number in count() if number not in notes)
        self.cut_images = sum(note.images for note in notes.values())
        """Images of all shards that are cut, written or not."""
        self.skipped: Counter[str] = Counter()
        for note in notes.values():
            self.skipped.update(note.skipped)
        self.shards = 0
        """Shards 0 to this are all written."""
        self._advance()

    def take(self, piece: Piece) -> None:
        """Add a piece to its range's shard, and write each shard that it fills.

        Raises:
            StorageError: a shard could not be written.
        """
        shard = self._growing.pop(piece.range_number, None) or _Growing(ordered=piece.ordered)
        rows, after, start, used = piece.batch, piece.after, 0, 0
        wanted = pc.match_substring_regex(rows["uri"], _IMAGE_NAME) if self._by_suffix else None
        if wanted is not None and pc.all(wanted).as_py():
            wanted = None
        indices = np.arange(rows.num_rows) if wanted is None else np.flatnonzero(wanted.to_numpy(zero_copy_only=False))
        share = self._settings.shard_images_max
        if piece.last and self._workers > 1 and not (self.cut_images or self._growing):  # all that there is
            share = max(FEWEST_IMAGES, -(-(shard.images + len(indices)) // self._workers))
        while len(indices) - used >= (needed := max(1, min(self._next_size(), share) - shard.images)):
            used += needed
            end = int(indices[used - 1]) + 1
            upto = piece.upto if end == rows.num_rows else piece.keys[end - 1]
            shard.add(rows.slice(start, end - start), _part(wanted, start, end), after, upto)
            self._write(shard)
            shard, start, after = _Growing(ordered=piece.ordered), end, upto or ""
        if start < rows.num_rows or (start == 0 and piece.upto != after):
            shard.add(rows.slice(start), _part(wanted, start, rows.num_rows), after, piece.upto)
        if piece.last:
            self._end(shard)
        else:
            self._growing[piece.range_number] = shard

    def finish(self) -> None:
        """Write what the ends of the ranges have left over, as the last shard.

        Raises:
            StorageError: it could not be written.
        """
        if self._ended.images:
            self._write(self._ended)
        else:
            self.skipped.update(self._ended.skipped)

    def _next_size(self) -> int:
        return shard_images(self.cut_images, self._settings, self._workers)

    def _end(self, shard: _Growing) -> None:
        full = None
        with self._lock:
            if self._ended.images and self._ended.images + shard.images > self._next_size():
                full, self._ended = self._ended, _Growing()
            self._ended.merge(shard)
        if full is not None:
            self._write(full)

    def _write(self, shard: _Growing) -> None:
        with self._lock:
            if self._begin is not None:
                self._begin()
                self._begin = None
            number = next(self._numbers)
            self.cut_images += shard.images
            self.skipped.update(shard.skipped)
        write_bytes(_shard_uri(self._out, number), _pack(shard))
        with self._lock:
            self._written.add(number)
            self._advance()

    def _advance(self) -> None:
        while self.shards in self._written:
            self._written.remove(self.shards)
            self.shards += 1


def shard_images(listed: int, settings: ClassifySettings, workers: int = 1) -> int:
    """Give the number of images of the shard that is cut after `listed` images, for so many workers."""
    most = max(workers // WORKERS_AN_IMAGE, listed // (SHARES_A_WORKER * workers))
    return min(max(settings.shard_images_first, min(listed // SHARES, most)), settings.shard_images_max)


def read_shard(out: str, shard: int) -> list[PlannedImage]:
    """Read the images of one shard, in its order.

    Raises:
        StorageError: the run has no such shard, or it cannot be read.
    """
    uri = _shard_uri(out, shard)
    found = read_version(uri)
    if found is None:
        raise StorageError(f"{uri} does not exist; check its spelling.")
    data = found[0]
    try:
        with pa.ipc.open_file(io.BytesIO(data)) as reader:
            table = reader.read_all()
        # Arrow takes a file's offsets on trust, and damaged ones would end the process; this looks at each.
        table.validate(full=True)
        rows = table.select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA).to_pylist()
    except (pa.ArrowException, ValueError, LookupError, OSError) as err:
        raise StorageError(f"{uri} is damaged ({' '.join(str(err).split())[:200]}); give another folder.") from None
    if any(row["uri"] is None for row in rows):
        raise StorageError(f"{uri} is damaged (an image has no uri); give another folder.")
    return [PlannedImage(row["uri"], bool(row["escaped"]), _box(row), row["etag"], row["size_bytes"]) for row in rows]


def _box(row: Mapping[str, Any]) -> Box | None:
    x1, y1, x2, y2 = (row[name] for name in BOX)
    return None if None in (x1, y1, x2, y2) else (x1, y1, x2, y2)


def read_notes(out: str) -> dict[int, ShardNote]:
    """Read what the shards that are written say of themselves.

    Raises:
        StorageError: they cannot be listed or read.
    """
    uris = [uri for uri in list_files(record_place(out, "shards")) if uri.endswith(".arrow")]
    with ThreadPoolExecutor(max_workers=16) as pool:
        notes = list(pool.map(_read_note, uris))
    return {int(uri[-len("000000.arrow") : -len(".arrow")]): note for uri, note in zip(uris, notes, strict=True)}


def uncovered(notes: Iterable[ShardNote]) -> list[Gap]:
    """Give the parts of a source that no shard covers, in order."""
    gaps: list[Gap] = []
    reached = ""
    for after, upto in sorted((part for note in notes for part in note.covers), key=lambda part: _bytes(part[0])):
        if _bytes(after) > _bytes(reached):
            gaps.append((reached, after))
        if upto is None:
            return gaps
        reached = max(reached, upto, key=_bytes)
    return [*gaps, (reached, None)]


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _part(wanted: pa.Array | None, start: int, end: int) -> pa.Array | None:
    return None if wanted is None else wanted.slice(start, end - start)


def _shard_uri(out: str, shard: int) -> str:
    return record_place(out, "shards", f"{shard:06d}.arrow")


def _pack(shard: _Growing) -> bytes:
    table = pa.Table.from_batches(shard.batches)
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in SHARD_SCHEMA
    ]
    note = {name: value for name, value in vars(shard).items() if name != "batches"}
    schema = SHARD_SCHEMA.with_metadata({_NOTE: json.dumps(note).encode()})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema).combine_chunks())
    return sink.getvalue()


def _read_note(uri: str) -> ShardNote:

    def read() -> bytes:
        with open_file(uri) as file, pa.ipc.open_file(file) as reader:
            note: bytes = (reader.schema.metadata or {})[_NOTE]
            return note

    try:
        note = _Note.model_validate_json(retry(read, what=f"reading {uri}"))
    except (pa.ArrowException, LookupError, ValueError) as err:
        raise StorageError(f"{uri} is damaged ({type(err).__name__}); give another folder.") from None
    return ShardNote(note.images, note.covers, Counter(note.skipped), note.ordered)

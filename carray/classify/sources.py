"""Says what a source of images is: here a folder or prefix, on which tables and inventories build.

From: a URI. To: pieces of a listing.
Invariants: a row of a file stands at its number, so that an interrupted listing goes on behind the rows that shards
hold; that the file is still the same is told by its mark.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from carray.classify.predictions_folder import ClassifySettings
from carray.core.errors import StorageError
from carray.core.store.files import filesystem, retry
from carray.core.store.listing import Gap, Piece, Take, list_pieces

__all__ = ["Source", "file_mark", "take_rows"]


class Source:
    """Is a folder or prefix, and the base of the others: what it gives, and what is known once it has been listed."""

    by_suffix: bool
    """Whether only keys with an image's suffix are images; a table is taken whole."""
    repeated: int = 0
    """Rows of a table that repeat another's uri (and box)."""
    boxes: bool = False
    """Whether any image has a box."""
    mark: dict[str, Any] | None = None
    """What tells this state of a table from another; None where changes do not matter."""

    def __init__(self, uri: str, settings: ClassifySettings) -> None:
        self.uri, self.by_suffix = uri, not settings.all_files

    def list(self, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
        """Give every piece of the wanted parts to `take`, from one thread or more, until the end or `stop`.

        Raises:
            SchemaError: a table or an inventory is not what it should be.
            StorageError: the source does not exist or cannot be listed.
        """
        list_pieces(self.uri, take, stop=stop, gaps=gaps, threads=threads)


def file_mark(uri: str) -> dict[str, Any]:
    """Say which state of a file this is, by its size and time.

    Raises:
        StorageError: it does not exist.
    """
    fs, path = filesystem(uri)
    found = retry(lambda: fs.get_file_info(path), what=f"looking for {uri}")
    if not found.is_file:
        raise StorageError(f"{uri} does not exist; check its spelling.")
    return {"uri": uri, "size_bytes": found.size, "mtime_ns": found.mtime_ns}


def take_rows(batches: Iterable[pa.RecordBatch], take: Take, *, gaps: Sequence[Gap], stop: threading.Event) -> None:
    """Hand over rows in order, those in `gaps` only; a row's place is its number, from 1."""
    begin = 0
    after = {number: gap[0] for number, gap in enumerate(gaps)}
    for batch in batches:
        if stop.is_set():
            return
        for number, (first, last) in enumerate(gaps):
            low = max(int(first or 0), begin)
            high = min(begin + batch.num_rows, int(last) if last is not None else begin + batch.num_rows)
            if low < high:
                keys = [_place(row + 1) for row in range(low, high)]
                rows = batch.slice(low - begin, high - low)
                take(Piece(number, rows, keys, after[number], keys[-1], last == keys[-1]))
                after[number] = keys[-1]
        begin += batch.num_rows
    nothing = pa.record_batch({"uri": pa.array([], pa.string())})
    for number, (_, last) in enumerate(gaps):
        if last is None:
            take(Piece(number, nothing, [], after[number], None, True))


def _place(row: int) -> str:
    return f"{row:012d}"

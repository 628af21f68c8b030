"""Lists a folder or an `s3://` prefix, however many keys it holds: as a stream of Arrow batches, or as a list of keys.

From: a folder, an `s3://` prefix, and optionally the ranges of it that are wanted. To: `Piece`s or `ListedImage`s.
Invariants: every key once, in byte order within a piece's range; a key with `//` or a trailing `/` is a key like any
other; a local name that is not UTF-8 is percent-escaped and marked, since Arrow refuses it.
Cost: memory for a few pages a thread, and for the names of one local folder and those above it.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from carray.core.errors import StorageError
from carray.core.store.files import absolute, is_s3
from carray.core.store.image_bytes import local_etag
from carray.core.store.s3_listing import PAGE_SCHEMA, WHOLE, Gap, Piece, Take, list_ranges

__all__ = ["WHOLE", "Gap", "ListedImage", "Piece", "Take", "list_keys", "list_pieces"]

_PIECE_KEYS = 1_000


@dataclass(frozen=True, slots=True)
class ListedImage:
    """One key of a listing. `escaped` says that `uri` percent-escapes a local name that is not UTF-8."""

    uri: str
    size_bytes: int
    etag: str | None
    escaped: bool = False


def list_pieces(
    source: str, take: Take, *, stop: threading.Event, gaps: Sequence[Gap] = WHOLE, threads: int = 1
) -> None:
    """List a folder or prefix, or some ranges of it, until its end or until `stop` is set.

    `take` is called with every piece: those of one range in order from one thread, those of others from other threads.

    Raises:
        StorageError: the bucket or folder does not exist or may not be listed.
    """
    source = absolute(source)
    if is_s3(source):
        list_ranges(source, take, gaps=gaps, threads=threads, stop=stop)
    else:
        _list_local(source, take, gaps, stop)


def list_keys(source: str) -> list[ListedImage]:
    """List every file below a folder or prefix, in byte order of keys.

    Raises:
        StorageError: the bucket or folder does not exist or may not be listed.
    """
    pieces: list[Piece] = []
    list_pieces(source, pieces.append, stop=threading.Event())
    return [ListedImage(**row) for piece in pieces for row in piece.batch.to_pylist()]


def _list_local(source: str, take: Take, gaps: Sequence[Gap], stop: threading.Event) -> None:
    root = os.fsencode(source)
    if not os.path.isdir(root):
        raise StorageError(f"{source} is not a folder; give a folder, an s3:// prefix, a manifest or a table of URIs.")
    paths = _walk(root, frozenset())
    path = next(paths, None)
    for number, (after, upto) in enumerate(gaps):
        start, end, last = os.fsencode(after), os.fsencode(upto) if upto is not None else None, False
        while path is not None and path <= start:
            path = next(paths, None)
        while not last and not stop.is_set():
            page: list[bytes] = []
            while path is not None and (end is None or path <= end) and len(page) < _PIECE_KEYS:
                page.append(path)
                path = next(paths, None)
            last = path is None or (end is not None and path > end)
            keys = [os.fsdecode(one) for one in page]
            reached = upto if last else keys[-1]
            take(Piece(number, _local_batch(page), keys, after, reached, last))
            after = keys[-1] if keys else after


def _walk(folder: bytes, above: frozenset[tuple[int, int]]) -> Iterator[bytes]:
    """Give the files below a folder in byte order of their whole paths: there, a folder's name ends in a slash."""
    # A link to a folder's own ancestor would lead round in circles; two links to one folder are two folders.
    try:
        found = os.stat(folder)
        here = (found.st_dev, found.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            names = sorted(entry.name + b"/" if _is_folder(entry) else entry.name for entry in entries)
    except OSError as err:
        raise StorageError(
            f"the folder {os.fsdecode(folder)!r} cannot be listed ({err.strerror}), so its images would be missed; "
            "make it readable or move it away."
        ) from err
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(b"/"):
            yield from _walk(path[:-1], above | {here})
        else:
            yield path


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a key that cannot be fetched, which must become a row
        return False


def _local_batch(paths: list[bytes]) -> pa.RecordBatch:
    rows = []
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            # A dangling link is a key that cannot be fetched: it must become a row, not vanish.
            found = _link_itself(path)
        try:
            uri, escaped = path.decode(), False
        except UnicodeDecodeError:
            uri, escaped = _escape(path), True
        rows.append((uri, escaped, local_etag(found), found.st_size))
    uris, flags, etags, sizes = list(zip(*rows, strict=True)) or [()] * len(PAGE_SCHEMA)
    bits = np.packbits(np.array(flags, bool), bitorder="little")
    arrays = [
        _texts(uris),
        pa.Array.from_buffers(pa.bool_(), len(rows), [None, pa.py_buffer(bits)]),
        _texts(etags),
        pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.array(sizes, np.int64))]),
    ]
    return pa.record_batch(arrays, schema=PAGE_SCHEMA)


def _texts(values: Sequence[str]) -> pa.Array:
    """Make an array of texts; `pa.array` would import pandas, for 0.3 s, to ask whether `values` is a Series."""
    data = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int32)
    return pa.StringArray.from_buffers(len(data), pa.py_buffer(ends), pa.py_buffer(b"".join(data)))


def _link_itself(path: bytes) -> os.stat_result:
    try:
        return os.lstat(path)
    except OSError:  # gone since its folder was read
        return os.stat_result((stat.S_IFREG, *[0] * 9))


def _escape(path: bytes) -> str:
    text = path.replace(b"%", b"%25").decode(errors="surrogateescape")
    return "".join(f"%{ord(char) - 0xDC00:02X}" if "\udc80" <= char <= "\udcff" else char for char in text)

"""Reads a file by ranges, as Parquet's readers do: a local one natively, one of an object store by requests.

A file of at most TAIL_BYTES is one request; of a larger one, the first request brings size and footer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from carray.core.store import objects
from carray.core.store.files import artifact_uri, is_s3, retry

__all__ = ["open_dataset", "open_file"]

TAIL_BYTES = 64 * 1024
"""What Parquet's reader asks for first."""


def open_file(uri: str) -> pa.NativeFile:
    """Open a file for reading at any place.

    Raises:
        FileNotFoundError: there is none.
        StorageError: storage refused it after every try.
    """
    uri = artifact_uri(uri)
    return pa.PythonFile(_RemoteFile(uri), mode="r") if is_s3(uri) else pa.OSFile(uri)


def open_dataset(files: Sequence[str]) -> Any:
    """Open Parquet files as one dataset of Arrow; reads only the first one's schema.

    Raises:
        FileNotFoundError: the first is not there.
        StorageError: storage refused it after every try.
        pa.ArrowException: it is not Parquet.
    """
    import pyarrow.dataset as pads

    if not is_s3(files[0]):
        return pads.dataset(list(files), format="parquet")
    return pads.dataset(
        [artifact_uri(uri).partition("://")[2] for uri in files], filesystem=_for_arrow(), format="parquet"
    )


class _RemoteFile(io.RawIOBase):
    def __init__(self, uri: str) -> None:
        self._uri, self._at = uri, 0
        self._tail, self._size = self._fetch(-TAIL_BYTES, 0)

    def _fetch(self, start: int, end: int) -> tuple[bytes, int]:
        return retry(lambda: objects.get_range(self._uri, start, end), what=f"reading {self._uri}")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        start, tail = self._at, self._size - len(self._tail)
        if start >= end:
            return b""
        data = self._tail[start - tail : end - tail] if start >= tail else self._fetch(start, end)[0]
        self._at = start + len(data)
        return data


def _for_arrow() -> Any:
    """Give the file system through which Arrow's datasets read."""
    from obstore.fsspec import FsspecStore

    class Store(FsspecStore):
        cachable = False

        def isfile(self, path: str) -> bool:
            return True  # opening it says so, without another request

        def open(self, path: str, *_: Any, **__: Any) -> _RemoteFile:
            return _RemoteFile(f"s3://{path}")

    return Store("s3")

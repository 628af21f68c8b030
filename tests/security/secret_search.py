"""Looks for secrets in everything that a run left behind, packed or not."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["files_below", "leaks", "spellings"]


def leaks(secrets: Mapping[str, str], blobs: Iterable[tuple[str, bytes]]) -> list[str]:
    """Say which blob holds which secret, for each secret by its name."""
    wanted = [(name, spelled) for name, secret in secrets.items() for spelled in spellings(secret)]
    return [
        f"{place} holds {name}"
        for place, data in blobs
        for name, spelled in wanted
        if any(spelled in layer for layer in layers(data))
    ]


def spellings(secret: str) -> set[bytes]:
    """Give a secret as it is, and inside a longer base64 text, wherever in that it begins."""
    raw = secret.encode()
    # What is left of the first and last group of three bytes depends on the neighbours, and is cut off.
    encoded = {base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)}
    return {raw, *encoded}


def layers(data: bytes) -> Iterator[bytes]:
    """Give a file's bytes, and those of its columns and notes where it is Parquet, Arrow or gzip."""
    yield data
    if data[:4] == b"PAR1":
        yield from _texts(pq.read_table(io.BytesIO(data)))
    elif data[:6] == b"ARROW1":
        yield from _texts(pa.ipc.open_file(io.BytesIO(data)).read_all())
    elif data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)


def _texts(table: pa.Table) -> Iterator[bytes]:
    yield repr(table.schema.metadata).encode()
    yield from (value for pair in (table.schema.metadata or {}).items() for value in pair)
    yield repr(table.to_pylist()).encode()


def files_below(*folders: Path) -> Iterator[tuple[str, bytes]]:
    """Give every regular file below some folders, with its name: sockets and pipes hold nothing."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()

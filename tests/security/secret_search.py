"""Searches everything that a run left behind for secrets, also inside packed files."""

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
    """Return a line for each blob that holds a secret, with the secret's name."""
    wanted = [(name, spelled) for name, secret in secrets.items() for spelled in spellings(secret)]
    return [
        f"{place} holds {name}"
        for place, data in blobs
        for name, spelled in wanted
        if any(spelled in layer for layer in layers(data))
    ]


def spellings(secret: str) -> set[bytes]:
    """Return a secret as it is, and as it looks inside a longer base64 text at each of the three offsets."""
    raw = secret.encode()
    # The first and last group of three bytes depend on their neighbours, so they are cut off.
    encoded = {base64.b64encode(b"x" * shift + raw)[4 if shift else 0 : -4] for shift in range(3)}
    return {raw, *encoded}


def layers(data: bytes) -> Iterator[bytes]:
    """Yield a file's bytes, and the unpacked content where it is Parquet, Arrow or gzip."""
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
    """Yield (name, bytes) of every regular file below some folders."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield str(path), path.read_bytes()

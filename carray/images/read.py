"""Reads images for every stage: from a URI to pixels, or to a `ReadImage` without pixels whose columns say why.

A failure to fetch or decode never raises here; any other exception is a bug.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from carray.core.errors import DecodeError, FetchError
from carray.core.progress import Progress
from carray.core.store.image_bytes import FetchedImage, fetch_image
from carray.images.decoding import Pixels
from carray.images.pixels import Box, PixelSettings, decode, view

__all__ = ["ReadImage", "decode_fetched", "failed_image", "fetch_original", "read_all", "read_image"]

T = TypeVar("T")
U = TypeVar("U")

_ERROR_LETTERS = 500


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image's pixels and measures, or the reason why it has no pixels."""

    pixels_HWC: Pixels | None = None
    """uint8 RGB: the decoded square or the network's input, as asked for; None where the image could not be read."""
    status: str = "ok"
    """ok, fetch_error or decode_error."""
    error_code: str | None = None
    error: str | None = None
    etag: str | None = None
    """Of the very read that gave the bytes."""
    size_bytes: int | None = None
    width: int | None = None
    """Of the upright image, pixels."""
    height: int | None = None
    phash: int | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """Give the measures and the error, where known, as a row's columns."""
        known = ((name, getattr(self, name)) for name in _COLUMNS)
        return {name: value for name, value in known if value is not None}


_COLUMNS = tuple(name for name in ReadImage.__slots__ if name != "pixels_HWC")


def read_image(
    uri: str,
    settings: PixelSettings,
    *,
    escaped: bool = False,
    box: Box | None = None,
    sha256: str | None = None,
    as_input: bool = False,
) -> ReadImage:
    """Fetch and decode one image, cut to `box` if given; bytes of another `sha256` are a fetch_error, code changed.

    `escaped` says that `uri` percent-escapes a local name that is not UTF-8; `as_input` asks for the network's input
    instead of the decoded square.
    """
    fetched = fetch_original(uri, escaped=escaped, sha256=sha256)
    if isinstance(fetched, ReadImage):
        return fetched
    return decode_fetched(fetched, settings, box=box, as_input=as_input)


def fetch_original(
    uri: str,
    *,
    escaped: bool = False,
    sha256: str | None = None,
    admit: Callable[[int], None] = lambda size_bytes: None,
) -> FetchedImage | ReadImage:
    """Fetch one image's bytes, or give the failure; arguments as for `read_image` and `fetch_image`."""
    try:
        fetched = fetch_image(uri, escaped=escaped, admit=admit)
    except (FetchError, DecodeError) as err:
        return failed_image(err)
    if sha256 is not None and hashlib.sha256(fetched.data).hexdigest() != sha256:
        return failed_image(FetchError("changed", "it changed since the manifest was prepared"), fetched)
    return fetched


def decode_fetched(
    fetched: FetchedImage, settings: PixelSettings, *, box: Box | None = None, as_input: bool = False
) -> ReadImage:
    """Decode a fetched image; arguments as for `read_image`."""
    try:
        seen = decode(fetched.data, settings, box=box)
    except DecodeError as err:
        return failed_image(err, fetched)
    return ReadImage(
        view(seen.pixels_HWC, settings) if as_input else seen.pixels_HWC,
        etag=fetched.etag,
        size_bytes=len(fetched.data),
        width=seen.width,
        height=seen.height,
        phash=seen.phash,
    )


def failed_image(err: FetchError | DecodeError, fetched: FetchedImage | None = None) -> ReadImage:
    """Turn an image's error, before or after it was fetched, into a result without pixels."""
    return ReadImage(
        status="fetch_error" if isinstance(err, FetchError) else "decode_error",
        error_code=err.code,
        error=str(err)[:_ERROR_LETTERS],
        etag=fetched.etag if fetched else None,
        size_bytes=len(fetched.data) if fetched else None,
    )


def read_all(
    items: Sequence[T],
    read: Callable[[T], U],
    *,
    what: str,
    threads: int | None = None,
    ahead: int = 256,
    is_failed: Callable[[U], bool] = lambda one: isinstance(one, ReadImage) and one.pixels_HWC is None,
) -> Iterator[U]:
    """Call `read` on each item in several threads; yields the results in order, and shows progress as `what`.

    At most `ahead` items are read, or being read, before the consumer asks for them; a slow one does not stop those
    behind it. Decoding releases the interpreter's lock, and two threads per CPU hide the reading of local files.
    """
    waiting = iter(items)
    threads = threads or min(32, 2 * len(os.sched_getaffinity(0)))
    with Progress(what, total=len(items)) as progress, ThreadPoolExecutor(threads) as pool:
        pending = deque(pool.submit(read, item) for item in islice(waiting, ahead))
        try:
            while pending:
                one = pending.popleft().result()
                pending.extend(pool.submit(read, item) for item in islice(waiting, 1))
                progress.advance(errors=int(is_failed(one)))
                yield one
        finally:
            for future in pending:
                future.cancel()

"""Reads images again and shrinks them to small JPEGs inside a page.

A thumbnail is upright, whole and never enlarged. An image that cannot be read has a reason in its place; one whose etag
differs from that of the prediction is marked. Costs one GET an image and 5 kB of the page; at most _FETCHERS x _MOST_MB
of originals and _DECODERS decoded ones are in memory.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from carray.core.errors import CarrayError, DecodeError
from carray.core.progress import Progress
from carray.core.store.files import is_s3
from carray.core.store.image_bytes import FetchedImage
from carray.images.pictures import picture_settings, small_jpeg
from carray.images.read import ReadImage, decode_fetched, fetch_original

__all__ = ["THUMBNAIL_PIXELS", "Thumbnail", "read_thumbnails"]

THUMBNAIL_PIXELS = 168
"""The longer side: 168 x 112 of a photograph, about the size at which a card shows it."""

_QUALITY = 72
_FETCHERS, _DECODERS = 16, 2
_MOST_MB = 32
"""A larger original is not read again."""
_MOST_UNANSWERED = 16
"""Failures to reach the store before any success, after which the rest is not tried: each would cost a minute."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A small JPEG as a data URI, or the reason why there is none."""

    data_uri: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    changed: bool = False
    """Whether the image's etag is no longer the one that was scored."""


def read_thumbnails(images: Sequence[tuple[str, str | None]]) -> list[Thumbnail]:
    """Read images by (uri, etag of the prediction), and return their thumbnails in the same order."""
    reader = _Reader()
    with Progress("thumbnails", total=len(images)) as progress, ThreadPoolExecutor(_FETCHERS) as threads:
        thumbnails = []
        for thumbnail in threads.map(lambda image: reader.read(*image), images):
            progress.advance(errors=bool(thumbnail.reason))
            thumbnails.append(thumbnail)
    return thumbnails


class _Reader:
    """Reads thumbnails from many threads."""

    def __init__(self) -> None:
        self._decoding = threading.Semaphore(_DECODERS)
        self._answered = False
        self._unanswered = 0

    def read(self, uri: str, etag: str | None) -> Thumbnail:
        if not self._answered and self._unanswered >= _MOST_UNANSWERED:
            return Thumbnail(reason=f"not tried: the first {_MOST_UNANSWERED} images went without an answer")
        try:
            fetched = _fetch(uri)
        except CarrayError as err:  # such as credentials that expired
            fetched = ReadImage(status="fetch_error", error=str(err))
        if isinstance(fetched, ReadImage) and fetched.error_code in ("timeout", "unavailable"):
            self._unanswered += 1
        else:
            self._answered = True
        if isinstance(fetched, ReadImage):
            return Thumbnail(reason=fetched.error or "")
        with self._decoding:
            return _thumbnail(fetched, changed=None not in (etag, fetched.etag) and etag != fetched.etag)


def _fetch(uri: str) -> FetchedImage | ReadImage:
    fetched = fetch_original(uri, admit=_admit)
    # A row does not say whether a local name was escaped for not being UTF-8, so the plain name is tried first.
    is_absent = isinstance(fetched, ReadImage) and fetched.error_code == "not_found"
    return fetch_original(uri, escaped=True, admit=_admit) if is_absent and "%" in uri and not is_s3(uri) else fetched


def _admit(size_bytes: int) -> None:
    if size_bytes > _MOST_MB * 1_000_000:
        raise DecodeError("too_large", f"the file has over {_MOST_MB} MB, which is not read again for a thumbnail")


def _thumbnail(fetched: FetchedImage, *, changed: bool) -> Thumbnail:
    read = decode_fetched(fetched, picture_settings(THUMBNAIL_PIXELS))
    if read.pixels_HWC is None:
        return Thumbnail(reason=read.error or "")
    jpeg, width, height = small_jpeg(read, quality=_QUALITY)
    text = base64.b64encode(jpeg).decode()
    return Thumbnail(f"data:image/jpeg;base64,{text}", width, height, changed=changed)

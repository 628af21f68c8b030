"""Reads the images of chosen rows again, for small pictures inside a page.

From: uris, with the etags that they were scored under. To: JPEGs as data URIs, or the reason why there is none.
Invariants: upright, whole and never enlarged beyond THUMBNAIL_PIXELS; an image that is another one by now says so;
what cannot be read costs no more than its picture. Fetched by many threads, decoded by few: at most
_FETCHERS x _MOST_MB of originals and _DECODERS decoded ones are in memory.
Cost: one GET an image, and 5 kB of page.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from carray.core.errors import CarrayError, DecodeError, FetchError
from carray.core.progress import Progress
from carray.core.store.files import is_s3
from carray.core.store.image_bytes import FetchedImage, fetch_image
from carray.images.pixels import PixelSettings, decode

__all__ = ["THUMBNAIL_PIXELS", "Thumbnail", "read_thumbnails"]

THUMBNAIL_PIXELS = 168
"""The longer side: 168 x 112 of a photograph, which a card shows at about that size."""

_QUALITY = 72
_FETCHERS, _DECODERS = 16, 2
_MOST_MB = 32
"""A larger original is not read again."""
_PATIENCE = 16
"""Images that may go unanswered before the first answer; a store that is away would cost a minute each."""


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """Holds one picture, or says why there is none."""

    data_uri: str = ""
    width: int = 0
    height: int = 0
    reason: str = ""
    changed: bool = False
    """Whether the image is no longer the one that was scored, going by its etag."""


def read_thumbnails(images: Sequence[tuple[str, str | None]]) -> list[Thumbnail]:
    """Read (uri, etag) pairs again, in any order, and give their pictures in the order given."""
    reader = _Reader()
    with Progress("thumbnails", total=len(images)) as progress, ThreadPoolExecutor(_FETCHERS) as threads:
        made = []
        for thumbnail in threads.map(lambda image: reader.read(*image), images):
            progress.advance(errors=bool(thumbnail.reason))
            made.append(thumbnail)
    return made


class _Reader:
    """Reads in many threads at once."""

    def __init__(self) -> None:
        self._decoding = threading.Semaphore(_DECODERS)
        self._answered = False
        self._unanswered = 0

    def read(self, uri: str, etag: str | None) -> Thumbnail:
        if not self._answered and self._unanswered >= _PATIENCE:
            return Thumbnail(reason=f"not tried: the first {_PATIENCE} images went without an answer")
        try:
            fetched = _fetch(uri)
            self._answered = True
            with self._decoding:
                return _thumbnail(fetched, changed=None not in (etag, fetched.etag) and etag != fetched.etag)
        except CarrayError as err:
            if isinstance(err, FetchError) and err.code in ("timeout", "unavailable"):
                self._unanswered += 1
            else:
                self._answered = True
            return Thumbnail(reason=str(err))


def _fetch(uri: str) -> FetchedImage:
    try:
        return fetch_image(uri, admit=_admit)
    except FetchError as err:
        # A row does not say whether its local name was escaped for not being UTF-8; the plain name goes first.
        if err.code != "not_found" or is_s3(uri) or "%" not in uri:
            raise
        return fetch_image(uri, escaped=True, admit=_admit)


def _admit(size_bytes: int) -> None:
    if size_bytes > _MOST_MB * 1_000_000:
        raise DecodeError("too_large", f"the file has over {_MOST_MB} MB, which is not read again for a thumbnail")


def _thumbnail(fetched: FetchedImage, *, changed: bool) -> Thumbnail:
    """Shrink an image through the one definition of pixels, which turns it upright and refuses what is broken."""
    from PIL import Image

    seen = decode(fetched.data, PixelSettings(decode_size=THUMBNAIL_PIXELS, input_size=THUMBNAIL_PIXELS))
    scale = min(1.0, THUMBNAIL_PIXELS / max(seen.width, seen.height))
    width, height = max(1, round(seen.width * scale)), max(1, round(seen.height * scale))
    buffer = io.BytesIO()
    # From a square to its own shape again.
    Image.fromarray(seen.pixels_HWC).resize((width, height)).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    text = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{text}", width, height, changed=changed)

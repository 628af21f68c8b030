"""Reads and decodes images, within bounds of memory that no image can pass.

From: keys of a shard. To: what became of each, in the order in which they come.
Invariants: a failure to fetch or decode is a row, any other exception is a bug whose message names the image; at most
`fetch_memory_mb` of originals are held, a single larger one alone, and none above `max_image_mb` is read. Whoever
scores decodes, so that no more originals are unpacked at once than it has CPUs, within `pixels`' budget of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.core.at_once import ByteBudget
from carray.core.errors import CarrayError, DecodeError, FetchError
from carray.core.store.files import is_s3
from carray.core.store.image_bytes import FetchedImage, fetch_image
from carray.images.pixels import PixelSettings, decode, view

__all__ = [
    "LOST",
    "Arrival",
    "ImageReader",
    "Reader",
    "SeenImage",
    "decode_image",
    "failed_row",
    "raise_later",
]

FILES_TOGETHER = 8
"""Local files that one task reads: they come so fast that handing each over would cost more than reading it."""

LOST = DecodeError("worker_lost", "the worker process died each time it held this image")
_ERROR_LETTERS = 500
_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class SeenImage:
    """Is what became of one image: its row so far, and the network's input unless it failed."""

    row: dict[str, Any]
    pixels_HWC: npt.NDArray[np.uint8] | None
    """uint8, input_size x input_size x 3, RGB."""


Finish = Callable[[], SeenImage]
"""What is left to do to an image that was read: decoding, which its caller's CPU does when it is called."""
Arrival = tuple[int, Finish]
"""An image's place in its shard, and what is left to do to it."""


class Reader(Protocol):
    """Reads images in the background."""

    def begin(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        """Begin to read images, given by their places in a shard; each is put into `arrived` once it is there."""


class ImageReader:
    """Reads images in this process, many requests under way at once; safe to call from several threads."""

    def __init__(self, settings: ClassifySettings, pixels: PixelSettings) -> None:
        import cv2

        cv2.setNumThreads(1)  # images are decoded side by side already
        self._pixels, self._settings = pixels, settings
        self._pool = ThreadPoolExecutor(max_workers=settings.fetch_concurrency)
        self._budget = ByteBudget(settings.fetch_memory_mb * _MB)

    def begin(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        """Begin to read images, given by their places in a shard; each is put into `arrived` once it is there."""
        places = list(images)
        together = 1 if images and is_s3(images[places[0]].uri) else FILES_TOGETHER
        for start in range(0, len(places), together):
            self._pool.submit(self._read, {place: images[place] for place in places[start : start + together]}, arrived)

    def _read(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        for place, image in images.items():
            try:
                finish = self._fetched(image)
            except BaseException as err:  # raised where the shard is scored, which it stops
                finish = partial(raise_later, _named(err, image))
            arrived.put((place, finish))

    def _fetched(self, image: PlannedImage) -> Finish:
        held = _Held(self._budget, self._settings.max_image_mb)
        try:
            fetched = fetch_image(image.uri, escaped=image.escaped, admit=held.admit)
        except (FetchError, DecodeError) as err:
            held.give_back()
            return partial(SeenImage, failed_row(image, err), None)
        except BaseException:
            held.give_back()
            raise
        return partial(self._decode, image, fetched, held)

    def _decode(self, image: PlannedImage, fetched: FetchedImage, held: _Held) -> SeenImage:
        try:
            return decode_image(fetched, image, self._pixels)
        except DecodeError as err:
            return SeenImage(failed_row(image, err, fetched), None)
        except Exception as err:
            raise _named(err, image) from err
        finally:
            held.give_back()


class _Held:
    """Is what one image holds of the budget."""

    def __init__(self, budget: ByteBudget, max_image_mb: int) -> None:
        self._budget, self._limit_mb, self._bytes = budget, max_image_mb, 0

    def admit(self, size: int) -> None:
        if size > self._limit_mb * _MB:
            raise DecodeError(
                "too_large", f"the file has {size / _MB:,.0f} MB; at most max_image_mb = {self._limit_mb} are read"
            )
        self.give_back()  # of a body that broke off
        self._budget.take(size)
        self._bytes = size

    def give_back(self) -> None:
        self._budget.give_back(self._bytes)
        self._bytes = 0


def _named(err: BaseException, image: PlannedImage) -> BaseException:
    """Say of which image an error is that is no row: a bug of ours, which never counts as bad data."""
    if isinstance(err, CarrayError) or not isinstance(err, Exception):
        return err
    named = RuntimeError(f"reading {image.uri!r} failed with {type(err).__name__}: {err}")
    named.__cause__ = err
    return named


def raise_later(err: BaseException) -> SeenImage:
    """Be the `Finish` of an image whose error is to stop its shard."""
    raise err


def decode_image(fetched: FetchedImage, image: PlannedImage, settings: PixelSettings) -> SeenImage:
    """Turn an image's bytes into the network's input: `pixels.decode`, then `pixels.view`.

    Raises:
        DecodeError: the bytes are not a usable image.
    """
    seen = decode(fetched.data, settings, box=image.box)
    row = {
        "uri": image.uri,
        "etag": fetched.etag,
        "size_bytes": len(fetched.data),
        "width": seen.width,
        "height": seen.height,
        "status": "ok",
        "phash": seen.phash,
    }
    return SeenImage(row, view(seen.pixels_HWC, settings))


def failed_row(
    image: PlannedImage, err: FetchError | DecodeError, fetched: FetchedImage | None = None
) -> dict[str, Any]:
    """Give the row of an image that could not be read or decoded."""
    read = {"etag": fetched.etag, "size_bytes": len(fetched.data)} if fetched else {}
    status = "fetch_error" if isinstance(err, FetchError) else "decode_error"
    return {"uri": image.uri, "status": status, "error_code": err.code, "error": str(err)[:_ERROR_LETTERS]} | read

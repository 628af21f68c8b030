"""Reads and decodes images side by side, within bounds of memory that no image can pass.

From: keys of a shard. To: what became of each, in their order.
Invariants: a failure to fetch or decode is a row, any other exception is a bug whose message names the image; at most
`fetch_memory_mb` of originals are held, a single larger one alone, and none above `max_image_mb` is read; only threads
+ 1 originals are unpacked at once, each of 270 MB at most (pixels.MAX_PIXELS).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from carray.core.errors import CarrayError, DecodeError, FetchError
from carray.core.images import FetchedImage, fetch_image
from carray.pixels import PixelSettings, decode, view
from carray.predictions.format import ClassifySettings, PlannedImage

__all__ = ["LOST", "ByteBudget", "ImageReader", "Reader", "SeenImage", "decode_image", "failed_row"]

LOST = DecodeError("worker_lost", "the worker process died each time it held this image")
_ERROR_LETTERS = 500
_MB = 1_000_000


@dataclass(frozen=True, slots=True)
class SeenImage:
    """Is what became of one image: its row so far, and the network's input unless it failed."""

    row: dict[str, Any]
    pixels_HWC: npt.NDArray[np.uint8] | None
    """uint8, input_size x input_size x 3, RGB."""


class Reader(Protocol):
    """Begins to read images, and gives what became of each, in order, to whoever then asks."""

    def begin(self, images: Sequence[PlannedImage]) -> Iterator[SeenImage]:
        """Start reading; the answer may be iterated over later."""


class ByteBudget:
    """Holds back reads while the bytes in hand would pass a limit; safe to call from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, size: int) -> None:
        """Let others have these bytes."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()


class ImageReader:
    """Reads images in this process: many requests under way, few originals unpacked; safe from several threads."""

    def __init__(self, settings: ClassifySettings, pixels: PixelSettings) -> None:
        import cv2

        cv2.setNumThreads(1)  # images are decoded side by side already
        self._pixels, self._settings = pixels, settings
        self._pool = ThreadPoolExecutor(max_workers=settings.fetch_concurrency)
        self._decoding = threading.Semaphore(settings.threads + 1)
        self._budget = ByteBudget(settings.fetch_memory_mb * _MB)

    def begin(self, images: Sequence[PlannedImage]) -> Iterator[SeenImage]:
        """Start reading; the answer may be iterated over later."""
        futures = [self._pool.submit(self._see, image) for image in images]
        return (future.result() for future in futures)

    def _see(self, image: PlannedImage) -> SeenImage:
        try:
            with self._admission() as admit:
                fetched = fetch_image(image.uri, escaped=image.escaped, admit=admit)
                try:
                    with self._decoding:
                        return decode_image(fetched, image, self._pixels)
                except DecodeError as err:
                    return SeenImage(failed_row(image, err, fetched), None)
        except (FetchError, DecodeError) as err:
            return SeenImage(failed_row(image, err), None)
        except CarrayError:
            raise
        except Exception as err:  # a bug of ours: it stops the shard, and never counts as bad data
            raise RuntimeError(f"reading {image.uri!r} failed with {type(err).__name__}: {err}") from err

    @contextmanager
    def _admission(self) -> Iterator[Callable[[int], None]]:
        held = 0

        def admit(size: int) -> None:
            nonlocal held
            if size > self._settings.max_image_mb * _MB:
                raise DecodeError(
                    "too_large",
                    f"the file has {size / _MB:,.0f} MB; at most max_image_mb = {self._settings.max_image_mb} are read",
                )
            self._budget.give_back(held)  # of a body that broke off
            held = 0
            self._budget.take(size)
            held = size

        try:
            yield admit
        finally:
            self._budget.give_back(held)


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

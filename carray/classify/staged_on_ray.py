"""Reads and decodes on other machines of the cluster, for a scoring worker whose own has too few cores.

From: keys of a shard, in a scoring worker. To: what became of each; their pixels travel through Ray's object store.
Decoding a large JPEG costs a core 5 to 20 ms, and a GPU scores thousands of images a second: on a machine of few cores
it would wait for them (`layout`).
Invariants: as for `reading.ImageReader`; a decoding process that dies is started again and its images are given to it
once more, then one at a time, and the one that kills it again is a row of code worker_lost.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError, RayTaskError

from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.classify.read_images import LOST, Arrival, ImageReader, SeenImage, failed_row, raise_later
from carray.images.pixels import PixelSettings

__all__ = ["RemoteReader"]

IMAGES_A_CALL = 16
"""Enough to make a call's cost small (about 2 ms), few enough to spread a window over many processes."""


class RemoteReader:
    """Reads images in processes of their own, which Ray puts where there are cores; safe from several threads."""

    def __init__(
        self,
        settings: ClassifySettings,
        pixels: PixelSettings,
        *,
        decoders: int,
        cpus: int,
        environment: dict[str, str],
    ) -> None:
        """Start `decoders` processes of `cpus` CPUs each; they end with the process that started them."""
        actor: Any = ray.remote(_Decoder).options(num_cpus=cpus, max_restarts=-1, max_concurrency=2)
        given = (settings.model_dump(), pixels.model_dump(), environment)
        self._turns = itertools.cycle([actor.remote(*given) for _ in range(decoders)])
        self._waiting = ThreadPoolExecutor(max_workers=32)

    def begin(self, images: Mapping[int, PlannedImage], arrived: SimpleQueue[Arrival]) -> None:
        """Begin to read images, given by their places in a shard; each is put into `arrived` once it is there."""
        places = list(images)
        for start in range(0, len(places), IMAGES_A_CALL):
            part = places[start : start + IMAGES_A_CALL]
            decoder = next(self._turns)
            answer = decoder.read.remote([images[place] for place in part])
            self._waiting.submit(self._receive, part, images, decoder, answer, arrived)

    def _receive(
        self,
        places: list[int],
        images: Mapping[int, PlannedImage],
        decoder: Any,
        answer: Any,
        arrived: SimpleQueue[Arrival],
    ) -> None:
        try:
            seen = self._seen([images[place] for place in places], decoder, answer)
        except BaseException as err:  # raised where the shard is scored, which it stops
            if isinstance(err, RayTaskError):  # as what it was where it was raised: a sentence stays a sentence
                err = err.cause
            for place in places:
                arrived.put((place, partial(raise_later, err)))
            return
        for place, image in zip(places, seen, strict=True):
            arrived.put((place, partial(_same, image)))

    def _seen(self, images: list[PlannedImage], decoder: Any, answer: Any) -> list[SeenImage]:
        for attempt in range(2):
            try:
                rows, pixels_NHWC = ray.get(answer)
            except RayActorError:
                answer = decoder.read.remote(images) if attempt == 0 else None
                continue
            sound = iter(pixels_NHWC)
            return [SeenImage(row, next(sound) if row["status"] == "ok" else None) for row in rows]
        if len(images) == 1:
            return [SeenImage(failed_row(images[0], LOST), None)]
        return [seen for image in images for seen in self._seen([image], decoder, decoder.read.remote([image]))]


def _same(seen: SeenImage) -> SeenImage:
    return seen


class _Decoder:
    """Is one reading process."""

    def __init__(self, settings: dict[str, Any], pixels: dict[str, Any], environment: dict[str, str]) -> None:
        import os

        os.environ.update(environment)
        chosen = ClassifySettings.model_validate(settings).model_copy(update={"threads": 1})
        self._reader = ImageReader(chosen, PixelSettings.model_validate(pixels))

    def read(self, images: list[PlannedImage]) -> tuple[list[dict[str, Any]], npt.NDArray[np.uint8]]:
        arrived: SimpleQueue[Arrival] = SimpleQueue()
        self._reader.begin(dict(enumerate(images)), arrived)
        finishes = dict(arrived.get() for _ in images)
        seen = [finishes[place]() for place in range(len(images))]
        pixels = [image.pixels_HWC for image in seen if image.pixels_HWC is not None]
        return [image.row for image in seen], np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)

"""Reads and decodes on other machines of the cluster, for a scoring worker whose own has too few cores.

From: keys of a shard, in a scoring worker. To: what became of each, in their order; their pixels travel through Ray's
object store. Decoding a large JPEG costs a core 5 to 20 ms, and a GPU scores thousands of images a second: on a machine
of few cores it would wait for them (`layout`).
Invariants: as for `reading.ImageReader`; a decoding process that dies is started again and its images are given to it
once more, then one at a time, and the one that kills it again is a row of code worker_lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayActorError

from carray.pixels import PixelSettings
from carray.predictions.format import ClassifySettings, PlannedImage
from carray.predictions.reading import LOST, ImageReader, SeenImage, failed_row

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
        self._decoders = [actor.remote(*given) for _ in range(decoders)]
        self._next = 0

    def begin(self, images: Sequence[PlannedImage]) -> Iterator[SeenImage]:
        """Start reading; the answer may be iterated over later."""
        parts = [images[start : start + IMAGES_A_CALL] for start in range(0, len(images), IMAGES_A_CALL)]
        begun = [(part, *self._send(part)) for part in parts]
        return (seen for part, decoder, answer in begun for seen in self._receive(part, decoder, answer))

    def _send(self, images: Sequence[PlannedImage]) -> tuple[Any, Any]:
        decoder = self._decoders[self._next % len(self._decoders)]
        self._next += 1
        return decoder, decoder.read.remote(list(images))

    def _receive(self, images: Sequence[PlannedImage], decoder: Any, answer: Any) -> Iterator[SeenImage]:
        for attempt in range(2):
            try:
                rows, pixels_NHWC = ray.get(answer)
            except RayActorError:
                answer = decoder.read.remote(list(images)) if attempt == 0 else None
                continue
            sound = iter(pixels_NHWC)
            yield from [SeenImage(row, next(sound) if row["status"] == "ok" else None) for row in rows]
            return
        for image in images:
            if len(images) == 1:
                yield SeenImage(failed_row(image, LOST), None)
            else:
                yield from self._receive([image], decoder, decoder.read.remote([image]))


class _Decoder:
    """Is one reading process."""

    def __init__(self, settings: dict[str, Any], pixels: dict[str, Any], environment: dict[str, str]) -> None:
        import os

        os.environ.update(environment)
        chosen = ClassifySettings.model_validate(settings).model_copy(update={"threads": 1})
        self._reader = ImageReader(chosen, PixelSettings.model_validate(pixels))

    def read(self, images: list[PlannedImage]) -> tuple[list[dict[str, Any]], npt.NDArray[np.uint8]]:
        seen = list(self._reader.begin(images))
        pixels = [image.pixels_HWC for image in seen if image.pixels_HWC is not None]
        return [image.row for image in seen], np.stack(pixels) if pixels else np.empty((0, 0, 0, 3), np.uint8)

"""Turns image bytes into pixels, the same way for training, evaluation and classification.

`decode` gives the decoded square, which the shared block holds; `view` turns that into the network's input.
Shape letters everywhere: N images, B batch, H height, W width, C = 3 channels, K classes, D features, E epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from carray.core.at_once import ByteBudget
from carray.core.errors import DecodeError
from carray.core.settings import Settings
from carray.images.decoding import MAX_PIXELS, Opened, Pixels, open_image

__all__ = ["MAX_PIXELS", "Box", "DecodedImage", "PixelSettings", "decode", "decode_original", "plain_crop_size", "view"]

MAX_SIDE = 2048
"""The largest decoded square and network's input, pixels."""

MEMORY_BYTES = 1_000_000_000
"""The most memory of the images that a process decodes at once: one of the largest, or many of common sizes."""
_MEMORY = ByteBudget(MEMORY_BYTES)

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels of the upright image, x2 and y2 exclusive."""


def plain_crop_size(input_size: int, view_crop: float) -> int:
    """Compute the decode_size of which the central crop `view_crop` is input_size pixels wide; at most MAX_SIDE."""
    return min(round(input_size / view_crop), MAX_SIDE)


class PixelSettings(Settings):
    """How bytes become the network's input; part of the bundle."""

    input_size: int = Field(default=160, ge=8, le=MAX_SIDE)
    """Side of the network's input, pixels."""
    view_crop: float = Field(default=0.9, gt=0.0, le=1.0)
    """Side of the central crop that evaluation sees, as a fraction of decode_size.

    Random crops show training larger objects than the whole image does; evaluation should see the same size (Touvron
    et al., 'Fixing the train-test resolution discrepancy', 2019). Measured: results/LOG.md.
    """
    decode_size: int = Field(
        default_factory=lambda known: plain_crop_size(known["input_size"], known["view_crop"]), ge=8, le=MAX_SIDE
    )
    """Side of the decoded square, pixels; one shared block exists per value.

    Left out, it is input_size / view_crop, so that the network's input is cut from the square without a second resize;
    a search takes the largest size of its trials.
    """
    aspect: Literal["squash", "crop", "pad"] = "squash"
    """How an image that is not square becomes one; pad is grey (128)."""
    interpolation: Literal["area", "linear", "cubic"] = "area"
    """Resampling of every resize; area averages when it shrinks, which keeps fine detail from aliasing."""
    reduced_scale: bool = True
    """Whether a JPEG may be decoded at 1/2, 1/4 or 1/8 when that still covers decode_size."""

    @model_validator(mode="after")
    def _check_sizes(self) -> PixelSettings:
        if self.input_size > self.decode_size:
            raise ValueError(
                f"input_size is {self.input_size}, above decode_size {self.decode_size}; lower it or raise decode_size"
            )
        return self


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """An image's pixels and what was measured while decoding it."""

    pixels_HWC: Pixels
    """uint8, decode_size x decode_size x 3, RGB."""
    width: int
    """Of the upright original, pixels."""
    height: int
    phash: int
    """64-bit difference hash of the whole upright image (or its box), its bits as a signed integer, which every
    engine's tables hold; near duplicates differ in few bits."""


def decode(data: bytes, settings: PixelSettings, *, box: Box | None = None) -> DecodedImage:
    """Decode one image's bytes, upright, cut to `box` if given, to decode_size x decode_size x 3 uint8 RGB.

    Raises:
        DecodeError: code empty, unsupported, too_large, truncated, damaged or bad_box.
    """
    image = open_image(data)
    width, height = image.upright_size
    if box is not None:
        box = _clamp(box, width, height)
    cover = _cover(settings, width, height, box)
    with _MEMORY.hold(image.memory_bytes(cover)):
        return _decode_opened(image, settings, box, cover)


def _decode_opened(image: Opened, settings: PixelSettings, box: Box | None, cover: int) -> DecodedImage:
    """Decode within the memory budget; a function of its own, so that its arrays are freed before the budget is."""
    width, height = image.upright_size
    source_HWC = image.read_upright(cover)
    if box is not None:
        source_HWC = _cut(source_HWC, box, width, height)
    square_HWC = _to_square(source_HWC, settings)
    # A squashed square shows all of the image, and has fewer pixels to average.
    whole_HWC = square_HWC if settings.aspect == "squash" else source_HWC
    return DecodedImage(square_HWC, width, height, _difference_hash(whole_HWC))


def decode_original(data: bytes, *, box: Box | None = None) -> Pixels:
    """Decode one image's bytes at full size, upright, cut to `box` if given: height x width x 3 uint8 RGB.

    For corruptions of the original; a network's input comes from `decode` and `view` only.

    Raises:
        DecodeError: code empty, unsupported, too_large, truncated, damaged or bad_box.
    """
    image = open_image(data)
    width, height = image.upright_size
    with _MEMORY.hold(image.memory_bytes(0)):
        source_HWC = image.read_upright(0)
    return source_HWC if box is None else _cut(source_HWC, _clamp(box, width, height), width, height)


def view(pixels_HWC: Pixels, settings: PixelSettings) -> Pixels:
    """Crop and resize decoded pixels to the network's input: input_size x input_size x 3 uint8, contiguous."""
    side = max(1, round(settings.decode_size * settings.view_crop))
    top = (settings.decode_size - side) // 2
    cropped_HWC = pixels_HWC[top : top + side, top : top + side]
    return _resize(cropped_HWC, settings.input_size, settings.input_size, settings)


def _cover(settings: PixelSettings, width: int, height: int, box: Box | None) -> int:
    """Compute the shortest side, pixels, that the decoded original must keep; 0 means full size."""
    if not settings.reduced_scale:
        return 0
    if box is None:
        return settings.decode_size
    shortest = max(1, min(box[2] - box[0], box[3] - box[1]))
    return min(settings.decode_size * min(width, height) // shortest + 1, min(width, height))


def _clamp(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
    if x2 <= x1 or y2 <= y1:
        raise DecodeError("bad_box", f"the box {box} covers nothing of an image of {width} x {height} pixels")
    return x1, y1, x2, y2


def _cut(pixels_HWC: Pixels, box: Box, width: int, height: int) -> Pixels:
    x1, y1, x2, y2 = box
    scale_x, scale_y = pixels_HWC.shape[1] / width, pixels_HWC.shape[0] / height
    left, top = int(x1 * scale_x), int(y1 * scale_y)
    right, bottom = max(left + 1, round(x2 * scale_x)), max(top + 1, round(y2 * scale_y))
    return pixels_HWC[top:bottom, left:right]


def _to_square(pixels_HWC: Pixels, settings: PixelSettings) -> Pixels:
    size = settings.decode_size
    height, width = pixels_HWC.shape[:2]
    if settings.aspect == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels_HWC = pixels_HWC[top : top + side, left : left + side]
    elif settings.aspect == "pad":
        scale = size / max(height, width)
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        inner = _resize(pixels_HWC, new_height, new_width, settings)
        padded_HWC = np.full((size, size, 3), 128, dtype=np.uint8)
        top, left = (size - new_height) // 2, (size - new_width) // 2
        padded_HWC[top : top + new_height, left : left + new_width] = inner
        return padded_HWC
    return _resize(pixels_HWC, size, size, settings)


def _resize(pixels_HWC: Pixels, height: int, width: int, settings: PixelSettings) -> Pixels:
    import cv2

    if pixels_HWC.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels_HWC)
    kinds = {"area": cv2.INTER_AREA, "linear": cv2.INTER_LINEAR, "cubic": cv2.INTER_CUBIC}
    # OpenCV reads a slice in place; a copy of a large one would cost as much as its decoding.
    resized = cv2.resize(pixels_HWC, (width, height), interpolation=kinds[settings.interpolation])
    return np.asarray(resized, dtype=np.uint8)


def _difference_hash(pixels_HWC: Pixels) -> int:
    """Hash 9 x 8 grey means by the sign of their horizontal differences (Krawetz, 'Kind of Like That', 2013)."""
    import cv2

    small_HWC = cv2.resize(pixels_HWC, (9, 8), interpolation=cv2.INTER_AREA)
    grey_HW = small_HWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return int.from_bytes(np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1]).tobytes(), "big", signed=True)

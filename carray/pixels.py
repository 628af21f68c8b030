"""Turns image bytes into pixels: the only definition, for training, evaluation and classification alike.

From: the bytes of one image. To: uint8 RGB. `decode` gives `decode_size` pixels (what the shared block holds), `view`
turns those into the network's input. Shape letters, here and everywhere: N images, B batch, H height, W width, C = 3
channels, K classes, D features, E epochs.
Invariants: the same bytes and settings give the same pixels in every process; a broken or truncated file is a
`DecodeError`, never a grey square; EXIF orientation is applied; alpha is laid over white; the first frame stands for
an animation. Colour JPEGs are decoded by libjpeg-turbo at the smallest of 1, 1/2, 1/4 and 1/8 of their size that still
covers `decode_size`; everything else by Pillow.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from carray.core.errors import DecodeError
from carray.core.settings import Settings

__all__ = ["Box", "DecodedImage", "PixelSettings", "decode", "decode_original", "view"]

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels of the upright image, x2 and y2 exclusive."""

MAX_PIXELS = 89_000_000
"""A larger image is `too_large`: just under the size at which Pillow warns of a decompression bomb."""


class PixelSettings(Settings):
    """Says how bytes become the network's input; travels in the bundle."""

    decode_size: int = Field(default=184, ge=8, le=2048)
    """Side of the decoded square, pixels; one shared block exists per value."""
    aspect: Literal["squash", "crop", "pad"] = "squash"
    """How an image that is not square becomes one; pad is grey (128)."""
    view_crop: float = Field(default=0.9, gt=0.0, le=1.0)
    """Side of the central crop that evaluation sees, as a fraction of decode_size.

    Random crops show training larger objects than the whole image does; evaluation should see the same size (Touvron
    et al., 'Fixing the train-test resolution discrepancy', 2019). Measured: results/LOG.md.
    """
    input_size: int = Field(default=160, ge=8, le=2048)
    """Side of the network's input, pixels."""
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
    """Holds one image's pixels and what was seen while decoding it."""

    pixels_HWC: Pixels
    """uint8, decode_size x decode_size x 3, RGB."""
    width: int
    """Of the upright original, pixels."""
    height: int
    phash: int
    """64-bit difference hash of the whole upright image (or its box); near duplicates differ in few bits."""


def decode(data: bytes, settings: PixelSettings, *, box: Box | None = None) -> DecodedImage:
    """Decode one image's bytes, upright, cut to `box` if given, to decode_size x decode_size x 3 uint8 RGB.

    Raises:
        DecodeError: code empty, unsupported, too_large, truncated or bad_box.
    """
    image = _open(data)
    width, height = _upright_size(image)
    if box is not None:
        box = _clamp(box, width, height)
    source_HWC = _read_upright(data, image, _cover(settings, width, height, box))
    if box is not None:
        source_HWC = _cut(source_HWC, box, width, height)
    return DecodedImage(_to_square(source_HWC, settings), width, height, _difference_hash(source_HWC))


def decode_original(data: bytes, *, box: Box | None = None) -> Pixels:
    """Decode one image's bytes at full size, upright, cut to `box` if given: height x width x 3 uint8 RGB.

    For who changes pictures before `decode` reads them; what a network sees comes from `decode` and `view` alone.

    Raises:
        DecodeError: code empty, unsupported, too_large, truncated or bad_box.
    """
    image = _open(data)
    width, height = _upright_size(image)
    source_HWC = _read_upright(data, image, 0)
    return source_HWC if box is None else _cut(source_HWC, _clamp(box, width, height), width, height)


def view(pixels_HWC: Pixels, settings: PixelSettings) -> Pixels:
    """Give evaluation's one view of decoded pixels: input_size x input_size x 3 uint8, contiguous."""
    side = max(1, round(settings.decode_size * settings.view_crop))
    top = (settings.decode_size - side) // 2
    cropped_HWC = pixels_HWC[top : top + side, top : top + side]
    return _resize(cropped_HWC, settings.input_size, settings.input_size, settings)


def _open(data: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DecodeError("empty", "the file has zero bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError:
        raise DecodeError("too_large", f"the image has over {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        if _lacks_end(data):
            raise DecodeError("truncated", "the file ends within the image's header") from None
        raise DecodeError("unsupported", "the bytes are not an image in a known format") from None
    except Exception as err:  # Pillow's plugins raise anything at all on hostile headers
        if _lacks_end(data):
            raise DecodeError("truncated", f"the file ends within the image's header ({_one_line(err)})") from None
        raise DecodeError("unsupported", f"the image's header cannot be read ({_one_line(err)})") from None
    if image.width * image.height > MAX_PIXELS:
        raise DecodeError(
            "too_large", f"the image has {image.width:,} x {image.height:,} pixels; at most {MAX_PIXELS:,} are decoded"
        )
    return image


def _read_upright(data: bytes, image: Any, cover: int) -> Pixels:
    source_HWC = _read_jpeg(data, image, cover) if _is_plain_jpeg(image) else None
    return _turn_upright(_read_pillow(image) if source_HWC is None else source_HWC, image)


def _lacks_end(data: bytes) -> bool:
    ends = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PNG": b"IEND"}
    return any(data.startswith(start) and end not in data[-64:] for start, end in ends.items())


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels, which may be whole
        return 1


def _upright_size(image: Any) -> tuple[int, int]:
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else (image.width, image.height)


def _is_plain_jpeg(image: Any) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _cover(settings: PixelSettings, width: int, height: int, box: Box | None) -> int:
    """Give the shortest side, pixels, that the decoded original must keep; 0 means its full size."""
    if not settings.reduced_scale:
        return 0
    if box is None:
        return settings.decode_size
    shortest = max(1, min(box[2] - box[0], box[3] - box[1]))
    return min(settings.decode_size * min(width, height) // shortest + 1, min(width, height))


def _read_jpeg(data: bytes, image: Any, cover: int) -> Pixels | None:
    """Decode with libjpeg-turbo; None when it refuses, so that Pillow, which tells damage from oddity, decides."""
    import simplejpeg

    height, width = _reduced_size(image.height, image.width, cover)
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=height, min_width=width, strict=True)
    except ValueError:
        return None


def _reduced_size(height: int, width: int, cover: int) -> tuple[int, int]:
    """Give the least height and width to ask libjpeg-turbo for, 0 for full size.

    It also offers 3/8, 5/8, 6/8 and 7/8, but has fast code for none of them: at 6/8 a 2,048 x 1,536 JPEG takes 15 ms
    and at full size, which keeps more detail, 10 ms.
    """
    for denominator in (8, 4, 2) if cover else ():
        reduced = -(-height // denominator), -(-width // denominator)
        if min(reduced) >= cover:
            return reduced
    return 0, 0


def _read_pillow(image: Any) -> Pixels:
    from PIL import Image

    try:
        image.seek(0)
        image.load()
        if image.mode.startswith("I"):
            return _from_integers(np.asarray(image))
        if image.mode == "F":
            raise DecodeError("unsupported", "the image holds floating-point pixels, whose white is not known")
        if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
        return np.array(image.convert("RGB"))
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("too_large", "the image did not fit into memory") from None
    except Exception as err:  # Pillow's plugins raise anything at all on damaged data
        text = _one_line(err)
        code = "truncated" if "truncated" in text or "Truncated" in text else "unsupported"
        raise DecodeError(code, f"the image's data is damaged ({text})") from None


def _from_integers(values_HW: npt.NDArray[Any]) -> Pixels:
    """Map 16-bit grey (which Pillow may widen to 32) to 8 bits by its high byte."""
    high = values_HW.astype(np.int64).clip(0, 65535) >> 8
    return np.repeat(high.astype(np.uint8)[:, :, None], 3, axis=2)


def _turn_upright(pixels_HWC: Pixels, image: Any) -> Pixels:
    """Apply EXIF orientation 1 to 8 (JEITA CP-3451, tag 0x0112)."""
    turns = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p.swapaxes(0, 1)[:, ::-1],
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p.swapaxes(0, 1)[::-1],
    }
    turn = turns.get(_orientation(image))
    return np.ascontiguousarray(turn(pixels_HWC)) if turn else pixels_HWC


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
    # OpenCV reads a cut-out where it lies; a copy of a large one would cost as much as its decoding.
    resized = cv2.resize(pixels_HWC, (width, height), interpolation=kinds[settings.interpolation])
    return np.asarray(resized, dtype=np.uint8)


def _difference_hash(pixels_HWC: Pixels) -> int:
    """Hash 9 x 8 grey means by the sign of their horizontal differences (Krawetz, 'Kind of Like That', 2013)."""
    import cv2

    small_HWC = cv2.resize(pixels_HWC, (9, 8), interpolation=cv2.INTER_AREA)
    grey_HW = small_HWC.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return int.from_bytes(np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1]).tobytes(), "big")


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__

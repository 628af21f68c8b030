"""Opens the bytes of one image, and reads them: upright, 8-bit RGB, at full size or at a JPEG's reduced scale.

From: bytes that may be anything. To: uint8 RGB, or a `DecodeError`.
Invariants: a broken or truncated file is an error, never a grey square; EXIF orientation is applied; alpha is laid over
white; the first frame stands for an animation. Colour JPEGs are decoded by libjpeg-turbo; everything else by Pillow,
which is asked for FORMATS only: it knows some forty, and hands one of them (EPS) to Ghostscript.
Memory: 0.65 GB at most, for a picture of MAX_PIXELS.
"""

from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import DecodeError

__all__ = ["MAX_PIXELS", "Pixels", "open_image", "read_upright", "upright_size"]

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 89_000_000
"""A larger image is `too_large`: just under the size at which Pillow warns of a decompression bomb."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of what is decoded, whatever the file is called."""

MAX_SCANS = 64
"""A progressive JPEG has about ten; each goes over the whole picture, so that a few kilobytes of them cost minutes."""

_STRIP_PIXELS = 4_000_000
"""What is turned into RGB at once, so that a large picture of a rare mode takes no more memory than a common one."""


def open_image(data: bytes) -> Any:
    """Open an image's header, as Pillow's image, and refuse what would cost too much to decode.

    Raises:
        DecodeError: code empty, unsupported, too_large or truncated.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DecodeError("empty", "the file has zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
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
    if "progressive" in image.info and data.count(b"\xff\xda") > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise DecodeError("unsupported", f"the JPEG has over {MAX_SCANS} scans, each of which costs a whole decoding")
    return image


def _scans(data: bytes) -> int:
    """Count a JPEG's scans up to its end, behind which cameras put films and other pictures (ITU T.81, B.1)."""
    scans, place = 0, 2
    while (found := _MARKER.search(data, place)) is not None and found[1] != b"\xd9":
        scans += found[1] == b"\xda"
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""What begins a segment: in a scan's own bytes 0xff stands only before a zero or a restart, 0xd0 to 0xd7."""


def read_upright(data: bytes, image: Any, cover: int) -> Pixels:
    """Read the pixels of an opened image, upright: height x width x 3 uint8 RGB.

    `cover` is the shortest side, pixels, that must be left; a JPEG may then come at 1/2, 1/4 or 1/8. 0 is full size.

    Raises:
        DecodeError: code unsupported, too_large or truncated.
    """
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


def upright_size(image: Any) -> tuple[int, int]:
    """Give the width and height of an opened image once it is upright, pixels."""
    return (image.height, image.width) if _orientation(image) in (5, 6, 7, 8) else (image.width, image.height)


def _is_plain_jpeg(image: Any) -> bool:
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


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
    try:
        image.seek(0)
        image.load()
        if image.width * image.height > MAX_PIXELS:  # a frame may be larger than its file's header says
            raise DecodeError("too_large", f"the image has over {MAX_PIXELS:,} pixels")
        if image.mode == "F":
            raise DecodeError("unsupported", "the image holds floating-point pixels, whose white is not known")
        pixels_HWC = np.empty((image.height, image.width, 3), dtype=np.uint8)
        rows = max(1, _STRIP_PIXELS // image.width)
        for top in range(0, image.height, rows):
            bottom = min(top + rows, image.height)
            strip = image if rows >= image.height else image.crop((0, top, image.width, bottom))
            pixels_HWC[top:bottom] = _to_rgb(strip)
        return pixels_HWC
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("too_large", "the image did not fit into memory") from None
    except Exception as err:  # Pillow's plugins raise anything at all on damaged data
        text = _one_line(err)
        code = "truncated" if "truncated" in text or "Truncated" in text else "unsupported"
        raise DecodeError(code, f"the image's data is damaged ({text})") from None


def _to_rgb(image: Any) -> Pixels:
    from PIL import Image

    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image))
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


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


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split()) or type(err).__name__

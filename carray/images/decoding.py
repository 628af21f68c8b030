"""Decodes the bytes of one image: upright, 8-bit RGB, at full size or at a JPEG's reduced scale.

A truncated or damaged file is an error, as far as its format tells (BMP, uncompressed TIFF, WebP, AVIF and HEIC have no
checksums).
Orientation is taken from EXIF, else from XMP; alpha is laid over white; an animation gives its first frame. JPEGs are
decoded by libjpeg-turbo, all else by Pillow and its plugin for HEIC, limited to FORMATS: one of the others (EPS) runs
Ghostscript.
"""

from __future__ import annotations

import io
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import DecodeError
from carray.core.text import one_line
from carray.images.foreign import name_contents
from carray.images.jpegs import check_scans, decode_samples, has_several_scans

__all__ = ["MAX_PIXELS", "Opened", "Pixels", "open_image"]

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 89_000_000
"""The most pixels to decode; of a JPEG, at the scale at which it is read."""

MAX_STORED_PIXELS = 1_000_000_000
"""The most pixels of a JPEG at full size, which is unpacked at any scale: about 8 seconds of a core."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""Pillow's names of the formats that are decoded, whatever the file's suffix; HEIF is that of HEIC files."""

_PIXEL_BYTES = 7
"""Memory of a pixel while it is decoded: up to 4 bytes in Pillow or as CMYK, and 3 as RGB."""
_MAX_BYTES = MAX_PIXELS * _PIXEL_BYTES

_STRIP_PIXELS = 4_000_000
"""Pixels converted to RGB at once, so that a large image of a rare mode takes no more memory than a common one."""

_PILLOW_BLOCK_BYTES = 1 << 26
"""Above 32 MB, the most that glibc takes from an arena (mallopt(3), M_MMAP_THRESHOLD)."""

_REFUSALS = re.compile(r"unknown|not supported|unsupported|not available|not implemented|cannot find|conversion", re.I)
"""Pillow's messages about an unsupported image; any other error in pixel data means damage."""

# Pillow's warnings about metadata or size repeat a row's status, or have no effect on the pixels.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True)
class Opened:
    """An image whose header was read."""

    data: bytes
    image: Any
    """Pillow's image; its pixels are not read yet."""
    stored_width: int
    """Pixels, before the image is turned upright."""
    stored_height: int
    orientation: int
    """1 to 8 (JEITA CP-3451, tag 0x0112); any other value counts as 1."""
    several_scans: bool
    """Whether it is a JPEG whose decoder keeps all coefficients in memory, 2 bytes each, at any scale."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """The width and height of the upright image, pixels."""
        size = self.stored_width, self.stored_height
        return size[::-1] if self.orientation in (5, 6, 7, 8) else size

    def memory_bytes(self, cover: int) -> int:
        """Compute the memory that `read_upright` needs, bytes.

        Raises:
            DecodeError: code too_large: more pixels or bytes than are decoded.
        """
        width, height, coefficient_bytes = self.stored_width, self.stored_height, 0
        if self._is_jpeg:
            reduced_height, reduced_width = _reduced_size(height, width, cover)
            if self.several_scans:
                coefficient_bytes = int(2 * width * height * _samples_per_pixel(self.image.layer))
            width, height = reduced_width or width, reduced_height or height
        _check_pixels(self.stored_width, self.stored_height, width * height)
        taken = width * height * _PIXEL_BYTES + coefficient_bytes
        if taken > _MAX_BYTES:
            raise DecodeError(
                "too_large",
                f"decoding a JPEG of {self.stored_width:,} x {self.stored_height:,} pixels in several scans takes "
                f"{taken / 1e6:,.0f} MB of memory; at most {_MAX_BYTES / 1e6:,.0f} MB are taken",
            )
        return taken

    def read_upright(self, cover: int) -> Pixels:
        """Read the pixels, upright: height x width x 3 uint8 RGB.

        A JPEG may be read at 1/2, 1/4 or 1/8 where its shortest side keeps `cover` pixels; 0 means full size.

        Raises:
            DecodeError: code unsupported, too_large, truncated or damaged.
        """
        if self._is_jpeg and (pixels_HWC := self._read_jpeg(cover)) is not None:
            return _turn_upright(pixels_HWC, self.orientation)
        had_tag = _exif_orientation(self.image) is not None
        pixels_HWC = _read_pillow(self.image, self.data)
        # Pillow turns a TIFF by itself, and then forgets its orientation.
        is_turned = self.image.format == "TIFF" and had_tag and _exif_orientation(self.image) is None
        self.image.close()  # frees its own pixels
        return pixels_HWC if is_turned else _turn_upright(pixels_HWC, self.orientation)

    @property
    def _is_jpeg(self) -> bool:
        return self.image.format in ("JPEG", "MPO") and self.image.mode in ("RGB", "L", "CMYK")

    def _read_jpeg(self, cover: int) -> Pixels | None:
        """Decode with libjpeg-turbo; None where it does not support the kind of JPEG, so that Pillow tries."""
        height, width = _reduced_size(self.stored_height, self.stored_width, cover)
        colorspace = "CMYK" if self.image.mode == "CMYK" else "RGB"
        try:
            samples_HWC = decode_samples(
                self.data, colorspace, height=height, width=width, several_scans=self.several_scans
            )
        except MemoryError:
            raise DecodeError("too_large", "the image did not fit into memory") from None
        return _from_cmyk(samples_HWC) if samples_HWC is not None and colorspace == "CMYK" else samples_HWC


def open_image(data: bytes) -> Opened:
    """Read an image's header.

    Raises:
        DecodeError: code empty, unsupported, too_large, truncated or damaged.
    """
    from PIL import Image

    if not data:
        raise DecodeError("empty", "the file has zero bytes")
    if data.startswith(_PNG):
        data = _check_chunks(data)
    # An `accept` that returns text means that Pillow was built without the format.
    factory = next((factory for factory, accept in _decoders() if accept(data[:_BRANDS_END]) is True), None)
    if factory is None:
        name = name_contents(data)
        raise DecodeError(
            "unsupported", f"the file is {name}" if name else "the bytes are not an image of a known kind"
        )
    try:
        image = factory(io.BytesIO(data), "")
    except Image.DecompressionBombError:
        raise DecodeError("too_large", f"the image has over {MAX_PIXELS:,} pixels") from None
    except Exception as err:  # Pillow's plugins raise anything at all on hostile headers
        if _ends_early(data):
            raise DecodeError("truncated", f"the file ends within the image's header ({_reason(err)})") from None
        raise DecodeError("unsupported", f"the image's header cannot be read ({_reason(err)})") from None
    width, height, several_scans = image.width, image.height, False
    if image.format == "TIFF":
        width, height = int(image.tag_v2[256]), int(image.tag_v2[257])  # Pillow may have swapped its own
        _check_integers(image)
    elif image.format in ("JPEG", "MPO"):
        several_scans = has_several_scans(data)
        if several_scans:
            check_scans(data)
    return Opened(data, image, width, height, _orientation(image), several_scans)


@cache
def _decoders() -> list[tuple[Callable[..., Any], Callable[[bytes], bool | str]]]:
    """List Pillow's decoders of FORMATS, each with its test of the first bytes.

    `Image.open` does the same, but warns of large images or refuses them by their full size.
    """
    import pi_heif
    from PIL import (  # noqa: F401
        AvifImagePlugin,
        BmpImagePlugin,
        GifImagePlugin,
        Image,
        JpegImagePlugin,
        PngImagePlugin,
        TiffImagePlugin,
        WebPImagePlugin,
    )

    pi_heif.register_heif_opener(thumbnails=False)
    # Pillow's default blocks of 16 MB stay in the C library's arena of each thread; larger ones go back to the system.
    Image.core.set_block_size(_PILLOW_BLOCK_BYTES)
    found: dict[str, Any] = {name: Image.OPEN[name] for name in FORMATS}
    factory, accept = found["AVIF"]
    found["AVIF"] = factory, lambda head: _has_avif_brand(head) and accept(head)
    return list(found.values())


_BRANDS_END = 64
"""Bytes in which an AVIF or HEIC file names its brands."""


def _has_avif_brand(head: bytes) -> bool:
    """Check for AVIF's brands: a file of the brand mif1 may be either AVIF or HEIC."""
    return any(brand in head[8 : int.from_bytes(head[:4], "big")] for brand in (b"avif", b"avis"))


_PNG = b"\x89PNG\r\n\x1a\n"


def _check_chunks(data: bytes) -> bytes:
    """Check the CRC of the PNG chunks that pixels need (Pillow skips IDAT's); drop other chunks that are broken.

    Metadata behind the pixels is moved before them: Pillow finds the orientation there without decoding.

    Raises:
        DecodeError: code damaged or truncated.
    """
    offset, pixels, dropped, moved = len(_PNG), 0, [], []
    while offset + 8 <= len(data):
        name, end = data[offset + 4 : offset + 8], offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        if name == b"IEND" or not name.isalpha():  # Pillow reports invalid chunks
            break
        needed = name[:1].isupper() or name == b"tRNS"
        if end > len(data):
            if needed:
                raise DecodeError("truncated", f"the file is truncated (it ends within its chunk {name.decode()})")
            data = data[:offset]
            break
        if zlib.crc32(memoryview(data)[offset + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            if needed:
                raise DecodeError(
                    "damaged", f"the image's data is damaged (the chunk {name.decode()} has another CRC than it says)"
                )
            dropped.append((offset, end))
        elif name == b"IDAT":
            pixels = pixels or offset
        elif pixels and name in (b"eXIf", b"iTXt", b"zTXt"):
            moved.append(data[offset:end])
        offset = end
    for start, end in reversed(dropped):
        data = data[:start] + data[end:]
        pixels -= (end - start) * (start < pixels)
    return data[:pixels] + b"".join(moved) + data[pixels:] if moved else data


def _ends_early(data: bytes) -> bool:
    """Check whether a file with an unreadable header is truncated, as far as its format tells."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(_PNG[:4]):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if data[4:8] == b"ftyp":
        return _lacks_box(data)
    order = {b"II": "little", b"MM": "big"}.get(data[:2])
    if order is None:
        return False
    directory = data[8:16] if data[2:4] in (b"\x2b\0", b"\0\x2b") else data[4:8]
    return int.from_bytes(directory, order) + 2 > len(data)  # type: ignore[arg-type]


def _lacks_box(data: bytes) -> bool:
    """Check whether an AVIF or HEIC file ends within one of its boxes (ISO/IEC 14496-12, 4.2)."""
    offset = 0
    while offset + 8 <= len(data):
        size, header = int.from_bytes(data[offset : offset + 4], "big"), 8
        if size == 1:
            size, header = int.from_bytes(data[offset + 8 : offset + 16], "big"), 16
        if size == 0:  # it reaches to the end, wherever that is
            return False
        offset += max(size, header)
    return offset != len(data)


def _check_integers(image: Any) -> None:
    """Refuse a TIFF's integers whose black and white are not known, or which Pillow inverts."""
    if 2 in _tag(image, 339, 1):
        raise DecodeError("unsupported", "the TIFF holds signed integers, whose black and white are not known")
    if image.mode.startswith("I") and _tag(image, 262, 0)[0] != 1:
        raise DecodeError("unsupported", "the TIFF holds integers of over 8 bits in which 0 is not black")


def _exif_orientation(image: Any) -> int | None:
    from PIL import Image

    try:
        # A PNG's own `getexif` would decode its pixels first.
        found = Image.Image.getexif(image).get(0x0112)
        return None if found is None else int(found)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return None


def _orientation(image: Any) -> int:
    """Read EXIF's orientation, else XMP's, which Pillow before 11.1 does not read in every format."""
    found = _exif_orientation(image)
    if found is not None:
        return found
    packets = [image.info.get("xmp"), image.info.get("XML:com.adobe.xmp"), getattr(image, "tag_v2", {}).get(700)]
    packets += [body for name, body in getattr(image, "applist", ()) if name == "APP1" and body.startswith(b"http")]
    for packet in packets:
        text = packet.encode() if isinstance(packet, str) else packet if isinstance(packet, bytes) else b""
        if (found_in_xmp := _XMP_ORIENTATION.search(text)) is not None:
            return int(found_in_xmp[1])
    return 1


_XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])")
"""As an attribute or an element; bytes, since some writers put Latin-1 beside it."""


def _samples_per_pixel(layers: list[tuple[int, int, int, int]]) -> float:
    """Compute the samples that a JPEG stores per pixel: 3 at 4:4:4, 1.5 at 4:2:0."""
    areas = [vertical * horizontal for _, vertical, horizontal, _ in layers]
    largest = max((row[1] for row in layers), default=1) * max((row[2] for row in layers), default=1)
    return sum(areas) / max(1, largest)


def _check_pixels(width: int, height: int, decoded: int) -> None:
    if decoded > MAX_PIXELS or width * height > MAX_STORED_PIXELS:
        raise DecodeError(
            "too_large",
            f"the image has {width:,} x {height:,} pixels, of which {decoded:,} would be decoded; "
            f"at most {MAX_PIXELS:,} are, of at most {MAX_STORED_PIXELS:,}",
        )


def _reduced_size(height: int, width: int, cover: int) -> tuple[int, int]:
    """Compute the least height and width to ask libjpeg-turbo for, 0 for full size.

    It also offers 3/8 to 7/8, but without fast code: a 2,048 x 1,536 JPEG takes 15 ms at 6/8, and 10 ms at full size.
    """
    for denominator in (8, 4, 2) if cover else ():
        reduced = -(-height // denominator), -(-width // denominator)
        if min(reduced) >= cover:
            return reduced
    return 0, 0


def _read_pillow(image: Any, data: bytes) -> Pixels:
    try:
        _check_pixels(image.width, image.height, image.width * image.height)
        _check_strips(image, data)
        image.seek(0)
        image.load()
        # A frame may be larger than the file's header says.
        _check_pixels(image.width, image.height, image.width * image.height)
        if image.mode == "F":
            raise DecodeError("unsupported", "the image holds floating-point pixels, whose white is not known")
        bits = _tag(image, 258, 16)[0]
        return _in_strips(image.height, image.width, lambda top, bottom: _to_rgb(_rows(image, top, bottom), bits))
    except DecodeError:
        raise
    except MemoryError:
        raise DecodeError("too_large", "the image did not fit into memory") from None
    except Exception as err:  # Pillow's plugins raise anything at all on damaged data
        text = _reason(err)
        if "truncated" in text.lower():
            raise DecodeError("truncated", f"the file is truncated ({text})") from None
        if _REFUSALS.search(text):
            raise DecodeError("unsupported", f"the image's kind of pixels cannot be read ({text})") from None
        raise DecodeError("damaged", f"the image's data is damaged ({text})") from None


def _check_strips(image: Any, data: bytes) -> None:
    """Check a TIFF's strips or tiles, if it is one, for damage that libtiff does not report."""
    offsets, sizes = _tag(image, 273) or _tag(image, 324), _tag(image, 279) or _tag(image, 325)
    compression, tables = _tag(image, 259, 1)[0], _tag(image, 347, b"")[0]
    for offset, size in zip(offsets, sizes, strict=False):
        strip = data[offset : offset + size]
        if len(strip) < size:
            raise DecodeError("truncated", "the file is truncated (it lacks a strip of the TIFF)")
        if compression in (8, 32946):
            _check_deflated(strip)
        elif compression == 7:
            stream = tables[:-2] + strip[2:] if len(tables) > 4 else strip
            decode_samples(stream, "GRAY", height=0, width=0, several_scans=has_several_scans(stream))


def _check_deflated(strip: bytes) -> None:
    inflater = zlib.decompressobj()
    try:
        for start in range(0, len(strip), 1 << 14):
            inflater.decompress(strip[start : start + (1 << 14)])
    except zlib.error as err:
        raise DecodeError("damaged", f"the image's data is damaged ({_reason(err)})") from None


def _tag(image: Any, number: int, *default: Any) -> tuple[Any, ...]:
    """Read a TIFF tag's values; `default` where it is absent or the image is no TIFF."""
    found = getattr(image, "tag_v2", {}).get(number, default)
    return found if isinstance(found, tuple) else (found,)


def _rows(image: Any, top: int, bottom: int) -> Any:
    return image if bottom - top == image.height else image.crop((0, top, image.width, bottom))


def _in_strips(height: int, width: int, to_rgb: Callable[[int, int], Pixels]) -> Pixels:
    pixels_HWC = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels_HWC[top:bottom] = to_rgb(top, bottom)
    return pixels_HWC


def _from_cmyk(samples_HWC: Pixels) -> Pixels:
    """Convert a JPEG's CMYK, which Adobe's programs write inverted, to RGB."""
    from PIL import Image

    height, width = samples_HWC.shape[:2]
    return _in_strips(
        height,
        width,
        lambda top, bottom: np.asarray(Image.fromarray(255 - samples_HWC[top:bottom], "CMYK").convert("RGB")),
    )


def _to_rgb(image: Any, bits: int) -> Pixels:
    from PIL import Image

    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image), bits)
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _from_integers(values_HW: npt.NDArray[Any], bits: int) -> Pixels:
    """Keep the 8 high bits of unsigned grey of up to 32 bits; Pillow may hold it in wider or signed integers."""
    high = (values_HW.astype(np.int64) & (2**bits - 1)) >> (bits - 8)
    return np.repeat(high.astype(np.uint8)[:, :, None], 3, axis=2)


def _turn_upright(pixels_HWC: Pixels, orientation: int) -> Pixels:
    """Apply EXIF orientation 1 to 8 (JEITA CP-3451, tag 0x0112)."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    down, across = -1 if orientation in (3, 4, 7, 8) else 1, -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels_HWC[::down, ::across])


def _reason(err: Exception) -> str:
    return one_line(err) or type(err).__name__

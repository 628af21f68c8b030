"""Formats beside JPEG and PNG: AVIF and HEIC, and files that are no image but are named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from carray.core.errors import DecodeError
from carray.images.decoding import open_image
from carray.images.foreign import name_contents
from carray.images.pixels import PixelSettings, decode
from carray.testing.drawing import DEMO_CLASSES, draw_image

SETTINGS = PixelSettings(decode_size=64, input_size=48)


def drawn() -> Image.Image:
    return Image.fromarray(draw_image(DEMO_CLASSES[0], np.random.default_rng(3))).resize((240, 160))


def encoded(image: Image.Image, kind: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.from_pillow(image).save(buffer, quality=90, exif=exif.tobytes())
    else:
        image.save(buffer, kind, quality=90, exif=exif)
    return buffer.getvalue()


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_pixels_are_those_of_the_picture(kind: str) -> None:
    found = decode(encoded(drawn(), kind), SETTINGS)
    wanted = decode(encoded(drawn(), "PNG"), SETTINGS)
    assert (found.width, found.height) == (240, 160)
    assert difference(found.pixels_HWC, wanted.pixels_HWC) < 3


@pytest.mark.parametrize("orientation", [3, 6, 8])
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_an_image_is_turned_upright_once(kind: str, orientation: int) -> None:
    found = decode(encoded(drawn(), kind, orientation), SETTINGS)
    wanted = decode(encoded(drawn(), "PNG", orientation), SETTINGS)
    assert (found.width, found.height) == (wanted.width, wanted.height)
    assert difference(found.pixels_HWC, wanted.pixels_HWC) < 3


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_transparency_is_laid_over_white(kind: str) -> None:
    image = drawn().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    assert decode(encoded(image, kind), SETTINGS).pixels_HWC.min() > 250


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_a_cut_file_is_truncated(kind: str, kept: float) -> None:
    data = encoded(drawn(), kind)
    with pytest.raises(DecodeError) as caught:
        decode(data[: int(len(data) * kept)], SETTINGS)
    assert caught.value.code == "truncated"


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_an_overwritten_header_is_an_error(kind: str) -> None:
    data = encoded(drawn(), kind)
    with pytest.raises(DecodeError):
        decode(data[:40] + bytes(200) + data[240:], SETTINGS)


@pytest.mark.parametrize("kind", ["AVIF", "HEIC"])
def test_a_file_of_the_general_brand_is_opened_by_what_it_holds(kind: str) -> None:
    data = encoded(drawn(), kind)
    assert b"mif1" in data[8:32]
    assert open_image(data[:8] + b"mif1" + data[12:]).upright_size == (240, 160)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0", "a JPEG XL image"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a video"),
        (b"<!DOCTYPE html>\n<html>", "an HTML page"),
        (b"\n <html><head>", "an HTML page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg">', "an SVG drawing"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
        (b'{"error": 1}', "a JSON document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a Git LFS pointer"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (b"PK\x03\x04", "a ZIP archive"),
        (b"a.jpg" + bytes(252) + b"ustar\0", "a tar archive"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PAR1\x15", "a Parquet file"),
        (bytes(900), "nothing but zero bytes"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, name: str) -> None:
    with pytest.raises(DecodeError, match=f"^the file is {name}") as caught:
        open_image(data)
    assert caught.value.code == "unsupported"


def test_a_photograph_and_noise_have_no_other_name() -> None:
    assert name_contents(encoded(drawn(), "JPEG")) is None
    with pytest.raises(DecodeError, match="not an image of a known kind"):
        open_image(b"\x07\x03 whatever this is")

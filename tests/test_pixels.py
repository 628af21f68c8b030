"""Bytes to pixels: what is read, how it is turned, and which code each kind of damage gets."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from carray.core.errors import DecodeError, SettingsError
from carray.core.settings import parse_settings
from carray.drawing import DEMO_CLASSES, draw_broken_files, draw_image
from carray.pixels import MAX_PIXELS, PixelSettings, decode, decode_original, view

SETTINGS = PixelSettings(decode_size=64, input_size=48)


def drawn(width: int = 240, height: int = 160) -> Image.Image:
    pixels_HWC = draw_image(DEMO_CLASSES[0], np.random.default_rng(3))
    return Image.fromarray(pixels_HWC).resize((width, height))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def code_of(data: bytes, **options: object) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, SETTINGS, **options)
    return caught.value.code


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(float) - other.astype(float)).mean())


@pytest.mark.parametrize("kept", [0.02, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {})])
def test_truncated_file_is_refused_however_little_is_missing(kind, options, kept):
    data = encoded(drawn(), kind, **options)
    assert code_of(data[: int(len(data) * kept)]) == "truncated"


def test_large_jpeg_that_lacks_its_last_bytes_is_refused_at_reduced_scale_too():
    data = encoded(drawn(1600, 1200), quality=90)
    assert code_of(data[:-64]) == "truncated"
    decode(data, SETTINGS)


def test_broken_files_have_their_codes(tmp_path):
    expected = draw_broken_files(tmp_path)
    found = {}
    for name in expected:
        try:
            decode((tmp_path / name).read_bytes(), SETTINGS)
            found[name] = "ok"
        except DecodeError as err:
            found[name] = err.code
    assert found == expected
    assert set(expected.values()) == {"ok", "empty", "truncated", "unsupported", "too_large"}


@pytest.mark.parametrize("data", [b"\xff\xd8\xff", b"GIF89a", bytes(1000), b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image_are_refused(data):
    assert code_of(data) in ("unsupported", "truncated")


def test_image_above_the_limit_is_refused_before_its_pixels_are_read():
    too_large = encoded(Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)), "PNG")
    assert code_of(too_large) == "too_large"


def test_modes_agree_with_the_colours_they_stand_for():
    image = drawn()
    grey = image.convert("L")
    plain = decode(encoded(grey.convert("RGB"), "PNG"), SETTINGS).pixels_HWC
    assert np.array_equal(decode(encoded(grey, "PNG"), SETTINGS).pixels_HWC, plain)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(decode(encoded(sixteen, "PNG"), SETTINGS).pixels_HWC, plain)
    assert difference(decode(encoded(grey, quality=95), SETTINGS).pixels_HWC, plain) < 2
    indexed = image.quantize(64)
    expected = decode(encoded(indexed.convert("RGB"), "PNG"), SETTINGS).pixels_HWC
    assert np.array_equal(decode(encoded(indexed, "PNG"), SETTINGS).pixels_HWC, expected)


def test_cmyk_jpeg_keeps_its_colours():
    image = Image.new("RGB", (80, 80), (200, 60, 20))
    pixels_HWC = decode(encoded(image.convert("CMYK"), quality=95), SETTINGS).pixels_HWC
    assert difference(pixels_HWC, np.array([200, 60, 20])) < 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode):
    image = Image.new(mode, (80, 80), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    assert (decode(encoded(image, "PNG"), SETTINGS).pixels_HWC == 255).all()


def test_transparent_colour_of_a_palette_is_white():
    image = Image.new("P", (80, 80), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    assert (decode(encoded(image, "PNG", transparency=1), SETTINGS).pixels_HWC == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_stands_for_an_animation(kind):
    frames = [Image.new("RGB", (80, 80), colour) for colour in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert difference(decode(data, SETTINGS).pixels_HWC, np.array([250, 0, 0])) < 4


# What each orientation's stored image looks like, made from the upright one: the inverse of how it is to be turned.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("aspect", ["squash", "crop", "pad"])
def test_every_exif_orientation_gives_the_upright_pixels(orientation, aspect):
    image, settings = drawn(), PixelSettings(decode_size=64, input_size=48, aspect=aspect)
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encoded(image, "PNG"), settings)
    turned = decode(encoded(stored, "PNG", exif=exif.tobytes()), settings)
    assert np.array_equal(turned.pixels_HWC, upright.pixels_HWC)
    assert (turned.width, turned.height, turned.phash) == (240, 160, upright.phash)
    lossy = decode(encoded(stored, quality=95, subsampling=0, exif=exif.tobytes()), settings)
    assert difference(lossy.pixels_HWC, upright.pixels_HWC) < 3
    assert (lossy.width, lossy.height) == (240, 160)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_image():
    plain = encoded(drawn())
    damaged = encoded(drawn(), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    assert np.array_equal(decode(damaged, SETTINGS).pixels_HWC, decode(plain, SETTINGS).pixels_HWC)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("aspect", ["squash", "crop", "pad"])
def test_tiny_and_thin_images_are_images(size, kind, aspect):
    settings = PixelSettings(decode_size=64, input_size=48, aspect=aspect)
    decoded = decode(encoded(Image.new("RGB", size, (90, 90, 90)), kind), settings)
    assert decoded.pixels_HWC.shape == (64, 64, 3)
    assert (decoded.width, decoded.height) == size


def test_same_bytes_give_the_same_pixels_in_many_threads():
    data = encoded(drawn(900, 700))
    first = decode(data, SETTINGS)
    with ThreadPoolExecutor(8) as pool:
        for again in pool.map(lambda _: decode(data, SETTINGS), range(32)):
            assert np.array_equal(again.pixels_HWC, first.pixels_HWC)
            assert again.phash == first.phash


def test_reduced_scale_is_a_power_of_two(monkeypatch):
    """Other scales cost more than full size and show less."""
    import simplejpeg

    real, shapes = simplejpeg.decode_jpeg, []

    def recorded(*args, **options):
        shapes.append((pixels_HWC := real(*args, **options)).shape[:2])
        return pixels_HWC

    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    data = encoded(drawn(1001, 801))
    for decode_size in (64, 101, 102, 200, 201, 202, 401, 402, 801, 900):
        decode(data, PixelSettings(decode_size=decode_size, input_size=48))
    eighth, quarter, half, full = (101, 126), (201, 251), (401, 501), (801, 1001)
    assert shapes == [eighth, eighth, quarter, quarter, quarter, half, half, full, full, full]


@pytest.mark.parametrize("box", [None, (200, 150, 1100, 900)])
def test_reduced_scale_is_close_to_the_full_decode(box):
    data = encoded(drawn(1600, 1200), quality=90)
    full = decode(data, PixelSettings(decode_size=64, input_size=48, reduced_scale=False), box=box)
    reduced = decode(data, SETTINGS, box=box)
    assert not np.array_equal(reduced.pixels_HWC, full.pixels_HWC)
    assert difference(reduced.pixels_HWC, full.pixels_HWC) < (
        3 if box is None else 6
    )  # a box's edges fall between reduced pixels
    assert (full.phash ^ reduced.phash).bit_count() <= 4


def test_reduced_scale_is_close_on_photographs(cars):
    settings = PixelSettings(decode_size=128, input_size=96)
    differences = []
    for path in sorted((cars / "cars_train").glob("*.jpg"))[:20]:
        full = decode(path.read_bytes(), settings.model_copy(update={"reduced_scale": False}))
        differences.append(difference(decode(path.read_bytes(), settings).pixels_HWC, full.pixels_HWC))
    assert 0 < np.mean(differences) < 3


def test_box_cuts_the_upright_image():
    image = Image.new("RGB", (200, 100), (0, 0, 255))
    image.paste((255, 0, 0), (120, 20, 180, 90))
    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (
        encoded(image, "PNG"),
        encoded(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif.tobytes()),
    ):
        assert (decode(data, SETTINGS, box=(120, 20, 180, 90)).pixels_HWC == [255, 0, 0]).all()


def test_box_beyond_the_image_is_clamped_and_loses_no_detail():
    data, settings = encoded(drawn(1600, 1200), quality=90), PixelSettings(decode_size=512)
    clamped = decode(data, settings, box=(-50, -50, 40_000, 40_000))
    assert np.array_equal(clamped.pixels_HWC, decode(data, settings, box=(0, 0, 1600, 1200)).pixels_HWC)
    assert np.array_equal(clamped.pixels_HWC, decode(data, settings).pixels_HWC)


@pytest.mark.parametrize("box", [(300, 10, 400, 90), (50, 50, 50, 90), (90, 10, 40, 50), (-30, -30, 0, 0)])
def test_box_that_covers_nothing_is_refused_with_its_numbers(box):
    with pytest.raises(DecodeError, match=str(box[0])) as caught:
        decode(encoded(drawn()), SETTINGS, box=box)
    assert caught.value.code == "bad_box"


def test_an_original_is_upright_at_full_size_and_cut_to_its_box():
    image = drawn(600, 400)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned to the right once
    original_HWC = decode_original(encoded(image, quality=95, exif=exif))
    assert original_HWC.shape == (600, 400, 3)
    assert difference(original_HWC, np.asarray(image.rotate(-90, expand=True))) < 4
    lossless = encoded(image, "PNG")
    assert np.array_equal(decode_original(lossless, box=(10, 20, 110, 90)), np.asarray(image)[20:90, 10:110])
    with pytest.raises(DecodeError, match="covers nothing"):
        decode_original(lossless, box=(700, 0, 800, 10))


def test_decoding_an_original_again_gives_the_pixels_of_the_image():
    data = encoded(drawn(100, 90), quality=80)  # too small for a reduced scale
    again = encoded(Image.fromarray(decode_original(data)), "PNG")
    assert np.array_equal(decode(data, SETTINGS).pixels_HWC, decode(again, SETTINGS).pixels_HWC)


def test_aspect_modes_keep_what_they_promise():
    image = Image.new("RGB", (200, 100), (250, 250, 250))
    image.paste((250, 0, 0), (0, 0, 50, 100))
    image.paste((0, 0, 250), (150, 0, 200, 100))
    by_aspect = {
        aspect: decode(encoded(image, "PNG"), PixelSettings(decode_size=64, input_size=48, aspect=aspect)).pixels_HWC
        for aspect in ("squash", "crop", "pad")
    }
    assert tuple(by_aspect["squash"][32, 2]) == (250, 0, 0)
    assert tuple(by_aspect["squash"][32, -3]) == (0, 0, 250)
    assert (by_aspect["crop"] == 250).all()
    assert (by_aspect["pad"][:16] == 128).all()
    assert (by_aspect["pad"][-16:] == 128).all()
    assert tuple(by_aspect["pad"][32, 2]) == (250, 0, 0)


def test_view_is_the_central_crop_at_input_size():
    pixels_HWC = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels_HWC[16:48, 16:48] = 200
    settings = PixelSettings(decode_size=64, input_size=32, view_crop=0.5)
    seen_HWC = view(pixels_HWC, settings)
    assert seen_HWC.shape == (32, 32, 3)
    assert seen_HWC.flags.c_contiguous
    assert (seen_HWC == 200).all()
    whole_HWC = view(pixels_HWC, PixelSettings(decode_size=64, input_size=64, view_crop=1.0))
    assert np.array_equal(whole_HWC, pixels_HWC)


def test_hash_of_a_copy_is_near_and_of_another_image_far():
    image, other = drawn(), Image.fromarray(draw_image(DEMO_CLASSES[4], np.random.default_rng(9)))
    original = decode(encoded(image, "PNG"), SETTINGS).phash
    assert (original ^ decode(encoded(image.resize((180, 120)), quality=70), SETTINGS).phash).bit_count() <= 4
    assert (original ^ decode(encoded(other, "PNG"), SETTINGS).phash).bit_count() > 8


def test_settings_refuse_an_input_above_the_decoded_size():
    with pytest.raises(SettingsError, match="input_size is 200, above decode_size 100"):
        parse_settings(PixelSettings, {"decode_size": 100, "input_size": 200})

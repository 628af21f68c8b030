"""Bytes to pixels: what is read, how it is turned, and which code each kind of damage gets."""

from __future__ import annotations

import io
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from PIL import Image

from carray.core.at_once import ByteBudget
from carray.core.errors import DecodeError, SettingsError
from carray.core.settings import parse_settings
from carray.images import decoding, pixels
from carray.images.jpegs import WARNINGS
from carray.images.pixels import MAX_PIXELS, PixelSettings, decode, decode_original, view
from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_image

SETTINGS = PixelSettings(decode_size=64, input_size=48)


def bits_between(one: int, other: int) -> int:
    return ((one ^ other) % 2**64).bit_count()


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


def jpeg_of_noise(**options: object) -> bytes:
    """Give a JPEG whose every row takes many bytes, so that damage in its middle is damage to its pixels."""
    pixels_HWC = np.random.default_rng(1).normal(128, 40, (120, 160, 3)).clip(0, 255).astype(np.uint8)
    return encoded(Image.fromarray(pixels_HWC), quality=90, **options)


def at_scans(data: bytes) -> list[int]:
    return [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]


def at_restarts(data: bytes) -> list[int]:
    return [at for at in range(len(data) - 1) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]


def with_middle(data: bytes, put: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + put + data[at + len(put) :]


@cache
def damaged_jpegs() -> dict[str, bytes]:
    plain, progressive = jpeg_of_noise(), jpeg_of_noise(progressive=True)
    restarts = jpeg_of_noise(restart_marker_rows=1)
    lost = at_restarts(restarts)
    grey = encoded(Image.open(io.BytesIO(plain)).convert("L"), quality=90)
    cmyk = encoded(Image.open(io.BytesIO(plain)).convert("CMYK"), quality=90)
    height = plain.index(b"\xff\xc0") + 5
    return {
        "cut and closed": plain[: len(plain) * 2 // 5] + b"\xff\xd9",
        "zeros": with_middle(plain, bytes(4096)),
        "zeros at the end": plain[:-900] + bytes(898) + b"\xff\xd9",
        "foreign bytes": with_middle(plain, grey[3000:3512]),
        "a block lost": plain[: len(plain) // 2] + plain[len(plain) // 2 + 512 :],
        "a marker": with_middle(plain, b"\xff\x12"),
        "a higher picture": plain[:height] + b"\x01\x00" + plain[height + 2 :],
        "grey, cut and closed": grey[: len(grey) // 2] + b"\xff\xd9",
        "CMYK, cut and closed": cmyk[: len(cmyk) // 2] + b"\xff\xd9",
        "CMYK, zeros": with_middle(cmyk, bytes(4096)),
        "a restart's rows lost": restarts[: lost[2]] + restarts[lost[3] :],
        "half a restart's rows lost": restarts[: lost[2] + 40] + restarts[lost[3] :],
        "progressive, zeros": with_middle(progressive, bytes(1024)),
        "progressive, the last scans lost": progressive[: at_scans(progressive)[4]] + b"\xff\xd9",
        "progressive, all scans but one lost": progressive[: at_scans(progressive)[1]] + b"\xff\xd9",
        "progressive, a scan lost": progressive[: at_scans(progressive)[0]] + progressive[at_scans(progressive)[1] :],
    }


@pytest.mark.parametrize("kind", damaged_jpegs())
@pytest.mark.parametrize("decode_size", [8, 120])
@pytest.mark.filterwarnings("error")
def test_damage_that_libjpeg_sees_is_an_error_with_its_words(kind, decode_size):
    settings = PixelSettings(decode_size=decode_size, input_size=8)
    with pytest.raises(DecodeError, match="damaged \\((libjpeg: .+|its scans leave out .+)\\)$") as caught:
        decode(damaged_jpegs()[kind], settings)
    assert caught.value.code == "damaged"
    with pytest.raises(DecodeError):
        decode(damaged_jpegs()[kind], settings, box=(10, 10, 90, 90))
    with pytest.raises(DecodeError):
        decode_original(damaged_jpegs()[kind])


@cache
def harmless_jpegs() -> dict[str, bytes]:
    plain, after = jpeg_of_noise(), jpeg_of_noise().index(b"\xff\xdb")
    scan = at_scans(plain)[0]
    return {
        "junk before a marker": plain[:after] + b"camera maker" + plain[after:],
        "junk behind the end": plain + bytes(5000) + b"MotionPhoto_Data" + plain[2000:3000],
        "no end": plain[:-2],
        "no end, and junk before a marker": plain[:after] + b"camera maker" + plain[after:-2],
        "padding before the end": plain[:-2] + bytes(300) + plain[-2:],
        "a byte before the end": plain[:-2] + b"\x55" + plain[-2:],
        "another JFIF revision": plain.replace(b"JFIF\0\1", b"JFIF\0\7"),
        "another colour transform": plain[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\x09" + plain[2:],
        "a scan's parameters": plain[: scan + 11] + bytes(3) + plain[scan + 14 :],
        "all of it": plain[:after].replace(b"JFIF\0\1", b"JFIF\0\7")
        + b"junk"
        + plain[after:-2]
        + bytes(9)
        + plain[-2:],
    }


@pytest.mark.parametrize("kind", harmless_jpegs())
def test_what_only_looks_odd_keeps_its_pixels(kind):
    expected = decode(jpeg_of_noise(), SETTINGS).pixels_HWC
    assert np.array_equal(decode(harmless_jpegs()[kind], SETTINGS).pixels_HWC, expected)


def test_an_oddity_hides_no_damage():
    """libjpeg hands on the first warning of a file alone."""
    for data in (damaged_jpegs()["zeros"], damaged_jpegs()["cut and closed"], damaged_jpegs()["CMYK, zeros"]):
        after = data.index(b"\xff\xdb")
        assert code_of(data[:after] + b"junk" + data[after:].replace(b"JFIF\0\1", b"JFIF\0\7")) == "damaged"


def test_every_warning_of_libjpeg_has_a_meaning_and_a_reason():
    assert {meaning for _, meaning, _ in WARNINGS} == {"damage", "look again", "harmless"}
    assert all(len(reason) > 20 for _, _, reason in WARNINGS)


def test_whole_progressive_and_restarted_jpegs_are_images():
    for options in ({"progressive": True}, {"restart_marker_rows": 1}, {"keep_rgb": True}, {"subsampling": 0}):
        decode(jpeg_of_noise(**options), SETTINGS)


def chunks(data: bytes) -> dict[bytes, int]:
    """Give where each kind of chunk of a PNG begins."""
    place, found = 8, {}
    while place < len(data):
        found.setdefault(data[place + 4 : place + 8], place)
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return found


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def indexed_png() -> bytes:
    data = encoded(drawn().quantize(64), "PNG", transparency=3)
    text = chunk(b"tEXt", b"Comment\0a car")
    return data[: chunks(data)[b"PLTE"]] + text + data[chunks(data)[b"PLTE"] : -12] + text + data[-12:]


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"IDAT"])
def test_a_wrong_checksum_of_a_png_chunk_that_pixels_need_is_damage(name):
    data = bytearray(indexed_png())
    place = chunks(bytes(data))[name]
    data[place + 8 + int.from_bytes(data[place : place + 4], "big")] ^= 1
    with pytest.raises(DecodeError, match=f"chunk {name.decode()} has another CRC") as caught:
        decode(bytes(data), SETTINGS)
    assert caught.value.code == "damaged"


def test_a_wrong_checksum_of_another_png_chunk_is_none():
    data = indexed_png()
    expected = decode(data, SETTINGS).pixels_HWC
    assert np.array_equal(decode(data.replace(b"a car", b"a bus"), SETTINGS).pixels_HWC, expected)
    assert np.array_equal(decode(data[:-12], SETTINGS).pixels_HWC, expected)  # without IEND


@pytest.mark.parametrize("broken", [False, True])
def test_an_orientation_behind_a_pngs_pixels_is_found_without_decoding_them(broken, monkeypatch):
    image = drawn()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(image.transpose(STORED[6]), "PNG")
    text = chunk(b"tEXt", b"Comment\0a car")
    data = stored[:33] + (text.replace(b"car", b"bus") if broken else text) + stored[33:-12]
    data += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + stored[-12:]
    assert np.array_equal(decode(data, SETTINGS).pixels_HWC, decode(encoded(image, "PNG"), SETTINGS).pixels_HWC)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert decoding.open_image(data).upright_size == image.size


@cache
def other_formats() -> dict[str, bytes]:
    image = drawn()
    tiff = {
        f"TIFF {name}": encoded(image, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg")
    }
    plain = {kind: encoded(image, kind) for kind in ("BMP", "GIF", "TIFF")}
    return plain | tiff | {"WEBP": encoded(image, "WEBP", quality=90), "PNG": encoded(image, "PNG")}


@pytest.mark.parametrize("kind", other_formats())
@pytest.mark.parametrize("kept", [0.4, 0.99])
def test_a_cut_file_of_every_format_is_truncated(kind, kept):
    data = other_formats()[kind]
    decode(data, SETTINGS)
    # Of a TIFF's directory, which often lies at its end, the first entries may be left.
    expected = {"truncated", "damaged"} if kind == "TIFF jpeg" else {"truncated"}
    assert code_of(data[: int(len(data) * kept)]) in expected


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF tiff_lzw", "TIFF tiff_adobe_deflate", "TIFF jpeg"])
def test_changed_bytes_are_damage_where_a_format_shows_it(kind):
    data = other_formats()[kind]
    changed = bytes(byte ^ 0x55 for byte in data[len(data) // 2 :][:200])
    assert code_of(with_middle(data, changed)) == "damaged"


def test_image_above_the_limit_is_refused_before_its_pixels_are_read():
    too_large = encoded(Image.new("1", (10_000, MAX_PIXELS // 10_000 + 1)), "PNG")
    assert code_of(too_large) == "too_large"


def test_the_limit_is_on_what_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100_000)
    photograph = drawn(1600, 1200)
    assert decode(encoded(photograph), SETTINGS).width == 1600  # read at 1/8: 30,000 pixels
    assert code_of(encoded(photograph, "PNG")) == "too_large"
    with pytest.raises(DecodeError, match="1,600 x 1,200 pixels, of which 480,000 would be decoded; at most 100,000"):
        decode(encoded(photograph), PixelSettings(decode_size=512))
    with pytest.raises(DecodeError, match="1,920,000 would be decoded"):
        decode_original(encoded(photograph))


def test_a_progressive_jpeg_is_limited_by_the_coefficients_that_its_decoder_holds(monkeypatch):
    photograph = drawn(1600, 1200)
    halved, full = (encoded(photograph, progressive=True, subsampling=kind) for kind in (2, 0))
    monkeypatch.setattr(decoding, "_MAX_BYTES", 8_000_000)  # 3 bytes a pixel fit, 6 do not
    decode(halved, SETTINGS)
    with pytest.raises(DecodeError, match="in several scans takes 12 MB of memory; at most 8 MB") as caught:
        decode(full, SETTINGS)
    assert caught.value.code == "too_large"
    decode(encoded(photograph, subsampling=0), SETTINGS)


def test_a_photograph_beyond_pillows_own_limit_is_read_without_a_warning():
    data = encoded(Image.new("L", (20_000, 9_000), 90))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert (decode(data, SETTINGS).pixels_HWC == 90).all()
        assert code_of(encoded(Image.new("1", (10_000, 9_000)), "TIFF", compression="group4")) == "too_large"
    assert not [one for one in seen if "Decompression" in one.category.__name__]


def test_threads_share_one_budget_of_memory(monkeypatch):
    data, inside, most, lock = encoded(drawn(400, 300), "PNG"), 0, 0, threading.Lock()
    real = decoding.Opened.read_upright

    def read(opened, cover):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        try:
            return real(opened, cover)
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(decoding.Opened, "read_upright", read)
    for share, expected in ((1.5, 1), (2.5, 2)):
        most = 0
        needed = decoding.open_image(data).memory_bytes(0)
        monkeypatch.setattr(pixels, "_MEMORY", ByteBudget(int(share * needed)))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: decode(data, SETTINGS), range(16)))
        assert most == expected
    assert decoding.MAX_PIXELS * 7 < pixels.MEMORY_BYTES < 2 * decoding.MAX_PIXELS * 7


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


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_turned_tiff_is_turned_once_and_cut_where_the_box_lies(orientation, compression):
    image = drawn()
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    turned = encoded(stored, "TIFF", tiffinfo={274: orientation}, compression=compression)
    for box in (None, (0, 0, 80, 160), (100, 20, 230, 90)):
        found, expected = (decode(data, SETTINGS, box=box) for data in (turned, encoded(image, "PNG")))
        assert (found.width, found.height) == (240, 160)
        assert np.array_equal(found.pixels_HWC, expected.pixels_HWC)


PACKET = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description %s</rdf:Description></x:xmpmeta>'


@pytest.mark.parametrize(
    "told", [b'tiff:Orientation="6">', b"tiff:Orientation='6'>", b"><tiff:Orientation>6</tiff:Orientation>"]
)
@pytest.mark.parametrize("maker", [b"", b" M\xfcller", "Müller".encode()])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_an_orientation_that_stands_in_xmp_alone_is_applied(told, maker, kind):
    image = drawn()
    stored, packet = image.transpose(STORED[6]), PACKET % (told + maker)
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    if kind == "JPEG":
        data = encoded(stored, quality=95, subsampling=0, exif=exif.tobytes())
        name = b"http://ns.adobe.com/xap/1.0/\0"
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(name + packet) + 2) + name + packet + data[2:]
    else:
        options = {"xmp": packet, "lossless": True} if kind == "WEBP" else {"tiffinfo": {700: packet}}
        data = encoded(stored, kind, **options)
    found = decode(data, SETTINGS)
    assert (found.width, found.height) == (240, 160)
    assert difference(found.pixels_HWC, decode(encoded(image, "PNG"), SETTINGS).pixels_HWC) < 3


def grey_tiff(values_HW: np.ndarray, bits: int, **tags: int) -> bytes:
    """Give an uncompressed grey TIFF of any integers: Pillow writes few kinds."""
    height, width = values_HW.shape
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: values_HW.nbytes}
    fields |= {int(name[1:]): value for name, value in tags.items()}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, fields[tag]) for tag in sorted(fields))
    directory = struct.pack("<H", len(fields)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + values_HW.nbytes) + values_HW.tobytes() + directory


def test_integers_of_a_tiff_are_read_right_or_refused():
    grey_HW = np.asarray(drawn().convert("L"))
    expected = decode(encoded(drawn().convert("L"), "PNG"), SETTINGS).pixels_HWC
    right = {
        "8 bits": grey_tiff(grey_HW, 8),
        "8 bits, white is 0": grey_tiff(255 - grey_HW, 8, t262=0),
        "16 bits": grey_tiff(grey_HW.astype("<u2") * 257, 16),
        "32 bits": grey_tiff(grey_HW.astype("<u4") * 0x01010101, 32),
    }
    for kind, data in right.items():
        assert np.array_equal(decode(data, SETTINGS).pixels_HWC, expected), kind
    refused = {
        "signed": grey_tiff(grey_HW.astype(np.int8), 8, t339=2),
        "signed integers": grey_tiff(grey_HW.astype("<i2"), 16, t339=2),
        "signed  integers": grey_tiff(grey_HW.astype("<i4"), 32, t339=2),
        "0 is not black": grey_tiff(grey_HW.astype("<u2"), 16, t262=0),
        "unknown pixel mode": grey_tiff(grey_HW.astype("<u4"), 32, t262=0),
        "floating-point": grey_tiff(grey_HW.astype("<f4"), 32, t339=3),
    }
    for words, data in refused.items():
        with pytest.raises(DecodeError, match=words.replace("  ", " ")) as caught:
            decode(data, SETTINGS)
        assert caught.value.code == "unsupported"


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
    assert bits_between(full.phash, reduced.phash) <= 4


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


@pytest.mark.parametrize("view_crop", [0.5, 0.875, 0.9, 1.0])
def test_default_view_is_cut_from_the_decoded_square_without_a_resize(view_crop):
    data = encoded(drawn(300, 200))
    for input_size in (32, 95, 96, 160, 191, 192, 224):
        settings = PixelSettings(input_size=input_size, view_crop=view_crop)
        square_HWC = decode(data, settings).pixels_HWC
        top = (settings.decode_size - input_size) // 2
        cut_HWC = square_HWC[top : top + input_size, top : top + input_size]
        assert np.array_equal(view(square_HWC, settings), cut_HWC)


@pytest.mark.parametrize("aspect", ["crop", "pad"])
def test_hash_is_of_the_whole_image_whatever_becomes_of_its_sides(aspect):
    data = encoded(drawn(300, 150))
    squashed = decode(data, PixelSettings()).phash
    assert bits_between(decode(data, PixelSettings(aspect=aspect)).phash, squashed) <= 4


def test_a_refused_size_is_one_problem():
    with pytest.raises(SettingsError) as caught:
        parse_settings(PixelSettings, {"input_size": 5})
    assert caught.value.problems == ["input_size is 5: input should be greater than or equal to 8."]


def test_hash_of_a_copy_is_near_and_of_another_image_far():
    image, other = drawn(), Image.fromarray(draw_image(DEMO_CLASSES[4], np.random.default_rng(9)))
    original = decode(encoded(image, "PNG"), SETTINGS).phash
    copy = decode(encoded(image.resize((180, 120)), quality=70), SETTINGS).phash
    assert bits_between(original, copy) <= 4
    assert bits_between(original, decode(encoded(other, "PNG"), SETTINGS).phash) > 8


def test_settings_refuse_an_input_above_the_decoded_size():
    with pytest.raises(SettingsError, match="input_size is 200, above decode_size 100"):
        parse_settings(PixelSettings, {"decode_size": 100, "input_size": 200})

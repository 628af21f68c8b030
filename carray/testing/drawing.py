"""Draws labelled vehicles in scenes, and the broken files that real buckets hold: the demo's and the tests' images.

From: a class name and a random generator. To: uint8 pixels, or a folder of class folders.
Invariants: an image is a function of (seed, class, index), whatever else is drawn; place, size, scene, light, camera
and compression are drawn from the same distributions for all classes, so only the silhouette tells them apart.
Cost: 13 ms of one core an image.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import SettingsError
from carray.core.store.files import absolute, join, write_bytes
from carray.testing.silhouettes import SILHOUETTES, draw_vehicle, place_vehicle, shade

__all__ = ["DEMO_CLASSES", "draw_broken_files", "draw_dataset", "draw_image"]

Pixels = npt.NDArray[np.uint8]

DEMO_CLASSES = tuple(SILHOUETTES)
"""Class names in Stanford Cars' grammar; one make and model occurs with two bodies, one make with two models."""

_FINE = 2
"""Drawn so many times larger and averaged down: smooth edges without a vector library."""

_SKIES = [((96, 156, 224), (212, 230, 244)), ((150, 160, 172), (216, 218, 220)), ((70, 84, 140), (248, 184, 130))]
_SKIES += [((36, 44, 76), (130, 120, 150)), ((120, 176, 216), (240, 240, 232))]
_GROUNDS = [(96, 96, 100), (122, 116, 108), (150, 138, 112), (84, 110, 62), (70, 72, 78), (176, 172, 166)]
_ODD_NAMES = [
    "with spaces.jpg",
    "Käfer 車.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "number#1.jpg",
    "which?.jpg",
    "two\nlines.jpg",
]


def draw_image(label: str, rng: np.random.Generator) -> Pixels:
    """Draw one vehicle in a scene: uint8_HWC RGB, 220 to 300 wide and 150 to 190 high.

    Raises:
        SettingsError: the label is none of DEMO_CLASSES.
    """
    import cv2

    if label not in SILHOUETTES:
        raise SettingsError(f"{label!r} cannot be drawn; allowed are {', '.join(DEMO_CLASSES)}.")
    width, height = int(rng.integers(220, 301)), int(rng.integers(150, 191))
    horizon = rng.uniform(0.42, 0.62)
    canvas = _draw_scene(rng, width, height, int(horizon * height))
    length = rng.uniform(0.84, 0.95) * min(width, height * 1.7) * _FINE
    ground = rng.uniform(max(horizon + 0.15, 0.84), 0.93) * height * _FINE
    # Nose or tail may leave the picture by a hand's breadth.
    slack = max(width * _FINE - 0.94 * length, 0) / 3
    centre = width * _FINE / 2 + rng.uniform(-slack, slack)
    draw_vehicle(canvas, rng, SILHOUETTES[label], place_vehicle(rng, centre, ground, length), length)
    if rng.random() < 0.25:
        _draw_clutter(canvas, rng, ground)
    small_HWC = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return _develop(np.asarray(small_HWC, dtype=np.uint8), rng)


def draw_dataset(folder: str | os.PathLike[str], *, images_per_class: int = 40, seed: int = 0) -> None:
    """Write `folder/<class>/<number>.jpg` for every class of DEMO_CLASSES; local or S3.

    Raises:
        StorageError: a file cannot be written.
    """
    for label in DEMO_CLASSES:
        for i in range(images_per_class):
            rng = np.random.default_rng([seed, zlib.crc32(label.encode()), i])
            pixels_HWC = draw_image(label, rng)
            data = _encode(pixels_HWC, "JPEG", quality=int(rng.integers(55, 94)))
            write_bytes(join(absolute(folder), label, f"{i:04d}.jpg"), data)


def draw_broken_files(folder: str | os.PathLike[str], *, seed: int = 0) -> dict[str, str]:
    """Write files that are broken, odd or oddly named, and give each name's due error code (`ok` where it is readable).

    Raises:
        StorageError: a file cannot be written.
    """
    rng = np.random.default_rng([seed, 1])
    pixels_HWC = draw_image(DEMO_CLASSES[0], rng)
    whole = _encode(pixels_HWC, "JPEG", quality=85)
    broken = {
        "zero bytes.jpg": (b"", "empty"),
        "truncated.jpg": (whole[: len(whole) * 2 // 3], "truncated"),
        "text.jpg": (b"This is not an image.\n", "unsupported"),
        "bomb.png": (_bomb_png(30_000), "too_large"),
    }
    odd = {name: (data, "ok") for name, data in _odd_images(rng).items()}
    named = {
        name: (_encode(draw_image(DEMO_CLASSES[i % len(DEMO_CLASSES)], rng), "JPEG", quality=85), "ok")
        for i, name in enumerate(_ODD_NAMES)
    }
    files = {**broken, **odd, **named}
    for name, (data, _) in files.items():
        write_bytes(join(absolute(folder), name), data)
    return {name: code for name, (_, code) in files.items()}


def _odd_images(rng: np.random.Generator) -> dict[str, bytes]:
    """Draw one vehicle in every unusual mode that is still an image."""
    from PIL import Image

    image = Image.fromarray(draw_image(DEMO_CLASSES[1], rng))
    grey_HW = np.asarray(image.convert("L"))
    upright = Image.Exif()
    upright[0x0112] = 6
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(255 - grey_HW))
    frames = [Image.fromarray(draw_image(label, rng)).resize(image.size) for label in DEMO_CLASSES[:3]]
    return {
        "cmyk.jpg": _encode(image.convert("CMYK"), "JPEG", quality=85),
        "grey.jpg": _encode(grey_HW, "JPEG", quality=85),
        "palette.png": _encode(image.quantize(64), "PNG"),
        "alpha.png": _encode(alpha, "PNG"),
        "sixteen bit.png": _encode(grey_HW.astype(np.uint16) * 257, "PNG"),
        "animated.gif": _encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rotated.jpg": _encode(image.rotate(90, expand=True), "JPEG", quality=85, exif=upright.tobytes()),
        "one pixel.png": _encode(np.full((1, 1, 3), 200, dtype=np.uint8), "PNG"),
    }


def _encode(image: Any, kind: str, **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _bomb_png(side: int) -> bytes:
    """Make a valid black PNG of side x side pixels, one bit each: small as a file, huge as pixels."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + (side + 7) // 8)
    data = b"".join(squeeze.compress(row * 100) for _ in range(side // 100)) + squeeze.compress(row * (side % 100))
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data + squeeze.flush()), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def _draw_scene(rng: np.random.Generator, width: int, height: int, line: int) -> Pixels:
    """Draw sky, ground and what stands on the horizon: uint8_HWC, _FINE times width and height."""
    import cv2

    top, low = np.array(_SKIES[rng.integers(len(_SKIES))], dtype=np.float32)
    ground = np.array(_GROUNDS[rng.integers(len(_GROUNDS))], dtype=np.float32)
    scene = np.empty((height, width, 3), dtype=np.float32)
    share_H11 = np.linspace(0, 1, line, dtype=np.float32)[:, None, None]
    scene[:line] = top * (1 - share_H11) + low * share_H11
    scene[line:] = ground * np.linspace(0.8, 1.15, height - line, dtype=np.float32)[:, None, None]
    # Coarse and fine grain: clouds, asphalt and grass in one.
    for cells, strength in ((9, 7.0), (70, 5.0)):
        grain = strength * rng.standard_normal((cells * height // width + 2, cells), dtype=np.float32)
        scene += cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC)[:, :, None]
    fine_HWC = cv2.resize(scene.clip(0, 255).astype(np.uint8), (width * _FINE, height * _FINE))
    canvas = np.asarray(fine_HWC, dtype=np.uint8)
    sky = canvas.copy()
    (_draw_houses if rng.random() < 0.5 else _draw_trees)(canvas, rng, line * _FINE)
    haze = rng.uniform(0.35, 0.75)
    canvas = np.asarray(cv2.addWeighted(canvas, 1 - haze, sky, haze, 0), dtype=np.uint8)
    if rng.random() < 0.5:
        y = int(rng.uniform(line + 0.6 * (height - line), height)) * _FINE
        end = (canvas.shape[1], y + int(rng.integers(-8, 9)))
        cv2.line(canvas, (0, y), end, (216, 214, 200), int(rng.integers(3, 7)), cv2.LINE_AA)
    return canvas


def _draw_houses(canvas: Pixels, rng: np.random.Generator, line: int) -> None:
    import cv2

    x = -int(rng.integers(0, 60))
    while x < canvas.shape[1]:
        wide, tall = int(rng.integers(40, 150)), int(rng.uniform(0.1, 0.75) * line)
        wall = shade(tuple(rng.uniform(80, 190) + rng.uniform(-24, 24, 3)), 1.0)
        cv2.rectangle(canvas, (x, line - tall), (x + wide, line), wall, -1)
        for window_y in range(line - tall + 10, line - 12, 22):
            for window_x in range(x + 8, x + wide - 12, 20):
                glass = (230, 220, 160) if rng.random() < 0.2 else shade(wall, 0.6)
                cv2.rectangle(canvas, (window_x, window_y), (window_x + 9, window_y + 11), glass, -1)
        x += wide + int(rng.integers(0, 50))


def _draw_trees(canvas: Pixels, rng: np.random.Generator, line: int) -> None:
    import cv2

    hills = [(x, line - rng.uniform(0.02, 0.3) * line) for x in np.linspace(0, canvas.shape[1], 7)]
    green = (rng.uniform(50, 110), rng.uniform(85, 130), rng.uniform(50, 90))
    outline = np.array([(0, line), *hills, (canvas.shape[1], line)], dtype=np.int32)
    cv2.fillPoly(canvas, [outline], shade(green, 1.2), cv2.LINE_AA)
    for _ in range(int(rng.integers(2, 9))):
        x, tall = int(rng.integers(0, canvas.shape[1])), int(rng.uniform(0.15, 0.6) * line)
        cv2.line(canvas, (x, line), (x, line - tall // 2), (84, 64, 48), max(3, tall // 14))
        for _ in range(7):
            leaf = (x + int(rng.normal(0, tall * 0.16)), line - int(tall * rng.uniform(0.45, 0.95)))
            cv2.circle(canvas, leaf, max(4, tall // 5), shade(green, rng.uniform(0.65, 1.05)), -1, cv2.LINE_AA)


def _draw_clutter(canvas: Pixels, rng: np.random.Generator, ground: float) -> None:
    """Put a pole or a bush before the vehicle, so that no single detail can be relied on."""
    import cv2

    height, width = canvas.shape[:2]
    x, foot = int(rng.uniform(0, width)), int(min(height, ground + rng.uniform(4, 40)))
    if rng.random() < 0.5:
        top = (x + int(rng.integers(-6, 7)), 0)
        cv2.line(canvas, (x, foot), top, (112, 112, 116), int(rng.integers(6, 14)), cv2.LINE_AA)
        return
    green = (rng.uniform(40, 90), rng.uniform(80, 130), rng.uniform(40, 80))
    for _ in range(14):
        leaf = (x + int(rng.normal(0, 26)), foot - int(rng.uniform(0, 44)))
        cv2.circle(canvas, leaf, int(rng.integers(8, 18)), shade(green, rng.uniform(0.6, 1.2)), -1, cv2.LINE_AA)


def _develop(pixels_HWC: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply the camera: exposure, contrast, colour cast and noise."""
    gain_C = (rng.uniform(0.8, 1.2) * rng.uniform(0.94, 1.06, 3)).astype(np.float32)
    contrast, noise = np.float32(rng.uniform(0.85, 1.15)), np.float32(rng.uniform(1, 7))
    grain_HWC = rng.standard_normal(pixels_HWC.shape, dtype=np.float32) * noise
    return (((pixels_HWC - np.float32(128)) * contrast + 128 + grain_HWC) * gain_C).clip(0, 255).astype(np.uint8)

"""Corrupts pictures the way cameras, phones and websites do, at a few severities each.

From: an upright original, height x width x 3 uint8 RGB. To: the bytes of an image file, which `pixels.decode` reads
like any other; so the definition of pixels stays the one of training and classification.
Invariants: the same picture gives the same bytes, nothing is drawn by chance; strengths are in parts of the picture or
in its own units, so that they mean the same for small and large originals. A picture whose short side is above
PICTURE_SIDE (or decode_size, where that is more) is brought down to it first, as a website would; what this and the
other decoder cost is the row `reencoded`, which corrupts nothing.
Sources: torchvision.transforms.v2 does the work; the kinds are a selection of Hendrycks and Dietterich, 'Benchmarking
Neural Network Robustness to Common Corruptions and Perturbations', 2019, and of what happens to photographs of cars.
Cost: importing torchvision takes about 10 s; all variants of one small photograph together take 0.1 s.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CORRUPTIONS", "NONE", "PICTURE_SIDE", "REENCODED", "Corruption", "as_picture"]

NONE, REENCODED = "none", "reencoded"
PICTURE_SIDE = 512
"""Pixels of the short side above which a picture is brought down before it is corrupted."""


@dataclass(frozen=True)
class Corruption:
    """Is one way to corrupt a picture at one severity; `apply` takes Pillow's image and gives a file's bytes."""

    name: str
    severity: str
    apply: Callable[[Any], bytes]


def as_picture(original_HWC: npt.NDArray[np.uint8], *, decode_size: int) -> Any:
    """Give the Pillow image that corruptions take, its short side at most PICTURE_SIDE or decode_size."""
    from PIL import Image

    picture, side = Image.fromarray(original_HWC), max(PICTURE_SIDE, decode_size)
    return _shrunk(picture, side)


def _shrunk(picture: Any, side: int) -> Any:
    from torchvision.transforms.v2 import functional

    return functional.resize(picture, [side], antialias=True) if min(picture.size) > side else picture


def _lossless(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "BMP")  # of the lossless formats the one that costs no time
    return buffer.getvalue()


def _jpeg(picture: Any, quality: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _blur(picture: Any, sigma: float) -> bytes:
    """Blur by a Gaussian of standard deviation `sigma`, a fraction of the short side."""
    from torchvision.transforms.v2 import functional

    pixels = sigma * min(picture.size)
    radius = min(math.ceil(3 * pixels), min(picture.size) - 1)
    return _lossless(functional.gaussian_blur(picture, [2 * radius + 1] * 2, [pixels] * 2) if radius else picture)


def _low_resolution(picture: Any, side: int) -> bytes:
    return _lossless(_shrunk(picture, side))


def _crop(picture: Any, kept: float) -> bytes:
    """Keep the middle, `kept` of each side."""
    from torchvision.transforms.v2 import functional

    return _lossless(functional.center_crop(picture, [max(1, round(kept * side)) for side in picture.size[::-1]]))


def _grey(picture: Any) -> bytes:
    from torchvision.transforms.v2 import functional

    return _lossless(functional.to_grayscale(picture, num_output_channels=3))


def _rotate(picture: Any, degrees: float) -> bytes:
    """Turn to the left; the corners show mirrored surroundings; black ones would be a corruption of their own."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    width, height = picture.size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across, down = width * cos + height * sin - width, width * sin + height * cos - height
    margins = [max(0, math.ceil(across / 2)), max(0, math.ceil(down / 2))]
    padded = functional.pad(picture, margins, padding_mode="symmetric")
    turned = functional.rotate(padded, degrees, interpolation=InterpolationMode.BILINEAR)
    return _lossless(functional.center_crop(turned, [height, width]))


def _brightness(picture: Any, factor: float) -> bytes:
    from torchvision.transforms.v2 import functional

    return _lossless(functional.adjust_brightness(picture, factor))


_SIGMAS, _DARK, _BRIGHT = (0.005, 0.01, 0.02), (0.5, 0.25), (1.5, 2.0)
CORRUPTIONS = [
    Corruption(REENCODED, "lossless", _lossless),
    *(Corruption("blur", f"sigma {100 * sigma:g} %", partial(_blur, sigma=sigma)) for sigma in _SIGMAS),
    *(Corruption("jpeg", f"quality {quality}", partial(_jpeg, quality=quality)) for quality in (50, 20, 10)),
    *(Corruption("low_resolution", f"{side} pixels", partial(_low_resolution, side=side)) for side in (128, 64, 32)),
    *(Corruption("crop", f"{100 * kept:g} % kept", partial(_crop, kept=kept)) for kept in (0.8, 0.6, 0.4)),
    Corruption("grey", "no colour", _grey),
    *(Corruption("rotation", f"{angle} degrees", partial(_rotate, degrees=angle)) for angle in (5, 15, 30)),
    *(Corruption("darkness", f"{100 * f:g} % light", partial(_brightness, factor=f)) for f in _DARK),
    *(Corruption("brightness", f"{100 * f:g} % light", partial(_brightness, factor=f)) for f in _BRIGHT),
]
"""In the order of the table; the severities of one kind grow. Sigma is in parts of the short side, pixels are those of
the short side, and a crop keeps the middle of each side."""

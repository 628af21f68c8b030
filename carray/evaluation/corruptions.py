"""Measures what corrupted pictures cost a bundle: top-1 by corruption and severity, on the same images.

A corruption turns an upright original (HWC uint8 RGB) into the bytes of an image file, which `pixels.decode` then reads
as usual. The same picture gives the same bytes; strengths are relative to the picture's size. A picture whose short
side exceeds PICTURE_SIDE (or decode_size, if larger) is scaled down first; the row `reencoded`, which corrupts nothing,
shows what that costs. All rows are of the same images, those that can be read, and drops are paired.
torchvision.transforms.v2 does the work; the kinds are a selection of Hendrycks and Dietterich, 'Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations', 2019, and of what happens to photographs of cars.
Cost: importing torchvision takes about 10 s; all variants of one small photograph together take 0.1 s.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer
from carray.core.errors import DecodeError
from carray.evaluation.metrics import paired_drop, wilson_interval
from carray.evaluation.score import Row, read_batches, score_pixels
from carray.images.pixels import decode, decode_original, view
from carray.images.read import ReadImage, failed_image, fetch_original
from carray.manifest.manifest_file import row_box

__all__ = [
    "CORRUPTIONS",
    "NONE",
    "PICTURE_SIDE",
    "REENCODED",
    "ROBUSTNESS_SCHEMA",
    "VARIANTS",
    "Corruption",
    "as_picture",
    "corrupted_hits",
    "robustness_rows",
]

Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

NONE, REENCODED = "none", "reencoded"
PICTURE_SIDE = 512
"""Short side, in pixels, above which a picture is scaled down before it is corrupted."""


@dataclass(frozen=True)
class Corruption:
    """A corruption at one severity; `apply` takes a Pillow image and returns the bytes of an image file."""

    name: str
    severity: str
    apply: Callable[[Any], bytes]


def as_picture(original_HWC: npt.NDArray[np.uint8], *, decode_size: int) -> Any:
    """Convert to a Pillow image whose short side is at most PICTURE_SIDE or decode_size."""
    from PIL import Image

    return _shrink(Image.fromarray(original_HWC), max(PICTURE_SIDE, decode_size))


def _shrink(picture: Any, side: int) -> Any:
    from torchvision.transforms.v2 import functional

    return functional.resize(picture, [side], antialias=True) if min(picture.size) > side else picture


def _lossless(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "BMP")  # the fastest lossless format
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
    return _lossless(_shrink(picture, side))


def _crop(picture: Any, kept: float) -> bytes:
    """Keep the centre: the fraction `kept` of each side."""
    from torchvision.transforms.v2 import functional

    return _lossless(functional.center_crop(picture, [max(1, round(kept * side)) for side in picture.size[::-1]]))


def _grey(picture: Any) -> bytes:
    from torchvision.transforms.v2 import functional

    return _lossless(functional.to_grayscale(picture, num_output_channels=3))


def _rotate(picture: Any, degrees: float) -> bytes:
    """Rotate counter-clockwise; corners are filled by mirroring, since black ones would be another corruption."""
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
"""In the table's order, severities growing. Sigma is relative to the short side, and pixels are those of the short
side."""

ROBUSTNESS_SCHEMA = pa.schema(
    [
        ("corruption", pa.string()),  # none first: the plain accuracy; reencoded corrupts nothing, it is the control
        ("severity", pa.string()),  # in words; those of one corruption grow
        ("images", pa.int64()),
        ("top1", pa.float64()),  # 0..1
        ("top1_low", pa.float64()),  # Wilson's 95 % interval
        ("top1_high", pa.float64()),
        ("drop_points", pa.float64()),  # 100 * (top1 of none - top1), the same images
        ("drop_low_points", pa.float64()),  # 95 % interval of the paired difference
        ("drop_high_points", pa.float64()),
        ("lost", pa.int64()),  # images that were right and no longer are
        ("gained", pa.int64()),  # images that were wrong and are right now
    ]
)

VARIANTS = [(NONE, ""), *((corruption.name, corruption.severity) for corruption in CORRUPTIONS)]
"""Corruption and severity of each row, in the table's order."""


def corrupted_hits(rows: Sequence[Row], scorer: Scorer) -> tuple[Bools, Counter[str]]:
    """Score all variants of each readable image.

    Returns:
        Whether each is classified right, booleans of shape (V, N) for V variants and N readable images; and the number
        of unreadable images by error code.
    """
    index = {name: i for i, name in enumerate(scorer.info.classes)}
    hits = [np.empty((len(VARIANTS), 0), dtype=bool)]
    unreadable: Counter[str] = Counter()
    for batch in read_batches(rows, lambda row: _variants(row, scorer.info), what="corrupting"):
        unreadable.update(str(seen.error_code) for _, seen in batch if isinstance(seen, ReadImage))
        readable = [(index[row["label"]], seen) for row, seen in batch if not isinstance(seen, ReadImage)]
        truth_B = np.array([truth for truth, _ in readable], dtype=np.int64)
        logits_NK, _ = score_pixels(scorer, [pixels_HWC for _, variants in readable for pixels_HWC in variants])
        predicted_BV = logits_NK.argmax(axis=1).reshape(len(readable), len(VARIANTS))
        hits.append((predicted_BV == truth_B[:, None]).T)
    return np.concatenate(hits, axis=1), unreadable


def _variants(row: Row, info: BundleInfo) -> list[Pixels] | ReadImage:
    """Make the network's inputs, of the image as it is and of each corruption; or the reason why it is unreadable."""
    fetched = fetch_original(row["uri"], escaped=bool(row["escaped"]), sha256=row["sha256"])
    if isinstance(fetched, ReadImage):
        return fetched
    box = row_box(row) if info.uses_boxes else None
    try:
        seen = [view(decode(fetched.data, info.pixels, box=box).pixels_HWC, info.pixels)]
        picture = as_picture(decode_original(fetched.data, box=box), decode_size=info.pixels.decode_size)
        for corruption in CORRUPTIONS:
            # The picture is already cut to the box.
            seen.append(view(decode(corruption.apply(picture), info.pixels).pixels_HWC, info.pixels))
    except DecodeError as err:
        return failed_image(err, fetched)
    return seen


def robustness_rows(hits_VN: Bools, variants: Sequence[tuple[str, str]] = VARIANTS) -> list[dict[str, Any]]:
    """Turn hits of shape (V, N), the first row those of the plain images, into rows of ROBUSTNESS_SCHEMA.

    Raises:
        ValueError: there is no image.
    """
    images = hits_VN.shape[1]
    if not images:
        raise ValueError("there are no images to measure on")
    rows = []
    for (corruption, severity), hits_N in zip(variants, hits_VN, strict=True):
        low, high = wilson_interval(int(hits_N.sum()), images)
        lost, gained = int((hits_VN[0] & ~hits_N).sum()), int((~hits_VN[0] & hits_N).sum())
        drop, drop_low, drop_high = paired_drop(lost, gained, images)
        row = {"corruption": corruption, "severity": severity, "images": images, "top1": float(hits_N.mean())}
        row |= {"top1_low": low, "top1_high": high, "lost": lost, "gained": gained}
        rows.append(row | {"drop_points": drop, "drop_low_points": drop_low, "drop_high_points": drop_high})
    # The plain row differs from itself by nothing, so its interval is 0, too.
    rows[0] |= {"drop_low_points": 0.0, "drop_high_points": 0.0}
    return rows

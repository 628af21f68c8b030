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
from carray.evaluation.score import Row, read_batches
from carray.images.pixels import decode, decode_original, view
from carray.images.read import ReadImage, failed_image, fetch_original
from carray.manifest.manifest_file import row_box

__all__ = ["CORRUPTIONS", "VARIANTS", "Corruption", "as_picture", "corrupted_hits", "robustness_rows"]

Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

NONE, REENCODED = "none", "reencoded"
PICTURE_SIDE = 512
"""Short side, in pixels, above which a picture is scaled down before it is corrupted."""
BATCH_IMAGES = 16
"""Photographs whose variants are in memory at once."""


@dataclass(frozen=True)
class Corruption:
    """A corruption at one severity."""

    name: str
    severity: str
    change: Callable[[Any], Any] = lambda picture: picture
    """Turns a Pillow image into the corrupted one."""
    jpeg_quality: int | None = None
    """None: the file is lossless."""

    def apply(self, picture: Any) -> bytes:
        """Corrupt a Pillow image; gives the bytes of an image file."""
        buffer, changed = io.BytesIO(), self.change(picture)
        if self.jpeg_quality:
            changed.save(buffer, "JPEG", quality=self.jpeg_quality)
        else:
            changed.save(buffer, "BMP")  # the fastest lossless format
        return buffer.getvalue()


def as_picture(original_HWC: Pixels, *, decode_size: int) -> Any:
    """Convert to a Pillow image whose short side is at most PICTURE_SIDE or decode_size."""
    from PIL import Image

    return _shrink(Image.fromarray(original_HWC), max(PICTURE_SIDE, decode_size))


def _torchvision() -> Any:
    from torchvision.transforms.v2 import functional

    return functional


def _shrink(picture: Any, strength: float) -> Any:
    """Scale down so that the short side has at most `strength` pixels."""
    side = round(strength)
    return _torchvision().resize(picture, [side], antialias=True) if min(picture.size) > side else picture


def _blur(picture: Any, strength: float) -> Any:
    """Blur by a Gaussian whose standard deviation is a fraction of the short side."""
    pixels = strength * min(picture.size)
    radius = min(math.ceil(3 * pixels), min(picture.size) - 1)
    return _torchvision().gaussian_blur(picture, [2 * radius + 1] * 2, [pixels] * 2) if radius else picture


def _crop(picture: Any, strength: float) -> Any:
    """Keep the centre: a fraction of each side."""
    return _torchvision().center_crop(picture, [max(1, round(strength * side)) for side in picture.size[::-1]])


def _rotate(picture: Any, strength: float) -> Any:
    """Rotate counter-clockwise by degrees; corners are mirrored, since black ones would be another corruption."""
    from torchvision.transforms.v2 import InterpolationMode

    functional, (width, height) = _torchvision(), picture.size
    cos, sin = math.cos(math.radians(strength)), math.sin(math.radians(strength))
    across, down = width * cos + height * sin - width, width * sin + height * cos - height
    margins = [max(0, math.ceil(across / 2)), max(0, math.ceil(down / 2))]
    padded = functional.pad(picture, margins, padding_mode="symmetric")
    turned = functional.rotate(padded, strength, interpolation=InterpolationMode.BILINEAR)
    return functional.center_crop(turned, [height, width])


def _grey(picture: Any) -> Any:
    return _torchvision().to_grayscale(picture, num_output_channels=3)


def _light(picture: Any, strength: float) -> Any:
    return _torchvision().adjust_brightness(picture, strength)


def _severities(name: str, words: str, change: Callable[..., Any], strengths: Sequence[float]) -> list[Corruption]:
    """List a corruption's severities; per cent become fractions."""
    scale = 100 if "%" in words else 1
    return [Corruption(name, words.format(one), partial(change, strength=one / scale)) for one in strengths]


CORRUPTIONS = [
    Corruption(REENCODED, "lossless"),
    *_severities("blur", "sigma {:g} %", _blur, (0.5, 1, 2)),
    *(Corruption("jpeg", f"quality {quality}", jpeg_quality=quality) for quality in (50, 20, 10)),
    *_severities("low_resolution", "{} pixels", _shrink, (128, 64, 32)),
    *_severities("crop", "{} % kept", _crop, (80, 60, 40)),
    Corruption("grey", "no colour", _grey),
    *_severities("rotation", "{} degrees", _rotate, (5, 15, 30)),
    *_severities("darkness", "{} % light", _light, (50, 25)),
    *_severities("brightness", "{} % light", _light, (150, 200)),
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
    read = partial(_variants, info=scorer.info)
    for batch in read_batches(rows, read, what="corrupting", batch_images=BATCH_IMAGES):
        unreadable.update(str(seen.error_code) for _, seen in batch if isinstance(seen, ReadImage))
        readable = [(index[row["label"]], seen) for row, seen in batch if not isinstance(seen, ReadImage)]
        if readable:
            pixels_NHWC = np.concatenate([variants_VHWC for _, variants_VHWC in readable])
            starts = range(0, len(pixels_NHWC), scorer.batch_images)
            logits = [scorer.score(pixels_NHWC[start : start + scorer.batch_images])[0] for start in starts]
            predicted_BV = np.concatenate(logits).argmax(axis=1).reshape(len(readable), len(VARIANTS))
            hits.append((predicted_BV == np.array([[truth] for truth, _ in readable])).T)
    return np.concatenate(hits, axis=1), unreadable


def _variants(row: Row, info: BundleInfo) -> Pixels | ReadImage:
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
    return np.stack(seen)


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

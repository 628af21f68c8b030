"""Measures what corrupted pictures cost a bundle: top-1 by corruption and severity, on the same images.

From: rows of a manifest and a scorer. To: a table whose first row is the plain accuracy.
Invariants: each row is of the same images, those that can be read; a corruption changes the original, and what
follows is `pixels.decode` and `pixels.view` as ever; a drop is paired, so that an image that was wrong before and
after counts nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer
from carray.core.errors import DecodeError
from carray.evaluation.corruptions import CORRUPTIONS, NONE, as_picture
from carray.evaluation.metrics import paired_drop, wilson_interval
from carray.evaluation.read_images import Row, read_batches, score_pixels
from carray.images.pixels import decode, decode_original, view
from carray.images.read import ReadImage, failed_image, fetch_original
from carray.manifest.manifest_file import row_box

__all__ = ["ROBUSTNESS_SCHEMA", "VARIANTS", "corrupted_hits", "robustness_rows"]

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

Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


def corrupted_hits(rows: Sequence[Row], scorer: Scorer) -> tuple[Bools, Counter[str]]:
    """Say of each variant and each readable image whether it is classified right.

    Returns:
        Booleans of shape (V, N), V the number of VARIANTS and N that of the readable images, and a count of the
        others by error code.
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
    """Give the network's input for the image as it is, then for each of its corruptions, or why it cannot be read."""
    fetched = fetch_original(row["uri"], escaped=bool(row["escaped"]), sha256=row["sha256"])
    if isinstance(fetched, ReadImage):
        return fetched
    box = row_box(row) if info.uses_boxes else None
    try:
        seen = [view(decode(fetched.data, info.pixels, box=box).pixels_HWC, info.pixels)]
        picture = as_picture(decode_original(fetched.data, box=box), decode_size=info.pixels.decode_size)
        for corruption in CORRUPTIONS:
            # The box is cut already: what is corrupted is the picture of the car that the network would get to see.
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

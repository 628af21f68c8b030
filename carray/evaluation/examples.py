"""Takes small pictures of mistaken images, so that one can see what was confused with what.

From: a scored split and its most confused pairs. To: rows of `examples.parquet`, a JPEG each.
Invariants: a picture shows what the network was shown, cut to the box where the bundle uses boxes, in its own shape;
an image that cannot be read any more is a row with the reason and no picture.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd

from carray.bundle.format import BundleInfo
from carray.core.errors import DecodeError, FetchError
from carray.evaluation.score import ScoredSplit, read_original
from carray.manifest.format import row_box
from carray.pixels import Box, PixelSettings, decode

__all__ = ["take_examples"]

PAIRS, IMAGES_A_PAIR = 12, 3
LONG_SIDE, SHORT_SIDE_LEAST = 240, 24
"""Pixels: a dozen pairs of pictures of this size are half a megabyte, and a banner of 10,000 by 10 stays one."""
QUALITY = 78


def take_examples(scored: ScoredSplit, pairs: pd.DataFrame, info: BundleInfo) -> list[dict[str, Any]]:
    """Take up to three pictures of each of the first 12 pairs, the surest mistakes first.

    Returns:
        Rows of truth, label, uri, score, jpeg, width, height and reason, in the order of the pairs.
    """
    mistaken = pd.DataFrame(
        [
            (place, row["truth"], row["label"], row["score"])
            for place, row in enumerate(scored.predictions)
            if row["status"] == "ok" and row["label"] != row["truth"]
        ],
        columns=["place", "truth", "label", "score"],
    ).sort_values(["score", "place"], ascending=[False, True])
    chosen = [
        int(place)
        for pair in pairs.head(PAIRS).to_dict("records")
        for place in mistaken.loc[
            (mistaken["truth"] == pair["truth"]) & (mistaken["label"] == pair["label"]), "place"
        ].head(IMAGES_A_PAIR)
    ]
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        pictures = list(pool.map(lambda place: _picture(scored.rows[place], boxes=info.uses_boxes), chosen))
    names = ("uri", "truth", "label", "score")
    return [
        {name: scored.predictions[place][name] for name in names} | picture
        for place, picture in zip(chosen, pictures, strict=True)
    ]


def _picture(row: Mapping[Any, Any], *, boxes: bool) -> dict[str, Any]:
    """Give jpeg, width and height of a small picture, or the reason why there is none."""
    from PIL import Image

    # Squashed to a square and stretched back: the one way of decoding that knows boxes, EXIF and every format.
    settings = PixelSettings(decode_size=LONG_SIDE, input_size=LONG_SIDE, aspect="squash")
    box = row_box(row) if boxes else None
    try:
        found = decode(read_original(row), settings, box=box)
    except (FetchError, DecodeError) as err:
        return {"reason": str(err)}
    width, height = _size(found.width, found.height, box)
    buffer = io.BytesIO()
    Image.fromarray(found.pixels_HWC).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=QUALITY, optimize=True
    )
    return {"jpeg": buffer.getvalue(), "width": width, "height": height}


def _size(width: int, height: int, box: Box | None) -> tuple[int, int]:
    """Give the picture's sides, the longer one LONG_SIDE, from those of the image or of the part of its box inside."""
    if box is not None:
        width, height = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
    scale = LONG_SIDE / max(width, height)
    return max(SHORT_SIDE_LEAST, round(width * scale)), max(SHORT_SIDE_LEAST, round(height * scale))

"""Scores one split of a manifest through the very path that classification takes.

From: a split's rows and an opened bundle. To: one prediction a row, and the logits of those that could be read.
Invariants: pixels, boxes and scores come from `pixels` and `bundle.scorer`, as in classify; rows out = rows in; an
image that cannot be read now, or whose bytes are no longer those of the manifest, is a row with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer, score_columns
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import BudgetError, DecodeError, FetchError, SchemaError
from carray.core.progress import Progress, say
from carray.core.store.image_bytes import fetch_image
from carray.images.pixels import decode, view
from carray.manifest.manifest_file import Manifest, row_box

__all__ = ["ScoredSplit", "read_original", "score_split", "seen_before"]

BATCH_IMAGES = 64

Row = Mapping[Any, Any]


@dataclass(frozen=True)
class ScoredSplit:
    """Holds a split's predictions, all of them, and of the N that could be read truth and logits, in the same order."""

    rows: list[dict[Any, Any]]
    """Of the manifest."""
    predictions: list[dict[str, Any]]
    """One a row of the manifest: uri, truth, status, and what `score_columns` gives or error_code and error."""
    truth_N: npt.NDArray[np.int64]
    """Class indices."""
    logits_NK: npt.NDArray[np.float32]
    other_NK: npt.NDArray[np.float32] | None = None
    """Logits of another runtime for the same pixels, where one was asked for."""


def score_split(
    table: Manifest, split: str, scorer: Scorer, *, rows: pd.DataFrame | None = None, other: Scorer | None = None
) -> ScoredSplit:
    """Read and score every image of a split, or some rows of it; `other` scores the same pixels, too.

    Raises:
        SchemaError: the split is empty, or holds labels that the bundle does not know.
        BudgetError: no image of the split can be read, so there is nothing to measure.
    """
    rows = table.of_split(split) if rows is None else rows
    _check_labels(rows["label"], scorer.info, table.uri)
    if scorer.info.uses_boxes and table.rows["x1"].isna().all():
        say(
            f"warning: bundle {scorer.info.bundle_id} was trained on boxes, and {table.uri} has none; whole images "
            "are scored."
        )
    records = rows.to_dict("records")
    predictions, logits_NK, other_NK = _score_rows(records, scorer, other)
    truth_N = _indices([row["truth"] for row in predictions if row["status"] == "ok"], scorer.info.classes)
    if not len(truth_N):
        first = predictions[0]
        raise BudgetError(
            f"none of the {len(predictions)} images of split {split!r} can be read (the first, {first['uri']!r}: "
            f"{first['error']}); check that they still lie where {table.uri} says."
        )
    return ScoredSplit(records, predictions, truth_N, logits_NK, other_NK if other else None)


def seen_before(scorer: Scorer, table: Manifest, split: str) -> tuple[str | None, int]:
    """Say what a split was to the bundle, and how many of its images the network was trained on.

    It was `training` where any was trained on; `selection`, where trial, epoch and temperature were chosen on it; or
    None, also where nothing is known, since a bundle of an earlier version was trained on another manifest.
    """
    seen_N = mask_trained_on(scorer.uri, scorer.info, table, table.of_split(split))
    trained_on = 0 if seen_N is None else int(seen_N.sum())
    same = scorer.info.search.get("manifest_fingerprint") == table.fingerprint
    return "training" if trained_on else "selection" if same and split == "val" else None, trained_on


def read_original(row: Row) -> bytes:
    """Read one image's bytes, and check that they are those of the manifest.

    Raises:
        FetchError: they cannot be read, or they changed.
    """
    data = fetch_image(row["uri"], escaped=bool(row["escaped"])).data
    if hashlib.sha256(data).hexdigest() != row["sha256"]:
        raise FetchError("changed", "the bytes are no longer those of the manifest; prepare it again")
    return data


def _check_labels(labels: Any, info: BundleInfo, uri: str) -> None:
    unknown = sorted(set(labels) - set(info.classes))
    if unknown:
        raise SchemaError(
            f"{uri} has {len(unknown)} labels that bundle {info.bundle_id} does not know, the first is {unknown[0]!r} "
            f"(it knows {len(info.classes)}); evaluate with a manifest of the bundle's own classes."
        )


def _score_rows(rows: Sequence[Row], scorer: Scorer, other: Scorer | None) -> tuple[list[dict[str, Any]], Any, Any]:
    """Give one prediction a row, in order, and logits_NK of those with status ok, by `scorer` and by `other`."""
    predictions: list[dict[str, Any]] = []
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    other_logits = list(logits)
    threads = min(32, 2 * len(os.sched_getaffinity(0)))  # decoding leaves the GIL; twice the cores hides the fetching
    with Progress("evaluating", total=len(rows)) as progress, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), BATCH_IMAGES):
            batch = rows[start : start + BATCH_IMAGES]
            seen = list(pool.map(lambda row: _see(row, scorer.info), batch))
            pixels = [image for image in seen if isinstance(image, np.ndarray)]
            scored: list[dict[str, Any]] = []
            if pixels:
                logits_BK, _ = scorer.score(np.stack(pixels))
                logits.append(logits_BK)
                if other is not None:
                    other_logits.append(other.score(np.stack(pixels))[0])
                columns = score_columns(logits_BK, scorer.info)
                scored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for row, image in zip(batch, seen, strict=True):
                outcome = {"status": "ok", **scored.pop(0)} if isinstance(image, np.ndarray) else image
                predictions.append({"uri": row["uri"], "truth": row["label"], **outcome})
            progress.advance(len(batch), errors=len(batch) - len(pixels))
    return predictions, np.concatenate(logits), np.concatenate(other_logits)


def _see(row: Row, info: BundleInfo) -> npt.NDArray[np.uint8] | dict[str, str]:
    """Give the network's input for one row, input_size x input_size x 3 uint8, or the reason why there is none."""
    try:
        box = row_box(row) if info.uses_boxes else None
        return view(decode(read_original(row), info.pixels, box=box).pixels_HWC, info.pixels)
    except (FetchError, DecodeError) as err:
        status = "fetch_error" if isinstance(err, FetchError) else "decode_error"
        return {"status": status, "error_code": err.code, "error": str(err)}


def _indices(labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in labels], dtype=np.int64)

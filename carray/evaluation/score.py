"""Scores one split of a manifest by the same code as classification.

Rows out = rows in: an image that cannot be read, or changed since the manifest was prepared, is a row with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer, score_columns
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import BudgetError, SchemaError
from carray.core.progress import say
from carray.evaluation.read_images import Row, read_batches
from carray.manifest.manifest_file import Manifest, read_row

__all__ = ["ScoredSplit", "score_split", "seen_before"]

BATCH_IMAGES = 64


@dataclass(frozen=True)
class ScoredSplit:
    """Holds a split's predictions, all of them, and of the N that could be read truth and logits, in the same order."""

    rows: list[dict[Any, Any]]
    """Of the manifest."""
    predictions: list[dict[str, Any]]
    """One a row of the manifest: uri, truth, `ReadImage.columns`, and `score_columns` where it was read."""
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
    read = partial(read_row, settings=scorer.info.pixels, crop_boxes=scorer.info.uses_boxes, as_input=True)
    for batch in read_batches(rows, read, what="evaluating", batch_images=BATCH_IMAGES):
        pixels = [one.pixels_HWC for _, one in batch if one.pixels_HWC is not None]
        scored: list[dict[str, Any]] = []
        if pixels:
            logits_BK, _ = scorer.score(np.stack(pixels))
            logits.append(logits_BK)
            if other is not None:
                other_logits.append(other.score(np.stack(pixels))[0])
            columns = score_columns(logits_BK, scorer.info)
            scored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for row, one in batch:
            scores = {} if one.pixels_HWC is None else scored.pop(0)
            predictions.append({"uri": row["uri"], "truth": row["label"], **one.columns, **scores})
    return predictions, np.concatenate(logits), np.concatenate(other_logits)


def _indices(labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in labels], dtype=np.int64)

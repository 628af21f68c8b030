"""Reads and scores images of a manifest, by the same code as classification.

Rows out = rows in: an image that cannot be read, or changed since the manifest was prepared, is a row with its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer, score_columns
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import BudgetError, SchemaError
from carray.core.progress import say
from carray.images.read import read_all
from carray.manifest.manifest_file import Manifest, read_row

__all__ = [
    "Row",
    "ScoredSplit",
    "check_labels",
    "draw_rows",
    "read_batches",
    "score_pixels",
    "score_split",
    "seen_before",
]

SPLIT_BATCH, BATCH_IMAGES = 64, 16
"""Images in memory at once; fewer for measurements that make some hundred inputs of them (corruptions)."""

Floats = npt.NDArray[np.float32]
Row = Mapping[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ScoredSplit:
    """A scored split: predictions of all images; truth and logits of the N that could be read, in the same order."""

    rows: list[dict[Any, Any]]
    """Rows of the manifest."""
    predictions: list[dict[str, Any]]
    """For each of them: uri, truth, `ReadImage.columns`, and, if it was read, `score_columns`."""
    truth_N: npt.NDArray[np.int64]
    """Class indices."""
    logits_NK: npt.NDArray[np.float32]
    other_NK: npt.NDArray[np.float32] | None = None
    """Logits of another runtime for the same pixels, if requested."""


def score_split(
    table: Manifest, split: str, scorer: Scorer, *, rows: pd.DataFrame | None = None, other: Scorer | None = None
) -> ScoredSplit:
    """Read and score every image of a split, or some rows of it; `other` scores the same pixels, too.

    Raises:
        SchemaError: the split is empty, or holds labels that the bundle does not know.
        BudgetError: no image of the split can be read, so there is nothing to measure.
    """
    rows = table.of_split(split) if rows is None else rows
    check_labels(rows["label"], scorer.info, table.uri)
    if scorer.info.uses_boxes and table.rows["x1"].isna().all():
        say(
            f"warning: bundle {scorer.info.bundle_id} was trained on boxes, and {table.uri} has none; whole images "
            "are scored."
        )
    records = rows.to_dict("records")
    predictions, logits_NK, other_NK = _score_rows(records, scorer, other)
    index = {name: i for i, name in enumerate(scorer.info.classes)}
    truth_N = np.array([index[row["truth"]] for row in predictions if row["status"] == "ok"], dtype=np.int64)
    if not len(truth_N):
        first = predictions[0]
        raise BudgetError(
            f"none of the {len(predictions)} images of split {split!r} can be read (the first, {first['uri']!r}: "
            f"{first['error']}); check that they still lie where {table.uri} says."
        )
    return ScoredSplit(records, predictions, truth_N, logits_NK, other_NK if other else None)


def seen_before(scorer: Scorer, table: Manifest, split: str) -> tuple[str | None, int]:
    """Tell how a split was used to make the bundle, and how many of its images the network was trained on.

    `training` if it was trained on any; `selection` if trial, epoch and temperature were chosen on it; else None, also
    if that is unknown (a bundle of an earlier version, which was trained on another manifest).
    """
    seen_N = mask_trained_on(scorer.uri, scorer.info, table, table.of_split(split))
    trained_on = 0 if seen_N is None else int(seen_N.sum())
    same = scorer.info.search.get("manifest_fingerprint") == table.fingerprint
    return "training" if trained_on else "selection" if same and split == "val" else None, trained_on


def check_labels(labels: Iterable[str], info: BundleInfo, uri: str) -> None:
    """Check that a bundle knows all labels of a manifest.

    Raises:
        SchemaError: it does not.
    """
    unknown = sorted(set(labels) - set(info.classes))
    if unknown:
        raise SchemaError(
            f"{uri} has {len(unknown)} labels that bundle {info.bundle_id} does not know, the first is {unknown[0]!r} "
            f"(it knows {len(info.classes)}); evaluate with a manifest of the bundle's own classes."
        )


def _score_rows(rows: Sequence[Row], scorer: Scorer, other: Scorer | None) -> tuple[list[dict[str, Any]], Any, Any]:
    """Return one prediction for each row, and logits_NK of those with status ok, by `scorer` and by `other`."""
    predictions: list[dict[str, Any]] = []
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    other_logits = list(logits)
    read = partial(read_row, settings=scorer.info.pixels, crop_boxes=scorer.info.uses_boxes, as_input=True)
    for batch in read_batches(rows, read, what="evaluating", batch_images=SPLIT_BATCH):
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


def draw_rows(rows: pd.DataFrame, images: int | None, *, seed: int) -> list[Row]:
    """Draw `images` rows of a manifest (None: all) by a hash of seed and content, so whatever the order of rows."""
    numbered = enumerate(rows["sha256"])
    by_hash = sorted((hashlib.sha256(f"{seed} {sha256}".encode()).hexdigest(), i) for i, sha256 in numbered)
    chosen = [i for _, i in by_hash[:images]]
    return list(rows.iloc[chosen].to_dict("records"))


def read_batches(
    rows: Sequence[Row], read: Callable[[Row], T], *, what: str, batch_images: int = BATCH_IMAGES
) -> Iterator[list[tuple[Row, T]]]:
    """Yield batches of rows, each with what `read` returns for it, in order, and show progress."""
    found = zip(rows, read_all(rows, read, what=what, ahead=batch_images), strict=True)
    while batch := list(islice(found, batch_images)):
        yield batch


def score_pixels(scorer: Scorer, pixels: Sequence[npt.NDArray[np.uint8]]) -> tuple[Floats, Floats]:
    """Compute logits_NK and embedding_ND of inputs, in the runtime's fastest batch size."""
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    embeddings = [np.empty((0, scorer.info.embedding_size), dtype=np.float32)]
    for start in range(0, len(pixels), scorer.batch_images):
        logits_BK, embedding_BD = scorer.score(np.stack(pixels[start : start + scorer.batch_images]))
        logits.append(logits_BK)
        embeddings.append(embedding_BD)
    return np.concatenate(logits), np.concatenate(embeddings)

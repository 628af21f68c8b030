"""Reads and scores images of a manifest, by the same code as classification.

Rows out = rows in: an image that cannot be read, or changed since the manifest was prepared, is a row with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.scorer import Scorer, score_columns
from carray.core.errors import BudgetError, SchemaError
from carray.core.progress import say
from carray.images.read import ReadImage, read_all
from carray.manifest.manifest_file import Manifest, read_row

__all__ = ["Row", "ScoredSplit", "check_labels", "read_batches", "score_rows", "score_split"]

BATCH_IMAGES = 64

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
    logits_NK: Floats
    other_NK: Floats | None = None
    """Logits of another runtime for the same pixels, if requested."""

    @property
    def predicted_N(self) -> npt.NDArray[np.int64]:
        """The class index with the highest logit of each image."""
        return self.logits_NK.argmax(axis=1)

    @property
    def right_N(self) -> npt.NDArray[np.bool_]:
        """Whether each image was classified right."""
        return self.predicted_N == self.truth_N


def score_split(
    table: Manifest, split: str, scorer: Scorer, *, rows: pd.DataFrame | None = None, other: Scorer | None = None
) -> ScoredSplit:
    """Read and score every image of a split, or some rows of it; `other` scores the same pixels, too.

    Raises:
        SchemaError: the split is empty, or holds labels that the bundle does not know.
        BudgetError: no image of the split can be read, so there is nothing to measure.
    """
    info, rows = scorer.info, table.of_split(split) if rows is None else rows
    check_labels(rows["label"], info, table.uri)
    if info.uses_boxes and table.rows["x1"].isna().all():
        say(
            f"warning: bundle {info.bundle_id} was trained on boxes, and {table.uri} has none; whole images are scored."
        )
    records = rows.to_dict("records")
    scorers = [scorer] if other is None else [scorer, other]
    reads, (logits_NK, *others) = score_rows(records, *scorers, what="evaluating")
    if not len(logits_NK):
        raise BudgetError(
            f"none of the {len(reads)} images of split {split!r} can be read (the first, {records[0]['uri']!r}: "
            f"{reads[0].error}); check that they still lie where {table.uri} says."
        )
    columns = score_columns(logits_NK, info)
    scored = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    predictions = [
        {"uri": row["uri"], "truth": row["label"], **one.columns, **(next(scored) if one.status == "ok" else {})}
        for row, one in zip(records, reads, strict=True)
    ]
    index = {name: i for i, name in enumerate(info.classes)}
    truth_N = np.array([index[row["truth"]] for row in predictions if row["status"] == "ok"], dtype=np.int64)
    return ScoredSplit(records, predictions, truth_N, logits_NK, *others)


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


def score_rows(rows: Sequence[Row], *scorers: Scorer, what: str) -> tuple[list[ReadImage], list[Floats]]:
    """Read each row's image as input of a bundle, and score those that could be read with its runtimes.

    Returns:
        What was read of each row, without pixels; and for each scorer the logits_NK of the N images with status ok.
    """
    info = scorers[0].info
    reads: list[ReadImage] = []
    logits = [[np.empty((0, len(info.classes)), dtype=np.float32)] for _ in scorers]
    read = partial(read_row, settings=info.pixels, crop_boxes=info.uses_boxes, as_input=True)
    for batch in read_batches(rows, read, what=what, batch_images=BATCH_IMAGES):
        pixels = [one.pixels_HWC for _, one in batch if one.pixels_HWC is not None]
        if pixels:
            for scorer, own in zip(scorers, logits, strict=True):
                own.append(scorer.score(np.stack(pixels))[0])
        reads += [replace(one, pixels_HWC=None) for _, one in batch]
    return reads, [np.concatenate(own) for own in logits]


def read_batches(
    rows: Sequence[Row], read: Callable[[Row], T], *, what: str, batch_images: int
) -> Iterator[list[tuple[Row, T]]]:
    """Yield batches of rows, each with what `read` returns for it, in order, and show progress."""
    found = zip(rows, read_all(rows, read, what=what, ahead=batch_images), strict=True)
    while batch := list(islice(found, batch_images)):
        yield batch

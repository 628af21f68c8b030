"""Computes the outlier scores of images inside and outside, from the network's answers to them.

From: rows of a manifest's split and rows of outside images. To: one row an image, every score or the reason why there
is none.
Invariants: inside and outside images take the same path to pixels, boxes apart, which outside images have not; images
that `knn` measures the distance to are training images, never those measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carray.bundle.format import BundleInfo
from carray.bundle.predict import Scorer
from carray.core.errors import DecodeError
from carray.core.progress import say
from carray.evaluation.outliers import SCORES, knn_distances, logit_scores
from carray.evaluation.reading import Refused, Row, draw_rows, read_batches, read_row, score_pixels
from carray.manifest.format import Manifest, row_box
from carray.pixels import decode, view

__all__ = ["SCORES_SCHEMA", "score_images", "training_embeddings"]

TRAINING_IMAGES = 2000
"""Drawn from the training split for `knn`, so that a large one does not cost more than what is measured."""

SCORES_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("kind", pa.string()),  # inside, or that of the outside image
        ("source", pa.string()),  # the photograph that it is, or is a tile of
        ("status", pa.string()),  # ok, fetch_error or decode_error
        ("error_code", pa.string()),
        ("error", pa.string()),
        *((name, pa.float64()) for name in SCORES),
    ]
)

Floats = npt.NDArray[np.float32]


def training_embeddings(table: Manifest, scorer: Scorer, *, split: str, seed: int) -> Floats | None:
    """Give training_MD for `knn`; None where there is nothing to be near to, or where it would be near to itself."""
    if split == "train" or not table.split_counts()["train"]:
        say("no knn score: it needs a training split that is not the one measured.")
        return None
    rows = draw_rows(table.of_split("train"), TRAINING_IMAGES, seed=seed)
    embeddings = [np.empty((0, scorer.info.embedding_size), dtype=np.float32)]
    for batch in read_batches(rows, lambda row: _see(row, scorer.info), what="embedding training images"):
        embeddings.append(score_pixels(scorer, [seen for _, seen in batch if not isinstance(seen, Refused)])[1])
    training_MD = np.concatenate(embeddings)
    return training_MD if len(training_MD) else None


def score_images(rows: Sequence[Row], scorer: Scorer, training_MD: Floats | None, *, what: str) -> list[dict[str, Any]]:
    """Give a row of SCORES_SCHEMA for each row with uri, escaped, kind and source, in order."""
    found: list[dict[str, Any]] = []
    for batch in read_batches(rows, lambda row: _see(row, scorer.info), what=what):
        pixels = [seen for _, seen in batch if not isinstance(seen, Refused)]
        logits_BK, embedding_BD = score_pixels(scorer, pixels)
        columns = logit_scores(logits_BK, temperature=scorer.info.temperature)
        if training_MD is not None and pixels:
            columns["knn"] = knn_distances(embedding_BD, training_MD)
        scores = iter([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)])
        for row, seen in batch:
            outcome = _reason(seen) if isinstance(seen, Refused) else {"status": "ok", **next(scores)}
            found.append({name: row[name] for name in ("uri", "kind", "source")} | outcome)
    return found


def _see(row: Row, info: BundleInfo) -> npt.NDArray[np.uint8]:
    box = row_box(row) if info.uses_boxes else None
    return view(decode(read_row(row), info.pixels, box=box).pixels_HWC, info.pixels)


def _reason(err: Refused) -> dict[str, Any]:
    status = "decode_error" if isinstance(err, DecodeError) else "fetch_error"
    return {"status": status, "error_code": err.code, "error": str(err)}

"""Tells how coarse a mistake is: which parts of a vehicle's name were right, and which kind of mistake was made.

From: class indices and class names in the grammar of `vehicles`. To: small tables.
Invariants: an image counts for a level exactly when the name of its class tells that level, and a prediction that does
not tell it is wrong there; kinds exclude each other and add up to all mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.evaluation.metrics import wilson_interval
from carray.vehicles import VEHICLE_COLUMNS, vehicle_columns

__all__ = ["KINDS", "LEVELS", "accuracy_by_level", "confusion_kinds"]

LEVELS = {
    "make": ("make",),
    "make_model": ("make", "model"),
    "body": ("body",),
    "year": ("year",),
    "exact": None,
}
"""What has to be the same, of a vehicle's parts; None: the class itself."""
KINDS = ("make", "model", "body", "year", "variant", "unnamed")
"""The coarsest thing that is wrong. A variant has all parts right, and is another class: another cab, another trim;
unnamed is a confusion with a class whose name is no vehicle's, where nothing can be told."""

Integers = npt.NDArray[np.int64]


def accuracy_by_level(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Measure each level: level, images that can tell it, accuracy with Wilson's low and high; null without images."""
    codes = _part_codes(classes)
    rows = []
    for level, parts in LEVELS.items():
        told_N, right_N = np.ones(len(truth_N), dtype=bool), truth_N == predicted_N
        if parts is not None:
            told_N = np.all([codes[part][truth_N] >= 0 for part in parts], axis=0)
            right_N = np.all([codes[part][truth_N] == codes[part][predicted_N] for part in parts], axis=0)
        images, hits = int(told_N.sum()), int((told_N & right_N).sum())
        low, high = wilson_interval(hits, images) if images else (None, None)
        rows.append((level, images, hits / images if images else None, low, high))
    return pd.DataFrame(rows, columns=["level", "images", "accuracy", "low", "high"])


def confusion_kinds(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Count mistakes by KINDS: kind, images, fraction_of_mistakes (null where there is none), fraction of all."""
    codes, wrong_N = _part_codes(classes), truth_N != predicted_N
    unnamed_N = (codes["make"][truth_N] < 0) | (codes["make"][predicted_N] < 0)
    differs = {part: codes[part][truth_N] != codes[part][predicted_N] for part in VEHICLE_COLUMNS}
    places = [unnamed_N, *(differs[part] for part in VEHICLE_COLUMNS)]
    kind_N = np.select(places, ["unnamed", *VEHICLE_COLUMNS], default="variant")
    mistakes = int(wrong_N.sum())
    rows = []
    for kind in KINDS:
        images = int((wrong_N & (kind_N == kind)).sum())
        rows.append((kind, images, images / mistakes if mistakes else None, images / len(truth_N)))
    return pd.DataFrame(rows, columns=["kind", "images", "fraction_of_mistakes", "fraction"])


def _part_codes(classes: Sequence[str]) -> dict[str, Integers]:
    """Number the values of each part, int64 (K,); -1 where a name does not tell it."""
    columns = vehicle_columns(classes)
    return {part: pd.factorize(np.array(columns[part], dtype=object))[0].astype(np.int64) for part in VEHICLE_COLUMNS}

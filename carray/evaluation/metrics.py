"""Measures predictions against the truth: accuracies with intervals, loss, tables by class, confusions.

From: logits and class indices. To: floats between 0 and 1 and small tables. Pure functions on numpy, no files.
Invariants: top-5 counts the first min(5, K) classes; a tie goes to the class with the smaller index, as in
`bundle.predict`; a class without images has null recall, not a zero that looks measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.calibration import mean_nll
from carray.vehicles import parse_vehicle

__all__ = [
    "accuracy_by_level",
    "class_table",
    "confused_pairs",
    "confusion_counts",
    "headline",
    "top_k_hits",
    "wilson_interval",
]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def headline(logits_NK: Floats, truth_N: Integers, *, temperature: float) -> dict[str, float]:
    """Give top1 and top5 with their 95 % intervals, the loss of the calibrated scores, and macro F1.

    Macro F1 is the mean over the classes that occur in the truth or in the predictions.

    Raises:
        ValueError: there is no image to measure on.
    """
    if not len(truth_N):
        raise ValueError("there are no images to measure on")
    from sklearn.metrics import f1_score

    values: dict[str, float] = {}
    for name, k in (("top1", 1), ("top5", 5)):
        hits_N = top_k_hits(logits_NK, truth_N, k)
        low, high = wilson_interval(int(hits_N.sum()), len(hits_N))
        values |= {name: float(hits_N.mean()), f"{name}_low": low, f"{name}_high": high}
    values["loss"] = mean_nll(logits_NK, truth_N, temperature=temperature)
    values["macro_f1"] = float(f1_score(truth_N, logits_NK.argmax(axis=1), average="macro", zero_division=0.0))
    return values


def top_k_hits(logits_NK: Floats, truth_N: Integers, k: int) -> npt.NDArray[np.bool_]:
    """Say of each image, as booleans of shape (N,), whether its true class is among the first min(k, K)."""
    order_Nk = np.argsort(-logits_NK, axis=1, kind="stable")[:, :k]
    return np.asarray((order_Nk == truth_N[:, None]).any(axis=1))


def wilson_interval(hits: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Give Wilson's interval of a fraction, by default the 95 % one; it stays within 0..1 and is honest at the ends.

    >>> wilson_interval(0, 10)
    (0.0, 0.2775327998628892)
    """
    if total == 0:
        return 0.0, 1.0
    fraction = hits / total
    middle = fraction + z * z / (2 * total)
    spread = z * math.sqrt(fraction * (1 - fraction) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def class_table(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Give each class's precision, recall, f1 (null where nothing was there to measure) and support, in class order."""
    from sklearn.metrics import precision_recall_fscore_support

    precision_K, recall_K, f1_K, support_K = precision_recall_fscore_support(
        truth_N, predicted_N, labels=np.arange(len(classes)), zero_division=np.nan
    )
    return pd.DataFrame(
        {
            "label": list(classes),
            "precision": precision_K,
            "recall": recall_K,
            "f1": f1_K,
            "support": support_K.astype(np.int64),
        }
    )


def confusion_counts(truth_N: Integers, predicted_N: Integers, class_count: int) -> npt.NDArray[np.int64]:
    """Count images by (true class, predicted class): int64, K x K, rows are the truth."""
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(truth_N, predicted_N, labels=np.arange(class_count)), dtype=np.int64)


def confused_pairs(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> pd.DataFrame:
    """List every confusion that happened, the most frequent first: truth, label, images, fraction of truth's images."""
    errors_KK = counts_KK - np.diag(np.diag(counts_KK))
    truth_P, label_P = np.nonzero(errors_KK)
    images_P = errors_KK[truth_P, label_P]
    table = pd.DataFrame(
        {
            "truth": [classes[i] for i in truth_P.tolist()],
            "label": [classes[i] for i in label_P.tolist()],
            "images": images_P,
            "fraction": images_P / counts_KK.sum(axis=1)[truth_P],
        }
    )
    return table.sort_values(
        ["images", "fraction", "truth", "label"], ascending=[False, False, True, True]
    ).reset_index(drop=True)


def accuracy_by_level(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> dict[str, float]:
    """Give the accuracy of the make, of make and model, and of the exact class.

    A level that some class's name does not tell is left out: it could not be compared.
    """
    vehicles = [parse_vehicle(name) for name in classes]
    levels: dict[str, list[tuple[object, ...]]] = {
        "make": [(vehicle.make,) for vehicle in vehicles],
        "make_model": [(vehicle.make, vehicle.model) for vehicle in vehicles],
    }
    accuracies = {}
    for level, names in levels.items():
        if all(part is not None for name in names for part in name):
            hits = sum(names[t] == names[p] for t, p in zip(truth_N.tolist(), predicted_N.tolist(), strict=True))
            accuracies[level] = hits / len(truth_N)
    accuracies["exact"] = float((truth_N == predicted_N).mean())
    return accuracies

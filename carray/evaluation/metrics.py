"""Measures predictions against the truth: accuracies, loss and macro F1 with intervals, tables by class, confusions.

From: logits and class indices. To: floats between 0 and 1 and small tables. Pure functions on numpy, no files.
Invariants: top-5 counts the first min(5, K) classes; a tie goes to the class with the smaller index, as in
`bundle.predict`; a class without images has null recall, not a zero that looks measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = [
    "bootstrap_interval",
    "class_table",
    "confused_pairs",
    "confusion_counts",
    "headline",
    "top_k_hits",
    "wilson_interval",
]

RESAMPLES = 1000

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def headline(logits_NK: Floats, truth_N: Integers, *, temperature: float) -> dict[str, float | None]:
    """Give top1, top5, the loss of the calibrated scores in nats, and macro F1, each with its 95 % interval.

    Macro F1 is the mean over the classes that occur in the truth or in the predictions. Intervals are Wilson's for
    fractions, and by the bootstrap for loss and macro F1, null where one image tells none.

    Raises:
        ValueError: there is no image to measure on.
    """
    if not len(truth_N):
        raise ValueError("there are no images to measure on")
    from scipy.special import log_softmax

    values: dict[str, float | None] = {}
    for name, k in (("top1", 1), ("top5", 5)):
        hits_N = top_k_hits(logits_NK, truth_N, k)
        low, high = wilson_interval(int(hits_N.sum()), len(hits_N))
        values |= {name: float(hits_N.mean()), f"{name}_low": low, f"{name}_high": high}
    scores_NK = log_softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    nll_N = -scores_NK[np.arange(len(truth_N)), truth_N]
    predicted_N = logits_NK.argmax(axis=1)
    # In an order of their own, so that the resamples do not depend on that of the rows.
    order = np.lexsort((nll_N, predicted_N, truth_N))
    nll_N, predicted_N, truth_N = nll_N[order], predicted_N[order], truth_N[order]
    for name, statistic, samples, highest in (
        ("loss", np.mean, (nll_N,), math.inf),
        ("macro_f1", macro_f1, (truth_N, predicted_N), 1.0),
    ):
        ends = bootstrap_interval(statistic, *samples, highest=highest)
        values |= {name: float(statistic(*samples)), f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return values


def macro_f1(truth_N: Integers, predicted_N: Integers) -> float:
    """Compute macro F1 as scikit-learn's `f1_score` does, in the few steps that a thousand resamples can afford."""
    hits_K = np.bincount(truth_N[truth_N == predicted_N])
    images_K = np.bincount(np.concatenate([truth_N, predicted_N]))
    occur_K = images_K > 0
    hits_K = np.pad(hits_K, (0, len(images_K) - len(hits_K)))
    return float(np.mean(2 * hits_K[occur_K] / images_K[occur_K]))


def bootstrap_interval(
    statistic: Callable[..., Any], *samples_N: npt.NDArray[Any], highest: float = math.inf
) -> tuple[float | None, float | None]:
    """Give the 95 % interval of a statistic of images, cut to 0..highest; the same at every call; null for one image.

    It is the statistic itself and 1.96 standard errors to either side, the standard error being that of 1,000 resamples
    of the images (Davison and Hinkley, 'Bootstrap Methods', 1997, section 5.2). Their percentiles would lie too low for
    macro F1: a class of four images loses one of them in every third resample.
    """
    if len(samples_N[0]) < 2:
        return None, None
    from scipy.stats import bootstrap

    # Places are drawn, not values, so that each sample keeps its type.
    resampled = bootstrap(
        (np.arange(len(samples_N[0])),),
        lambda drawn_N: statistic(*(sample_N[drawn_N] for sample_N in samples_N)),
        vectorized=False,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    )
    middle, spread = float(statistic(*samples_N)), 1.959964 * float(resampled.standard_error)
    return max(0.0, middle - spread), min(highest, middle + spread)


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
    """Measure each class, in class order.

    Returns:
        label; precision, recall with Wilson's `_low` and `_high`, and f1, null where nothing was there to measure;
        support and predicted, images of the class and images taken for it.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision_K, recall_K, f1_K, support_K = precision_recall_fscore_support(
        truth_N, predicted_N, labels=np.arange(len(classes)), zero_division=np.nan
    )
    hits_K = np.bincount(truth_N[truth_N == predicted_N], minlength=len(classes))
    predicted_K = np.bincount(predicted_N, minlength=len(classes))
    precision_low_K, precision_high_K = _wilson_intervals(hits_K, predicted_K)
    recall_low_K, recall_high_K = _wilson_intervals(hits_K, support_K)
    return pd.DataFrame(
        {
            "label": list(classes),
            "precision": precision_K,
            "precision_low": precision_low_K,
            "precision_high": precision_high_K,
            "recall": recall_K,
            "recall_low": recall_low_K,
            "recall_high": recall_high_K,
            "f1": f1_K,
            "support": support_K.astype(np.int64),
            "predicted": predicted_K,
        }
    )


def _wilson_intervals(hits_K: Integers, totals_K: Integers) -> npt.NDArray[np.float64]:
    """Give the lows and the highs, float64 (2, K), NaN where there is nothing to divide by."""
    pairs = [
        wilson_interval(hits, total) if total else (math.nan, math.nan)
        for hits, total in zip(hits_K.tolist(), totals_K.tolist(), strict=True)
    ]
    return np.array(pairs).T


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

"""Measures predictions against the truth: accuracies with intervals, confusions, kinds of mistakes, calibration.

Pure functions of logits, scores and class indices. Fractions lie in 0..1.
Sources: Guo et al., 'On Calibration of Modern Neural Networks', 2017 (expected calibration error, 15 bins of equal
width); Geifman and El-Yaniv, 'Selective Classification for Deep Neural Networks', 2017 (risk and coverage); Ding et
al., 'Revisiting the Evaluation of Uncertainty Estimation', 2020 (AURC).
Top-5 counts the first min(5, K) classes; ties go to the class with the smaller index, as in `bundle.scorer`; a class
without images has null recall. An image counts for a level if its class name has that level, and a prediction without
it is wrong there; kinds exclude each other and add up to all mistakes. Images of equal score are accepted together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.certificates import AGREEMENT, AGREEMENT_CONFIDENT, DROP_POINTS, compare_logits
from carray.bundle.threshold import label_losses
from carray.images.vehicles import VEHICLE_COLUMNS, vehicle_columns

__all__ = ["KINDS", "LEVELS", "accuracy_by_level", "confusion_counts", "confusion_kinds", "wilson_interval"]

RESAMPLES, BINS, CHANCE_DRAWS = 1000, 15, 200

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

LEVELS = {
    "make": ("make",),
    "make_model": ("make", "model"),
    "body": ("body",),
    "year": ("year",),
    "exact": None,
}
"""The parts of a vehicle's name that must be equal; None: the class itself."""
KINDS = ("make", "model", "body", "year", "variant", "unnamed")
"""The coarsest part that is wrong. `variant`: all parts are right, but it is another class (cab, trim); `unnamed`: the
name of one of the two classes is not a vehicle's."""


def headline(logits_NK: Floats, truth_N: Integers, *, temperature: float) -> dict[str, float | None]:
    """Compute top1, top5, the loss of the calibrated scores in nats, and macro F1, each with its 95 % interval.

    Macro F1 is the mean over the classes that occur in the truth or in the predictions. Intervals are Wilson's for
    fractions, and by the bootstrap for loss and macro F1, null with one image.

    Raises:
        ValueError: there is no image to measure on.
    """
    if not len(truth_N):
        raise ValueError("there are no images to measure on")
    values: dict[str, float | None] = {}
    for name, k in (("top1", 1), ("top5", 5)):
        hits_N = top_k_hits(logits_NK, truth_N, k)
        low, high = wilson_interval(int(hits_N.sum()), len(hits_N))
        values |= {name: float(hits_N.mean()), f"{name}_low": low, f"{name}_high": high}
    loss_N = label_losses(logits_NK, truth_N, temperature=temperature)
    predicted_N = logits_NK.argmax(axis=1)
    # Sorted, so that the resamples do not depend on the order of rows.
    order = np.lexsort((loss_N, predicted_N, truth_N))
    loss_N, predicted_N, truth_N = loss_N[order], predicted_N[order], truth_N[order]
    for name, statistic, samples, highest in (
        ("loss", np.mean, (loss_N,), math.inf),
        ("macro_f1", macro_f1, (truth_N, predicted_N), 1.0),
    ):
        ends = bootstrap_interval(statistic, *samples, highest=highest)
        values |= {name: float(statistic(*samples)), f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return values


def macro_f1(truth_N: Integers, predicted_N: Integers) -> float:
    """Compute macro F1 as scikit-learn's `f1_score` does, but fast enough for a thousand resamples."""
    images_K = np.bincount(np.concatenate([truth_N, predicted_N]))
    hits_K = np.bincount(truth_N[truth_N == predicted_N], minlength=len(images_K))
    occur_K = images_K > 0
    return float(np.mean(2 * hits_K[occur_K] / images_K[occur_K]))


def bootstrap_interval(
    statistic: Callable[..., Any], *samples_N: npt.NDArray[Any], highest: float = math.inf
) -> tuple[float | None, float | None]:
    """Compute the 95 % interval of a statistic of images, cut to 0..highest; deterministic; null for one image.

    It is the statistic plus and minus 1.96 standard errors of 1,000 resamples of the images (Davison and Hinkley,
    'Bootstrap Methods', 1997, section 5.2). Percentiles would be too low for macro F1, since a resample often lacks one
    of a class's few images.
    """
    if len(samples_N[0]) < 2:
        return None, None
    from scipy.stats import bootstrap

    # Indices are drawn, not values, so that each sample keeps its dtype.
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


def top_k_hits(logits_NK: Floats, truth_N: Integers, k: int) -> Booleans:
    """Test for each image, booleans (N,), whether its true class is among the first min(k, K)."""
    order_Nk = np.argsort(-logits_NK, axis=1, kind="stable")[:, :k]
    return np.asarray((order_Nk == truth_N[:, None]).any(axis=1))


def wilson_interval(hits: int, total: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's interval of a fraction, by default at 95 %; it stays within 0..1.

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


def _fractions(hits_X: npt.ArrayLike, totals_X: npt.ArrayLike) -> Doubles:
    """Compute fractions with Wilson's lows and highs, float64 (3, X); NaN where a total is 0."""
    pairs = zip(np.asarray(hits_X).tolist(), np.asarray(totals_X).tolist(), strict=True)
    rows = [(hits / total, *wilson_interval(hits, total)) if total else (math.nan,) * 3 for hits, total in pairs]
    return np.array(rows, dtype=np.float64).T


def confusion_counts(truth_N: Integers, predicted_N: Integers, class_count: int) -> Integers:
    """Count images by (true class, predicted class): int64, K x K, rows are the truth."""
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(truth_N, predicted_N, labels=np.arange(class_count)), dtype=np.int64)


def class_table(counts_KK: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Measure each class by the confusion counts, in class order.

    Returns:
        label; precision, recall with Wilson's `_low` and `_high`, and f1, null without images to measure on;
        support and predicted, the images of the class and those predicted as it.
    """
    hits_K, support_K, predicted_K = np.diag(counts_KK), counts_KK.sum(axis=1), counts_KK.sum(axis=0)
    columns: dict[str, Any] = {"label": list(classes)}
    for name, totals_K in (("precision", predicted_K), ("recall", support_K)):
        columns |= zip((name, f"{name}_low", f"{name}_high"), _fractions(hits_K, totals_K), strict=True)
    columns["f1"] = _fractions(2 * hits_K, support_K + predicted_K)[0]
    return pd.DataFrame({**columns, "support": support_K, "predicted": predicted_K})


def confused_pairs(counts_KK: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """List every confusion that happened, the most frequent first: truth, label, images, fraction of truth's images."""
    truth_P, label_P = np.nonzero(counts_KK - np.diag(np.diag(counts_KK)))
    images_P, names_K = counts_KK[truth_P, label_P], np.array(classes, dtype=object)
    table = pd.DataFrame(
        {
            "truth": names_K[truth_P],
            "label": names_K[label_P],
            "images": images_P,
            "fraction": images_P / counts_KK.sum(axis=1)[truth_P],
        }
    )
    return table.sort_values(
        ["images", "fraction", "truth", "label"], ascending=[False, False, True, True]
    ).reset_index(drop=True)


def accuracy_by_level(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Measure each level: level, images that have it, accuracy with Wilson's low and high; null without images."""
    codes = _part_codes(classes)
    images, hits = [], []
    for parts in LEVELS.values():
        named_N, right_N = np.ones(len(truth_N), dtype=bool), truth_N == predicted_N
        if parts is not None:
            named_N = np.all([codes[part][truth_N] >= 0 for part in parts], axis=0)
            right_N = np.all([codes[part][truth_N] == codes[part][predicted_N] for part in parts], axis=0)
        images.append(int(named_N.sum()))
        hits.append(int((named_N & right_N).sum()))
    accuracy, low, high = _fractions(hits, images)
    return pd.DataFrame({"level": list(LEVELS), "images": images, "accuracy": accuracy, "low": low, "high": high})


def confusion_kinds(truth_N: Integers, predicted_N: Integers, classes: Sequence[str]) -> pd.DataFrame:
    """Count mistakes by KINDS: kind, images, fraction_of_mistakes (null without mistakes), fraction of all images."""
    codes, wrong_N = _part_codes(classes), truth_N != predicted_N
    unnamed_N = (codes["make"][truth_N] < 0) | (codes["make"][predicted_N] < 0)
    differs = [codes[part][truth_N] != codes[part][predicted_N] for part in VEHICLE_COLUMNS]
    kind_N = np.select([unnamed_N, *differs], ["unnamed", *VEHICLE_COLUMNS], default="variant")
    images = np.array([(wrong_N & (kind_N == kind)).sum() for kind in KINDS])
    of_mistakes = images / images.sum() if images.sum() else math.nan
    return pd.DataFrame(
        {"kind": KINDS, "images": images, "fraction_of_mistakes": of_mistakes, "fraction": images / len(truth_N)}
    )


def _part_codes(classes: Sequence[str]) -> dict[str, Integers]:
    """Number the values of each part, int64 (K,); -1 where a name lacks it."""
    columns = vehicle_columns(classes)
    return {part: pd.factorize(np.array(columns[part], dtype=object))[0].astype(np.int64) for part in VEHICLE_COLUMNS}


def reliability(score_N: Doubles, right_N: Booleans) -> pd.DataFrame:
    """Bin images by score: score_low, score_high, images, mean_score, accuracy, low and high (null without images)."""
    members = [_bins(score_N) == index for index in range(BINS)]
    images = [int(own_N.sum()) for own_N in members]
    accuracy, low, high = _fractions([int(right_N[own_N].sum()) for own_N in members], images)
    return pd.DataFrame(
        {
            "score_low": np.arange(BINS) / BINS,
            "score_high": np.arange(1, BINS + 1) / BINS,
            "images": images,
            "mean_score": [score_N[own_N].mean() if own_N.any() else math.nan for own_N in members],
            "accuracy": accuracy,
            "low": low,
            "high": high,
        }
    )


def _bins(score_N: Doubles) -> Integers:
    """Compute each score's bin, 0..14; bins exclude their lower end, as in Guo et al."""
    return np.clip(np.ceil(score_N * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_error(score_N: Doubles, right_N: Booleans) -> float:
    """Compute the expected calibration error, 0..1: the mean of |accuracy - score| over bins, weighted by images."""
    gaps_B = np.bincount(_bins(score_N), weights=right_N - score_N, minlength=BINS)
    return float(np.abs(gaps_B).sum() / len(score_N))


def chance_error(score_N: Doubles) -> float:
    """Estimate the calibration error that perfectly calibrated scores would have on as many images.

    The mean of 200 draws of labels that are right with the probability of their score; deterministic.
    """
    random = np.random.default_rng(0)
    return float(
        np.mean([calibration_error(score_N, random.random(len(score_N)) < score_N) for _ in range(CHANCE_DRAWS)])
    )


def coverage_table(score_N: Doubles, right_N: Booleans) -> pd.DataFrame:
    """Measure for each occurring score, highest first, the effect of accepting it and all higher ones.

    Returns:
        threshold, images, coverage, accuracy of the accepted, and its Wilson interval, low and high.
    """
    threshold_T, images_T, hits_T = _accepted(score_N, right_N)
    accuracy, low, high = _fractions(hits_T, images_T)
    return pd.DataFrame(
        {
            "threshold": threshold_T,
            "images": images_T,
            "coverage": images_T / len(score_N),
            "accuracy": accuracy,
            "low": low,
            "high": high,
        }
    )


def area_under_risk(score_N: Doubles, right_N: Booleans) -> float:
    """Compute AURC, 0..1: the share of wrong labels among the n most confident images, averaged over n = 1..N."""
    _, images_T, hits_T = _accepted(score_N, right_N)
    count_N = np.arange(1, len(score_N) + 1)
    # Mistakes among images of equal score count as evenly spread.
    wrong_N = np.interp(count_N, np.append(0, images_T), np.append(0, images_T - hits_T))
    return float(np.mean(wrong_N / count_N))


def _accepted(score_N: Doubles, right_N: Booleans) -> tuple[Doubles, Integers, Integers]:
    """List the scores that occur, highest first, and count the images of at least that score and the right ones."""
    order = np.argsort(-score_N, kind="stable")
    ordered_N = score_N[order]
    last_T = np.flatnonzero(np.append(ordered_N[1:] != ordered_N[:-1], True))
    hits_N = np.cumsum(right_N[order], dtype=np.int64)
    return ordered_N[last_T], np.asarray(last_T + 1, dtype=np.int64), hits_N[last_T]


def check_acceptance(info: BundleInfo, score_N: Doubles, right_N: Booleans) -> dict[str, Any]:
    """Compare the precision at the bundle's threshold on these images with its target.

    Returns:
        threshold, target_precision, promised (the bundle's own record, or null) and reason; with a threshold also
        accepted, coverage and precision, each share with `_low` and `_high`, and verdict: `kept` (at least the target),
        `within chance` (below it, its interval is not), `broken`, or `untested` if nothing was accepted.
    """
    promised, threshold = info.acceptance, info.accept_threshold
    target = promised and promised.target_precision
    found: dict[str, Any] = {
        "threshold": threshold,
        "target_precision": target,
        "promised": promised and promised.model_dump(mode="json"),
        "reason": "",
    }
    if threshold is None:
        return found | {"reason": promised.reason if promised else "no threshold was ever chosen for this bundle"}
    accept_N = score_N >= threshold
    accepted, right = int(accept_N.sum()), int(right_N[accept_N].sum())
    found["accepted"] = accepted
    for name, hits, total in (("coverage", accepted, len(score_N)), ("precision", right, accepted)):
        low, high = wilson_interval(hits, total) if total else (None, None)
        found |= {name: hits / total if total else None, f"{name}_low": low, f"{name}_high": high}
    if target is None:
        verdict = None
    elif not accepted:
        verdict = "untested"
    else:
        verdict = _verdict(kept=found["precision"] >= target, within_chance=found["precision_high"] >= target)
    return found | {"verdict": verdict}


def _verdict(*, kept: bool, within_chance: bool) -> str:
    return "kept" if kept else "within chance" if within_chance else "broken"


def check_certificate(
    info: BundleInfo, runtime: str, fp32_NK: Floats, other_NK: Floats, truth_N: Integers
) -> dict[str, Any]:
    """Compare a runtime with fp32 on these images, and that with the bundle's certificate.

    Returns:
        The figures of a certificate (bundle.certificates.compare_logits) for these images, with 95 % intervals of drop
        and agreement; runtime; promised, the bundle's certificate or null; and verdict: null where no certificate
        holds, else `kept`, `within chance` (a limit is missed by less than an interval), or `broken`.
    """
    found = compare_logits(fp32_NK, other_NK, truth_N, temperature=info.temperature)
    right_N, other_right_N = (logits_NK.argmax(axis=1) == truth_N for logits_NK in (fp32_NK, other_NK))
    lost, gained = int((right_N & ~other_right_N).sum()), int((~right_N & other_right_N).sum())
    _, drop_low, drop_high = paired_drop(lost, gained, len(truth_N))
    low, high = wilson_interval(round(found["agreement"] * len(truth_N)), len(truth_N))
    confident, confident_agreement = found["confident_images"], found["agreement_confident"]
    confident_high = wilson_interval(round(confident_agreement * confident), confident)[1] if confident else 1.0
    within = drop_low <= DROP_POINTS and high >= AGREEMENT and confident_high >= AGREEMENT_CONFIDENT
    promised = info.certificates.get(runtime)
    return {
        **found,
        "runtime": runtime,
        "drop_low_points": drop_low,
        "drop_high_points": drop_high,
        "agreement_low": low,
        "agreement_high": high,
        "promised": promised and promised.model_dump(mode="json"),
        "verdict": _verdict(kept=found["holds"], within_chance=within) if promised and promised.holds else None,
    }


def paired_drop(lost: int, gained: int, images: int, *, z: float = 1.959964) -> tuple[float, float, float]:
    """Compute a drop in percentage points and its 95 % interval, from the images whose outcome changed.

    Source: Agresti and Min, 'Simple improved confidence intervals for comparing matched proportions', 2005: Wald's
    interval after half an image more in each of the four cells.

    >>> [round(value, 2) for value in paired_drop(10, 2, 100)]
    [8.0, 1.08, 14.6]
    """
    total = images + 2
    difference = (lost - gained) / total
    spread = z * math.sqrt(max(0.0, lost + gained + 1 - (lost - gained) ** 2 / total)) / total
    return 100 * (lost - gained) / images, 100 * (difference - spread), 100 * (difference + spread)

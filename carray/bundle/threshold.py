"""Calibrates scores: the temperature, and the threshold from which labels are accepted at a stated precision.

Temperature: Guo et al., 'On Calibration of Modern Neural Networks', 2017, section 4.2: one scalar, fitted by the
likelihood of the validation labels; it changes no prediction.

Threshold: Angelopoulos et al., 'Learn then Test', 2021, fixed-sequence testing: thresholds are tested from the highest
down, each by Clopper and Pearson's exact one-sided bound at 95 %, until one fails. So the chosen threshold's true
precision is below the target with a probability of at most 5 %, however many were tested. This holds for images drawn
like those it was chosen on. Two things make it slightly optimistic: the temperature was fitted on the same labels, and
the search chose its winner on them. `carray evaluate` measures the precision on the test split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import Acceptance
from carray.core.progress import say

__all__ = [
    "acceptance_text",
    "calibrated_metrics",
    "calibrated_scores",
    "choose_on_logits",
    "choose_threshold",
    "exact_bounds",
    "fit_temperature",
    "images_needed",
    "label_losses",
    "top_scores",
]

CONFIDENCE = 0.95
THRESHOLDS = np.arange(999, -1, -1) / 1000
"""Fixed in advance, as the guarantee requires: 0.999, 0.998, ..., 0."""

LOWEST, HIGHEST = 0.05, 20.0
"""Bounds of the temperature; the fit ends at one when there are very few images or all are right."""

Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]


def fit_temperature(logits_NK: Logits, labels_N: Integers) -> float:
    """Find the temperature, in 0.05..20, with the greatest likelihood of labels under softmax(logits / temperature)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: label_losses(logits_NK, labels_N, temperature=float(np.exp(log_t))).mean(),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
    )
    return round(float(np.exp(found.x)), 6)


def label_losses(logits_NK: Logits, labels_N: Integers, *, temperature: float) -> Floats:
    """Compute each label's negative log-likelihood under the calibrated scores, float64 (N,), in nats."""
    from scipy.special import log_softmax

    scores_NK = log_softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    return np.asarray(-scores_NK[np.arange(len(labels_N)), labels_N])


def calibrated_metrics(logits_NK: Logits, labels_N: Integers, temperature: float) -> dict[str, float]:
    """Measure a split for bundle.json: images, top1, loss, and loss_calibrated, that of the calibrated scores."""
    return {
        "images": float(len(labels_N)),
        "top1": float((logits_NK.argmax(axis=1) == labels_N).mean()),
        "loss": float(label_losses(logits_NK, labels_N, temperature=1.0).mean()),
        "loss_calibrated": float(label_losses(logits_NK, labels_N, temperature=temperature).mean()),
    }


def calibrated_scores(logits_NK: Logits, *, temperature: float) -> Floats:
    """Compute calibrated probabilities, float64 (N, K): softmax(logits / temperature)."""
    scores_NK = logits_NK.astype(np.float64) / temperature
    scores_NK -= scores_NK.max(axis=1, keepdims=True)
    np.exp(scores_NK, out=scores_NK)
    scores_NK /= scores_NK.sum(axis=1, keepdims=True)
    return scores_NK


def top_scores(logits_NK: Logits, *, temperature: float) -> Floats:
    """Compute the calibrated score of each image's label, float64 (N,)."""
    return np.asarray(calibrated_scores(logits_NK, temperature=temperature).max(axis=1))


def choose_threshold(
    score_N: Floats, right_N: Booleans, *, target_precision: float, split: str = "val"
) -> tuple[float | None, Acceptance]:
    """Choose the lowest threshold down to which every test passes; None, with the reason, if the first one fails.

    Args:
        score_N: Calibrated scores of the labels, 0..1.
        right_N: Whether each label is right.
        target_precision: Wanted fraction of right labels among the accepted, above 0 and below 1.
        split: Name of the images' split, for the record.

    Raises:
        ValueError: the target is not above 0 and below 1.
    """
    if not 0 < target_precision < 1:
        raise ValueError(f"target_precision is {target_precision}, but it must lie above 0 and below 1")
    images = len(score_N)
    record = Acceptance(target_precision=target_precision, confidence=CONFIDENCE, split=split, images=images)
    # How many images the first tested threshold accepts depends on their number, never on labels. One of them may be
    # wrong where there are enough: otherwise one mistake among the highest scores would end the sequence at once.
    first = images_needed(target_precision, wrong=1)
    first = first if images >= first else images_needed(target_precision)
    if images < first:
        reason = (
            f"{images:,} images are too few: even with every label right, {first:,} are needed to show "
            f"{target_precision:.4g} with {CONFIDENCE:.0%} confidence"
        )
        return None, record.model_copy(update={"reason": reason})
    order = np.argsort(-score_N, kind="stable")
    accepted_T = np.searchsorted(-score_N[order], -THRESHOLDS, side="right")
    right_T = np.concatenate([[0], np.cumsum(right_N[order])])[accepted_T]
    tried = np.flatnonzero(accepted_T >= first)
    low_T = exact_bounds(right_T[tried], accepted_T[tried])[0]
    passed = int(np.argmin(np.append(low_T >= target_precision, False)))  # tests before the first that fails
    if not passed:
        first_i = tried[0]
        reason = (
            f"of the {accepted_T[first_i]:,} images with the highest scores (from {THRESHOLDS[first_i]:.3f} up) "
            f"{right_T[first_i]:,} are right, which does not show {target_precision:.4g} with {CONFIDENCE:.0%} "
            "confidence"
        )
        return None, record.model_copy(update={"reason": reason})
    last_i = tried[passed - 1]
    return float(THRESHOLDS[last_i]), _measured(record, int(right_T[last_i]), int(accepted_T[last_i]))


def _measured(record: Acceptance, right: int, accepted: int) -> Acceptance:
    figures: dict[str, float] = {"accepted": accepted}
    # One-sided bounds at 97.5 % are the two-sided 95 % interval.
    for name, hits, total, confidence in (
        ("coverage", accepted, record.images, 0.975),
        ("precision", right, accepted, CONFIDENCE),
    ):
        low, high = exact_bounds(hits, total, confidence=confidence)
        figures |= {name: hits / total, f"{name}_low": float(low), f"{name}_high": float(high)}
    return record.model_copy(update=figures)


def choose_on_logits(
    logits_NK: Logits,
    labels_N: Integers,
    *,
    temperature: float,
    target_precision: float | None,
    **note: Any,
) -> tuple[float | None, Acceptance | None]:
    """Choose the threshold on a labelled split's logits; None without a target. `note` is added to the record."""
    if target_precision is None:
        return None, None
    right_N = logits_NK.argmax(axis=1) == labels_N
    score_N = top_scores(logits_NK, temperature=temperature)
    threshold, found = choose_threshold(score_N, right_N, target_precision=target_precision)
    say(f"bundle: {acceptance_text(threshold, found)}")
    return threshold, found.model_copy(update=note)


def acceptance_text(threshold: float | None, found: Acceptance) -> str:
    """Say in one sentence what to expect of a threshold, or why there is none."""
    if threshold is None:
        return f"no threshold accepts labels with a precision of {found.target_precision:.4g}: {found.reason}"
    return (
        f"scores from {threshold:.3f} up are accepted: {found.coverage:.1%} of the images ({found.coverage_low:.1%} to "
        f"{found.coverage_high:.1%}); {found.precision:.1%} of these labels are right on {found.split} (at least "
        f"{found.precision_low:.1%} with {found.confidence:.0%} confidence)"
    )


def images_needed(target_precision: float, *, wrong: int = 0) -> int:
    """Compute the fewest images that show a precision when `wrong` of them are wrong.

    >>> images_needed(0.95), images_needed(0.95, wrong=1)
    (59, 93)
    """
    counts = np.arange(wrong + 1, int(np.ceil((20 + 20 * wrong) / (1 - target_precision))))
    low = exact_bounds(counts - wrong, counts)[0]
    return int(counts[np.argmax(low >= target_precision)])


def exact_bounds(
    hits: Integers | int, totals: Integers | int, *, confidence: float = CONFIDENCE
) -> tuple[Floats, Floats]:
    """Compute Clopper and Pearson's lower and upper bounds of fractions, each one-sided at that confidence."""
    from scipy.stats import beta

    low = np.where(np.equal(hits, 0), 0.0, beta.ppf(1 - confidence, np.maximum(hits, 1), totals - hits + 1))
    high = np.where(np.equal(hits, totals), 1.0, beta.ppf(confidence, hits + 1, np.maximum(totals - hits, 1)))
    return low, high

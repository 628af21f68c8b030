"""Measures whether scores mean what they say, and what can be had by accepting only the surest.

From: scores and whether their labels are right. To: small tables and figures.
Sources: Guo et al., 'On Calibration of Modern Neural Networks', 2017 (expected calibration error, 15 bins of equal
width); Geifman and El-Yaniv, 'Selective Classification for Deep Neural Networks', 2017 (risk and coverage); Ding et
al., 'Revisiting the Evaluation of Uncertainty Estimation', 2020 (AURC).
Invariants: images of equal score are accepted together, so that no order within them can flatter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.certify import AGREEMENT, AGREEMENT_CONFIDENT, DROP_POINTS, judge
from carray.bundle.format import BundleInfo
from carray.evaluation.metrics import wilson_interval
from carray.evaluation.robustness import paired_drop

__all__ = [
    "area_under_risk",
    "calibration_error",
    "chance_error",
    "coverage_table",
    "kept_certificate",
    "kept_promise",
    "reliability",
]

BINS = 15
CHANCE_DRAWS = 200

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]
Logits = npt.NDArray[np.float32]


def reliability(score_N: Floats, right_N: Booleans) -> pd.DataFrame:
    """Bin images by score: score_low, score_high, images, mean_score, accuracy, low and high (null without images)."""
    bin_N = _bins(score_N)
    rows = []
    for place in range(BINS):
        own_N = bin_N == place
        images, hits = int(own_N.sum()), int(right_N[own_N].sum())
        mean, accuracy = (float(score_N[own_N].mean()), hits / images) if images else (None, None)
        low, high = wilson_interval(hits, images) if images else (None, None)
        rows.append((place / BINS, (place + 1) / BINS, images, mean, accuracy, low, high))
    return pd.DataFrame(rows, columns=["score_low", "score_high", "images", "mean_score", "accuracy", "low", "high"])


def calibration_error(score_N: Floats, right_N: Booleans) -> float:
    """Compute the expected calibration error, 0..1: over bins, the mean distance of accuracy from score, by images."""
    gaps_B = np.bincount(_bins(score_N), weights=right_N - score_N, minlength=BINS)
    return float(np.abs(gaps_B).sum() / len(score_N))


def chance_error(score_N: Floats) -> float:
    """Say what the error would be on as many images if scores were exactly true: few images are never quite even.

    The mean of 200 draws of labels, right with the probability that the score states; the same at every call.
    """
    random = np.random.default_rng(0)
    return float(
        np.mean([calibration_error(score_N, random.random(len(score_N)) < score_N) for _ in range(CHANCE_DRAWS)])
    )


def coverage_table(score_N: Floats, right_N: Booleans) -> pd.DataFrame:
    """Say of each score that occurs, the highest first, what accepting it and all above gives.

    Returns:
        threshold, images, coverage, accuracy of the accepted, and its Wilson interval, low and high.
    """
    order = np.argsort(-score_N, kind="stable")
    ordered_N = score_N[order]
    last_T = np.flatnonzero(np.append(ordered_N[1:] != ordered_N[:-1], True))
    hits_T, images_T = np.cumsum(right_N[order])[last_T], last_T + 1
    ends = np.array([wilson_interval(*pair) for pair in zip(hits_T.tolist(), images_T.tolist(), strict=True)])
    return pd.DataFrame(
        {
            "threshold": ordered_N[last_T],
            "images": images_T,
            "coverage": images_T / len(score_N),
            "accuracy": hits_T / images_T,
            "low": ends[:, 0],
            "high": ends[:, 1],
        }
    )


def area_under_risk(score_N: Floats, right_N: Booleans) -> float:
    """Compute AURC, 0..1: the share of wrong labels among the n surest images, averaged over n = 1..N."""
    order = np.argsort(-score_N, kind="stable")
    ordered_N = score_N[order]
    last_T = np.flatnonzero(np.append(ordered_N[1:] != ordered_N[:-1], True))
    wrong_T = np.cumsum(~right_N[order])[last_T]
    count_N = np.arange(1, len(score_N) + 1)
    # Between two thresholds lie images of one score, whose mistakes count as evenly spread.
    wrong_N = np.interp(count_N, np.append(0, last_T + 1), np.append(0, wrong_T))
    return float(np.mean(wrong_N / count_N))


def kept_promise(info: BundleInfo, score_N: Floats, right_N: Booleans) -> dict[str, Any]:
    """Measure what the bundle's threshold does on these images, beside what was promised.

    Returns:
        threshold, target_precision, promised (the bundle's own record, or null) and reason; with a threshold also
        accepted, coverage and precision, each share with `_low` and `_high`, and verdict: `kept` (at least the target),
        `within chance` (below it, its interval is not), `broken`, or `untested` where nothing was accepted.
    """
    promised = info.acceptance
    found: dict[str, Any] = {
        "threshold": info.accept_threshold,
        "target_precision": promised and promised.target_precision,
        "promised": promised and promised.model_dump(mode="json"),
        "reason": (promised.reason if promised else "no threshold was ever chosen for this bundle")
        if info.accept_threshold is None
        else "",
    }
    if info.accept_threshold is None:
        return found
    accept_N = score_N >= info.accept_threshold
    accepted, right = int(accept_N.sum()), int(right_N[accept_N].sum())
    coverage_low, coverage_high = wilson_interval(accepted, len(score_N))
    found |= {"accepted": accepted, "coverage": accepted / len(score_N)}
    found |= {"coverage_low": coverage_low, "coverage_high": coverage_high}
    low, high = wilson_interval(right, accepted) if accepted else (None, None)
    found |= {"precision": right / accepted if accepted else None, "precision_low": low, "precision_high": high}
    return found | {"verdict": _verdict(found)}


def kept_certificate(
    info: BundleInfo, runtime: str, fp32_NK: Logits, other_NK: Logits, truth_N: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Measure what a runtime loses against fp32 on these images, beside what the bundle's certificate says.

    Returns:
        The figures of a certificate (bundle.certify.judge) for these images, with 95 % intervals of drop and
        agreement; runtime; promised, the bundle's certificate or null; and verdict: null where no certificate holds,
        else `kept`, `within chance` (a limit is missed by less than an interval), or `broken`.
    """
    found = judge(fp32_NK, other_NK, truth_N, temperature=info.temperature)
    fp32_N, other_N = fp32_NK.argmax(axis=1), other_NK.argmax(axis=1)
    lost = int(((fp32_N == truth_N) & (other_N != truth_N)).sum())
    gained = int(((fp32_N != truth_N) & (other_N == truth_N)).sum())
    _, drop_low, drop_high = paired_drop(lost, gained, len(truth_N))
    low, high = wilson_interval(int((fp32_N == other_N).sum()), len(truth_N))
    sure, sure_agreement = found["confident_images"], found["agreement_confident"]
    sure_high = wilson_interval(round(sure_agreement * sure), sure)[1] if sure else 1.0
    within = drop_low <= DROP_POINTS and high >= AGREEMENT and sure_high >= AGREEMENT_CONFIDENT
    promised = info.certificates.get(runtime)
    verdict = "kept" if found["holds"] else "within chance" if within else "broken"
    return {
        **found,
        "runtime": runtime,
        "drop_low_points": drop_low,
        "drop_high_points": drop_high,
        "agreement_low": low,
        "agreement_high": high,
        "promised": promised and promised.model_dump(mode="json"),
        "verdict": verdict if promised and promised.holds else None,
    }


def _verdict(found: dict[str, Any]) -> str | None:
    target = found["target_precision"]
    if target is None:
        return None
    if found["precision"] is None:
        return "untested"
    if found["precision"] >= target:
        return "kept"
    return "within chance" if found["precision_high"] >= target else "broken"


def _bins(score_N: Floats) -> npt.NDArray[np.int64]:
    """Number each score's bin, 0..14; the bins are open below and closed above, as in Guo et al."""
    return np.clip(np.ceil(score_N * BINS).astype(np.int64) - 1, 0, BINS - 1)

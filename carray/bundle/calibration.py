"""Fits the temperature that makes scores mean what they say.

Source: Guo et al., 'On Calibration of Modern Neural Networks', 2017, section 4.2: one scalar, by the likelihood of
validation labels; it changes no prediction.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["calibrated_metrics", "fit_temperature", "mean_nll"]

LOWEST, HIGHEST = 0.05, 20.0
"""Beyond these the fit says that there was nothing to fit: very few images, or all of them right."""


def fit_temperature(logits_NK: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64]) -> float:
    """Find the temperature, in 0.05..20, that makes labels likeliest under softmax(logits / temperature)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: mean_nll(logits_NK, labels_N, temperature=float(np.exp(log_t))),
        bounds=(np.log(LOWEST), np.log(HIGHEST)),
        method="bounded",
    )
    return round(float(np.exp(found.x)), 6)


def mean_nll(logits_NK: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], *, temperature: float) -> float:
    """Compute the mean negative log-likelihood of labels, in nats."""
    from scipy.special import log_softmax

    scores_NK = log_softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    return float(-scores_NK[np.arange(len(labels_N)), labels_N].mean())


def calibrated_metrics(
    logits_NK: npt.NDArray[np.float32], labels_N: npt.NDArray[np.int64], temperature: float
) -> dict[str, float]:
    """Give what bundle.json says of a split: images, top1, loss, and loss_calibrated, that of the calibrated scores."""
    return {
        "images": float(len(labels_N)),
        "top1": float((logits_NK.argmax(axis=1) == labels_N).mean()),
        "loss": mean_nll(logits_NK, labels_N, temperature=1.0),
        "loss_calibrated": mean_nll(logits_NK, labels_N, temperature=temperature),
    }

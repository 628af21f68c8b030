"""Turns logits into the columns that say what they mean, a batch at a time.

From: logits_BK, and what a bundle says of its classes. To: columns, one value an image.
Invariants: scores are calibrated probabilities (softmax of logits / temperature); of equal scores the class with the
smaller index comes first; a threshold that the bundle has not gives nulls, not False.
Cost: 2 microseconds an image with 196 classes in batches of 32, 4 in batches of 8; all optional columns, twice that.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import BundleInfo
from carray.images.vehicles import parse_vehicle

__all__ = ["centred_energy", "score_columns"]

Floats = npt.NDArray[np.float32]

TOP = 5


def score_columns(
    logits_BK: Floats, info: BundleInfo, *, embedding_BD: Floats | None = None, outputs: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Turn logits into the columns label, score, margin, entropy, top5_labels, top5_scores and accept.

    Margin is the first score less the second (less 0 with one class); entropy is in nats; accept is null unless the
    bundle has a threshold. `outputs` adds: `embedding`, float16; `make_score` and `model_score`, the probability of the
    label's make, and of its make and model, summed over all classes, null where the label is no vehicle's name;
    `ood_score`, `centred_energy`: higher means less like the training images, and no threshold is claimed.

    Raises:
        ValueError: embeddings are asked for and not given.
    """
    scores_BK = _softmax(logits_BK, info.temperature)
    first_B5 = _largest(scores_BK)
    top_B5 = np.take_along_axis(scores_BK, first_B5, axis=1)
    runner_up_B = top_B5[:, 1] if top_B5.shape[1] > 1 else np.zeros(len(top_B5))
    entropy_B = -(scores_BK * np.log(np.maximum(scores_BK, np.finfo(scores_BK.dtype).tiny))).sum(axis=1)
    threshold = info.accept_threshold
    columns: dict[str, list[Any]] = {
        "label": [info.classes[i] for i in first_B5[:, 0].tolist()],
        "score": top_B5[:, 0].tolist(),
        "margin": (top_B5[:, 0] - runner_up_B).tolist(),
        "entropy": entropy_B.tolist(),
        "top5_labels": [[info.classes[i] for i in first] for first in first_B5.tolist()],
        "top5_scores": top_B5.tolist(),
        "accept": [None] * len(top_B5) if threshold is None else (top_B5[:, 0] >= threshold).tolist(),
    }
    if "embedding" in outputs:
        if embedding_BD is None:
            raise ValueError("the column embedding is asked for, but no embeddings were given")
        columns["embedding"] = list(embedding_BD.astype(np.float16))
    groups = _vehicle_groups(tuple(info.classes))
    for name in ("make_score", "model_score"):
        if name in outputs:
            columns[name] = _rolled_up(scores_BK, first_B5[:, 0], groups[name])
    if "ood_score" in outputs:
        columns["ood_score"] = centred_energy(logits_BK, temperature=info.temperature).tolist()
    return columns


def centred_energy(logits_BK: Floats, *, temperature: float) -> npt.NDArray[np.float64]:
    """Compute how near an image's scores are to equal ones, float64 (B,), in nats, at most 0: there all are equal.

    It is -KL(equal scores || calibrated scores), and so the energy of Liu et al., 'Energy-based Out-of-distribution
    Detection', 2020, of logits less their own mean, less what equal logits have. The mean goes because a softmax, and
    with it training, is blind to a constant that is added to all logits: of a network trained with label smoothing the
    plain energy says nothing (results/outliers.csv). To be compared within one bundle only.
    """
    centred_BK = logits_BK.astype(np.float64) / temperature
    centred_BK -= centred_BK.mean(axis=1, keepdims=True)
    largest_B = centred_BK.max(axis=1)  # taken out first, so that no exponential overflows
    sums_B = np.exp(centred_BK - largest_B[:, None]).sum(axis=1)
    return np.minimum(np.log(logits_BK.shape[1]) - largest_B - np.log(sums_B), 0.0)


def _softmax(logits_BK: Floats, temperature: float) -> npt.NDArray[np.float64]:
    scores_BK = logits_BK.astype(np.float64) / temperature
    scores_BK -= scores_BK.max(axis=1, keepdims=True)
    np.exp(scores_BK, out=scores_BK)
    scores_BK /= scores_BK.sum(axis=1, keepdims=True)
    return scores_BK


def _largest(scores_BK: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Give the classes of the five largest scores (or of all), int64 (B, 5); `argmax` gives the first of equal ones."""
    left_BK, rows_B = scores_BK.copy(), np.arange(len(scores_BK))
    first_B5 = np.empty((len(scores_BK), min(TOP, scores_BK.shape[1])), dtype=np.int64)
    for place in range(first_B5.shape[1]):
        first_B5[:, place] = left_BK.argmax(axis=1)
        left_BK[rows_B, first_B5[:, place]] = -1.0
    return first_B5


def _rolled_up(
    scores_BK: npt.NDArray[np.float64], label_B: npt.NDArray[np.int64], group_K: npt.NDArray[np.int64]
) -> list[float | None]:
    """Sum each image's scores over the classes of its label's group; null for a label of none."""
    wanted_B = group_K[label_B]
    sums_B = (scores_BK * (group_K == wanted_B[:, None])).sum(axis=1)
    # What rounding adds to a sum of all classes must not read as more than certain.
    return [min(value, 1.0) if group >= 0 else None for value, group in zip(sums_B.tolist(), wanted_B, strict=True)]


@lru_cache(maxsize=4)
def _vehicle_groups(classes: tuple[str, ...]) -> dict[str, npt.NDArray[np.int64]]:
    """Number the make, and the make and model, of each class, int64 (K,); -1 where its name tells none."""
    vehicles = [parse_vehicle(name) for name in classes]
    return {
        "make_score": _numbered([vehicle.make for vehicle in vehicles]),
        "model_score": _numbered([vehicle.make and (vehicle.make, vehicle.model) for vehicle in vehicles]),
    }


def _numbered(names: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    numbers: dict[Hashable, int] = {None: -1}
    for name in names:
        numbers.setdefault(name, len(numbers) - 1)
    return np.array([numbers[name] for name in names], dtype=np.int64)

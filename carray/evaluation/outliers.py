"""Scores how little an image is like the training images, and measures how well each score tells outside from inside.

From: logits and embeddings of inside images (a test split) and outside ones (no car at all, say). To: one score an
image and kind of score, and a table of AUROC and FPR at 95 % TPR. Pure functions on numpy, no files.
Invariants: of every score higher means less like the training images; tiles of one photograph are one draw of the
bootstrap, not many; kinds of outside images are measured apart, since a pooled figure says only how they were mixed.

    max_softmax      1 - the largest calibrated score       Hendrycks and Gimpel, 2017
    entropy          of the calibrated scores, nats
    max_logit        - the largest logit                    Hendrycks et al., 'Scaling OOD Detection', 2022
    energy           - log(sum(exp(logits)))                Liu et al., 2020, at temperature 1
    centred_energy   the same of logits less their mean     bundle.columns; what `ood_score` is
    knn              cosine distance to the NEIGHBOURS-th   Sun et al., 2022
                     nearest embedding of a training image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from carray.bundle.predict import centred_energy

__all__ = [
    "LOGIT_SCORES",
    "NEIGHBOURS",
    "OOD_SCORE",
    "OUTLIERS_SCHEMA",
    "SCORES",
    "auroc_interval",
    "best_score",
    "fpr_at_tpr",
    "knn_distances",
    "logit_scores",
    "measure_outliers",
    "pairwise_wins",
]

OOD_SCORE = "centred_energy"
"""The one that classification writes as `ood_score`."""
LOGIT_SCORES = ("max_softmax", "entropy", "max_logit", "energy", "centred_energy")
"""Those that need no more than one image's logits."""
SCORES = (*LOGIT_SCORES, "knn")
NEIGHBOURS = 5
"""Which nearest training image `knn` measures the distance to. Not tuned: what outside images choose, they flatter."""
FEWEST_SOURCES = 5
"""Of outside images, below which an interval would claim what cannot be known, and is null."""
RESAMPLES = 2000

OUTLIERS_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),  # of the outside images
        ("score", pa.string()),  # one of SCORES
        ("auroc", pa.float64()),  # probability that an outside image scores higher than an inside one
        ("auroc_low", pa.float64()),  # 95 % interval, by bootstrap over images inside and sources outside
        ("auroc_high", pa.float64()),
        ("fpr_at_95_tpr", pa.float64()),  # fraction of outside images let in where 95 % of the inside ones are
        ("inside_images", pa.int64()),
        ("outside_images", pa.int64()),
        ("outside_sources", pa.int64()),  # photographs that the outside images are, or are tiles of
    ]
)

Values = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


def logit_scores(logits_NK: Floats, *, temperature: float) -> dict[str, Values]:
    """Compute LOGIT_SCORES, float64 of shape (N,) each, of a bundle's logits and its temperature."""
    from scipy.special import logsumexp, softmax

    scores_NK = softmax(logits_NK.astype(np.float64) / temperature, axis=1)
    entropy_N = -(scores_NK * np.log(np.maximum(scores_NK, np.finfo(np.float64).tiny))).sum(axis=1)
    return {
        "max_softmax": 1.0 - scores_NK.max(axis=1),
        "entropy": entropy_N,
        "max_logit": -logits_NK.max(axis=1).astype(np.float64),
        "energy": -logsumexp(logits_NK.astype(np.float64), axis=1),
        "centred_energy": centred_energy(logits_NK, temperature=temperature),
    }


def knn_distances(embedding_ND: Floats, training_MD: Floats, *, neighbours: int = NEIGHBOURS) -> Values:
    """Compute the cosine distance, 0..2, of each embedding to its `neighbours`-th nearest training embedding.

    With fewer training embeddings than that it is the farthest of them.
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(neighbours, len(training_MD))
    search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(training_MD)
    distances_Nk, _ = search.kneighbors(embedding_ND)
    return np.asarray(distances_Nk[:, -1], dtype=np.float64)


def measure_outliers(
    inside: Mapping[str, Values],
    outside: Mapping[str, Values],
    *,
    kinds: Sequence[str],
    sources: Sequence[str],
    seed: int,
) -> pd.DataFrame:
    """Measure each score on each kind of outside images: rows of OUTLIERS_SCHEMA.

    Args:
        inside: By score, one value an inside image.
        outside: By score, one value an outside image.
        kinds: Of each outside image.
        sources: The photograph that each outside image is, or is a tile of.
        seed: Of the bootstrap.
    """
    rows = []
    kind_M, source_M = np.array(kinds, dtype=object), np.array(sources, dtype=object)
    for kind in dict.fromkeys(kinds):
        own_M = kind_M == kind
        for score, inside_N in inside.items():
            outside_M = outside[score][own_M]
            wins_NM = pairwise_wins(inside_N, outside_M)
            low, high = auroc_interval(wins_NM, source_M[own_M].tolist(), seed=seed)
            rows.append(
                {
                    "kind": kind,
                    "score": score,
                    "auroc": float(wins_NM.mean()),
                    "auroc_low": low,
                    "auroc_high": high,
                    "fpr_at_95_tpr": fpr_at_tpr(inside_N, outside_M),
                    "inside_images": len(inside_N),
                    "outside_images": len(outside_M),
                    "outside_sources": len(set(source_M[own_M])),
                }
            )
    return pd.DataFrame(rows, columns=OUTLIERS_SCHEMA.names)


def best_score(measured: pd.DataFrame, *, among: Sequence[str] = SCORES) -> str:
    """Name the score whose lowest AUROC over the kinds of outside images is the highest; of equals the first."""
    lowest = measured[measured["score"].isin(among)].groupby("score", sort=False)["auroc"].min()
    return str(lowest.idxmax())


def pairwise_wins(inside_N: Values, outside_M: Values) -> Floats:
    """Say of each pair whether the outside image scores higher: 1, 0, or 0.5 for a tie, float32 (N, M).

    Their mean is the area under the ROC curve (Bamber, 'The area above the ordinal dominance graph', 1975).
    """
    higher_NM = outside_M[None, :] > inside_N[:, None]
    equal_NM = outside_M[None, :] == inside_N[:, None]
    return higher_NM.astype(np.float32) + 0.5 * equal_NM.astype(np.float32)


def auroc_interval(
    wins_NM: Floats, sources: Sequence[str], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """Give the 95 % percentile interval of the AUROC; nulls with fewer than FEWEST_SOURCES sources.

    Inside images are drawn with replacement, and so are outside sources, each with all of its images (Field and Welsh,
    'Bootstrapping clustered data', 2007).
    """
    names, source_M = np.unique(np.array(sources, dtype=object), return_inverse=True)
    if len(names) < FEWEST_SOURCES:
        return None, None
    random = np.random.default_rng(seed)
    images = len(wins_NM)
    # Every resample is a weight for each image or source, so no pair is compared again.
    inside_RN = random.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float32)
    outside_RS = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    outside_RM = outside_RS[:, source_M].astype(np.float32)
    means_RM = inside_RN @ wins_NM / images
    areas_R = (means_RM * outside_RM).sum(axis=1) / outside_RM.sum(axis=1)
    low, high = np.quantile(areas_R, [0.025, 0.975])
    return float(low), float(high)


def fpr_at_tpr(inside_N: Values, outside_M: Values, *, tpr: float = 0.95) -> float:
    """Give the fraction of outside images let in by the strictest threshold that lets `tpr` of the inside ones in."""
    from sklearn.metrics import roc_curve

    is_inside = np.concatenate([np.ones(len(inside_N)), np.zeros(len(outside_M))])
    fpr, reached, _ = roc_curve(is_inside, -np.concatenate([inside_N, outside_M]), drop_intermediate=False)
    return float(fpr[np.argmax(reached >= tpr - 1e-12)])

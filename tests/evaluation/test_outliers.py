"""Scores and their quality on cases whose answer is known by hand, or by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from carray.evaluation.outliers import (
    LOGIT_SCORES,
    OUTLIERS_SCHEMA,
    auroc_interval,
    best_score,
    fpr_at_tpr,
    knn_distances,
    logit_scores,
    measure_outliers,
    pairwise_wins,
)


def test_scores_of_logits_by_hand() -> None:
    sure, unsure = np.log([[8.0, 1.0, 1.0], [2.0, 2.0, 2.0]]).astype(np.float32)
    scores = logit_scores(np.stack([sure, unsure]), temperature=1.0)
    assert tuple(scores) == LOGIT_SCORES
    assert scores["max_softmax"] == pytest.approx([0.2, 2 / 3], abs=1e-6)
    assert scores["entropy"] == pytest.approx([-(0.8 * np.log(0.8) + 0.2 * np.log(0.1)), np.log(3)], abs=1e-6)
    assert scores["max_logit"] == pytest.approx([-np.log(8), -np.log(2)], abs=1e-6)
    assert scores["energy"] == pytest.approx([-np.log(10), -np.log(6)], abs=1e-6)
    # -KL(1/3, 1/3, 1/3 || 0.8, 0.1, 0.1), and no divergence at all
    divergence = (np.log(1 / 3 / 0.8) + 2 * np.log(1 / 3 / 0.1)) / 3
    assert scores["centred_energy"] == pytest.approx([-divergence, 0.0], abs=1e-6)


def test_the_temperature_calibrates_probabilities_and_leaves_logits_alone() -> None:
    logits_NK = np.random.default_rng(0).normal(0, 3, (20, 6)).astype(np.float32)
    plain, calibrated = logit_scores(logits_NK, temperature=1.0), logit_scores(logits_NK, temperature=3.0)
    assert (calibrated["max_softmax"] > plain["max_softmax"]).all()
    assert (calibrated["entropy"] > plain["entropy"]).all()
    assert (calibrated["centred_energy"] > plain["centred_energy"]).all()
    assert np.array_equal(calibrated["energy"], plain["energy"])
    assert np.array_equal(calibrated["max_logit"], plain["max_logit"])


def test_a_constant_added_to_all_logits_moves_energy_and_max_logit_only() -> None:
    """Softmax is blind to it, and so is training: what it happens to be must not decide who is outside."""
    logits_NK = np.random.default_rng(0).normal(0, 3, (20, 6)).astype(np.float32)
    plain, shifted = (logit_scores(logits_NK + np.float32(c), temperature=1.0) for c in (0, 8))
    moved = {name for name in LOGIT_SCORES if not np.allclose(plain[name], shifted[name], atol=1e-4)}
    assert moved == {"energy", "max_logit"}


def test_huge_logits_stay_finite() -> None:
    logits_NK = np.array([[3e4, -3e4], [-3e4, -3e4]], dtype=np.float32)
    for values_N in logit_scores(logits_NK, temperature=0.05).values():
        assert np.isfinite(values_N).all()
    assert logit_scores(logits_NK, temperature=1.0)["energy"] == pytest.approx([-3e4, 3e4 - np.log(2)])


def test_every_score_is_higher_for_who_is_less_sure() -> None:
    logits_NK = np.array([[9, 0, 0, 0], [6, 0, 0, 0], [3, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32)
    for values_N in logit_scores(logits_NK, temperature=1.0).values():
        assert (np.diff(values_N) > 0).all()


def test_knn_is_the_cosine_distance_to_the_wanted_neighbour() -> None:
    training_MD = np.array([[1, 0], [5, 0], [1, 1], [0, 1]], dtype=np.float32)  # lengths must not matter
    found = knn_distances(np.array([[2, 0], [0, 7], [-1, 0]], dtype=np.float32), training_MD, neighbours=2)
    assert found == pytest.approx([0.0, 1 - np.sqrt(0.5), 1 + np.sqrt(0.5)], abs=1e-6)
    assert knn_distances(training_MD[:1], training_MD[:2], neighbours=5) == pytest.approx([0.0], abs=1e-6)


def test_auroc_of_pairs_is_scikit_learns_ties_included() -> None:
    from sklearn.metrics import roc_auc_score

    random = np.random.default_rng(0)
    inside_N, outside_M = random.integers(0, 8, 40).astype(float), random.integers(2, 10, 30).astype(float)
    truth = np.r_[np.zeros(40), np.ones(30)]
    expected = roc_auc_score(truth, np.r_[inside_N, outside_M])
    assert pairwise_wins(inside_N, outside_M).mean() == pytest.approx(expected)


def test_fpr_by_hand() -> None:
    inside_N = np.arange(100.0)  # 95 of 100 are let in by the threshold 94
    assert fpr_at_tpr(inside_N, np.array([94.0, 94.5, 10.0, 200.0])) == 0.5
    assert fpr_at_tpr(inside_N, np.array([100.0])) == 0.0
    assert fpr_at_tpr(inside_N, np.array([-1.0])) == 1.0


def test_tiles_of_one_photograph_widen_the_interval_as_one_draw() -> None:
    random = np.random.default_rng(0)
    inside_N = random.normal(0, 1, 200)
    per_photograph = random.normal(1, 1, 10)
    outside_M = np.repeat(per_photograph, 30) + random.normal(0, 0.05, 300)
    wins_NM = pairwise_wins(inside_N, outside_M)
    low, high = auroc_interval(wins_NM, [f"photo {i // 30}" for i in range(300)], seed=0)
    apart_low, apart_high = auroc_interval(wins_NM, [f"photo {i}" for i in range(300)], seed=0)
    assert low is not None and high is not None and apart_low is not None and apart_high is not None
    assert low < wins_NM.mean() < high
    assert high - low > 2 * (apart_high - apart_low)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    from scipy.stats import norm

    random, held = np.random.default_rng(1), 0
    truth = norm.cdf(1 / np.sqrt(2))
    for _ in range(100):
        wins_NM = pairwise_wins(random.normal(0, 1, 80), random.normal(1, 1, 60))
        low, high = auroc_interval(wins_NM, [str(i) for i in range(60)], seed=0, resamples=300)
        assert low is not None and high is not None
        held += low <= truth <= high
    assert held >= 88


def test_few_sources_give_no_interval_and_one_seed_one_interval() -> None:
    wins_NM = pairwise_wins(np.arange(10.0), np.arange(5.0, 13.0))
    assert auroc_interval(wins_NM, ["a", "a", "b", "b", "c", "c", "d", "d"], seed=0) == (None, None)
    sources = list("abcdefgh")
    assert auroc_interval(wins_NM, sources, seed=3) == auroc_interval(wins_NM, sources, seed=3)
    assert auroc_interval(wins_NM, sources, seed=3) != auroc_interval(wins_NM, sources, seed=4)


def test_kinds_are_measured_apart_and_the_best_is_good_at_the_worst_of_them() -> None:
    inside = {"energy": np.arange(20.0), "knn": np.arange(20.0)}
    # Energy tells drawn ones perfectly and photographs not at all; knn does fairly at both.
    outside = {"energy": np.array([50.0] * 6 + [9.5] * 6), "knn": np.array([14.5] * 12)}
    kinds, sources = ["drawn"] * 6 + ["photographs"] * 6, [str(i // 2) for i in range(12)]
    measured = measure_outliers(inside, outside, kinds=kinds, sources=sources, seed=0)
    assert measured.columns.tolist() == OUTLIERS_SCHEMA.names
    assert measured[["kind", "score", "auroc"]].to_numpy().tolist() == [
        ["drawn", "energy", 1.0],
        ["drawn", "knn", 0.75],
        ["photographs", "energy", 0.5],
        ["photographs", "knn", 0.75],
    ]
    assert measured["outside_images"].tolist() == [6] * 4
    assert measured["outside_sources"].tolist() == [3] * 4
    assert best_score(measured) == "knn"
    assert best_score(measured, among=LOGIT_SCORES) == "energy"

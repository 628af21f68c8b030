"""What a row says of its logits: scores, ties, roll-ups by make and model, the embedding, accept."""

from __future__ import annotations

import numpy as np
import pytest

from carray.bundle.bundle_folder import BundleInfo, open_bundle
from carray.bundle.scorer import centred_energy, score_columns

CLASSES = ["Audi A5 Coupe 2012", "Audi A5 Wagon 2011", "Audi TT Coupe 2012", "BMW M3 Coupe 2012", "unknown", "other"]


@pytest.fixture
def info(small_bundle: str) -> BundleInfo:
    return open_bundle(small_bundle).model_copy(update={"classes": CLASSES, "temperature": 1.0})


def logits_of(*scores: float) -> np.ndarray:
    return np.log(np.array([scores], dtype=np.float32))


def test_rollups_sum_over_the_make_and_the_model(info: BundleInfo) -> None:
    logits_BK = np.concatenate([logits_of(0.3, 0.2, 0.1, 0.25, 0.1, 0.05), logits_of(0.1, 0.1, 0.1, 0.6, 0.05, 0.05)])
    columns = score_columns(logits_BK, info, outputs=["make_score", "model_score"])
    assert columns["label"] == ["Audi A5 Coupe 2012", "BMW M3 Coupe 2012"]
    assert columns["make_score"] == pytest.approx([0.6, 0.6], abs=1e-6)
    assert columns["model_score"] == pytest.approx([0.5, 0.6], abs=1e-6)


def test_a_label_that_is_no_vehicle_has_no_rollup(info: BundleInfo) -> None:
    columns = score_columns(logits_of(0.1, 0.1, 0.1, 0.1, 0.35, 0.25), info, outputs=["make_score", "model_score"])
    assert columns["label"] == ["unknown"]
    assert columns["make_score"] == columns["model_score"] == [None]


def test_of_equal_scores_the_first_class_comes_first(info: BundleInfo) -> None:
    columns = score_columns(np.array([[1, 2, 2, 1, 1, 2]], dtype=np.float32), info)
    assert columns["top5_labels"] == [[CLASSES[i] for i in (1, 2, 5, 0, 3)]]


def test_columns_agree_with_a_full_sort(info: BundleInfo) -> None:
    logits_BK = np.random.default_rng(0).normal(0, 3, (50, 6)).astype(np.float32)
    columns = score_columns(logits_BK, info)
    order_BK = np.argsort(-logits_BK, axis=1, kind="stable")
    assert columns["top5_labels"] == [[CLASSES[i] for i in row] for row in order_BK[:, :5]]
    scores_BK = np.exp(logits_BK.astype(float))
    scores_BK /= scores_BK.sum(axis=1, keepdims=True)
    assert np.allclose(columns["top5_scores"], np.take_along_axis(scores_BK, order_BK, axis=1)[:, :5])
    assert np.allclose(columns["entropy"], -(scores_BK * np.log(scores_BK)).sum(axis=1))


def test_accept_waits_for_a_threshold(info: BundleInfo) -> None:
    logits_BK = np.concatenate([logits_of(0.5, 0.1, 0.1, 0.1, 0.1, 0.1), logits_of(0.4, 0.2, 0.1, 0.1, 0.1, 0.1)])
    assert score_columns(logits_BK, info)["accept"] == [None, None]
    chosen = info.model_copy(update={"accept_threshold": 0.45})
    assert score_columns(logits_BK, chosen)["accept"] == [True, False]


def test_embeddings_are_half_floats_and_must_be_given(info: BundleInfo) -> None:
    embedding_BD = np.arange(4, dtype=np.float32)[None]
    columns = score_columns(np.zeros((1, 6), dtype=np.float32), info, embedding_BD=embedding_BD, outputs=["embedding"])
    assert columns["embedding"][0].dtype == np.float32
    assert columns["embedding"][0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no embeddings"):
        score_columns(np.zeros((1, 6), dtype=np.float32), info, outputs=["embedding"])


def test_one_class_has_no_runner_up(info: BundleInfo) -> None:
    columns = score_columns(np.zeros((2, 1), dtype=np.float32), info.model_copy(update={"classes": CLASSES[:1]}))
    assert columns["margin"] == [1.0, 1.0]
    assert columns["top5_labels"] == [CLASSES[:1]] * 2


def test_ood_score_is_the_distance_from_equal_scores_whatever_is_added_to_all_logits(info: BundleInfo) -> None:
    from scipy.stats import entropy

    logits_BK = np.random.default_rng(0).normal(0, 5, (40, 6)).astype(np.float32)
    halved = info.model_copy(update={"temperature": 2.0})
    scores_BK = np.exp(logits_BK.astype(float) / 2)
    divergence_B = entropy(np.ones_like(scores_BK), scores_BK, axis=1)  # KL(equal || scores), in nats
    columns = score_columns(logits_BK, halved, outputs=["ood_score"])
    assert columns["ood_score"] == pytest.approx((-divergence_B).tolist())
    shifted = centred_energy(logits_BK + np.float32(64), temperature=2.0)
    assert shifted == pytest.approx(-divergence_B, abs=1e-4)
    assert "ood_score" not in score_columns(logits_BK, info)


def test_ood_score_is_higher_for_who_is_less_sure_and_never_overflows() -> None:
    logits_BK = np.array([[9, 0, 0], [1, 0, 0], [7, 7, 7]], dtype=np.float32)
    sure, unsure, equal = centred_energy(logits_BK, temperature=1.0)
    assert sure < unsure < equal == 0.0
    huge = centred_energy(np.array([[3e37, -3e37, 0]], dtype=np.float32), temperature=0.05)
    assert huge == pytest.approx([-20 * 3e37], rel=1e-5)
    assert centred_energy(np.array([[5.0]], dtype=np.float32), temperature=1.0).tolist() == [0.0]

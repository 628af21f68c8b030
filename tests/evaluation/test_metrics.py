from __future__ import annotations

import numpy as np
import pytest

from carray.evaluation import metrics

CARS = ["Audi A5 Coupe 2012", "Audi A5 Coupe 2008", "Audi S4 Sedan 2012", "BMW X5 SUV 2007"]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_headline_counts_the_first_and_the_first_five() -> None:
    # The true class stands at place 0, 1, 4 and 5 of six.
    logits_NK = np.array([[9, 8, 7, 6, 5, 4]] * 4, dtype=np.float32)
    values = metrics.headline(logits_NK, np.array([0, 1, 4, 5]), temperature=1.0)
    assert values["top1"] == 0.25
    assert values["top5"] == 0.75
    assert values["top1_low"] < 0.25 < values["top1_high"]


def test_top5_of_three_classes_is_always_right(random: np.random.Generator) -> None:
    logits_NK = random.normal(size=(20, 3)).astype(np.float32)
    assert metrics.top_k_hits(logits_NK, random.integers(0, 3, 20), 5).all()


def test_top_k_agrees_with_scikit_learn(random: np.random.Generator) -> None:
    from sklearn.metrics import top_k_accuracy_score

    logits_NK, truth_N = random.normal(size=(200, 12)).astype(np.float32), random.integers(0, 12, 200)
    for k in (1, 3, 5):
        expected = top_k_accuracy_score(truth_N, logits_NK, k=k, labels=np.arange(12))
        assert metrics.top_k_hits(logits_NK, truth_N, k).mean() == pytest.approx(expected)


def test_a_tie_goes_to_the_smaller_index() -> None:
    assert metrics.top_k_hits(np.zeros((2, 4), dtype=np.float32), np.array([0, 1]), 1).tolist() == [True, False]


def test_loss_is_that_of_the_calibrated_scores(random: np.random.Generator) -> None:
    from sklearn.metrics import log_loss

    logits_NK, truth_N = random.normal(size=(50, 4)).astype(np.float32) * 3, random.integers(0, 4, 50)
    scores_NK = np.exp(logits_NK / 2.5) / np.exp(logits_NK / 2.5).sum(axis=1, keepdims=True)
    values = metrics.headline(logits_NK, truth_N, temperature=2.5)
    assert values["loss"] == pytest.approx(log_loss(truth_N, scores_NK, labels=np.arange(4)), rel=1e-5)


def test_no_image_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="no images"):
        metrics.headline(np.empty((0, 3), dtype=np.float32), np.empty(0, dtype=np.int64), temperature=1.0)


@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (711, 815, 0.8477, 0.8936)],
)
def test_wilson_interval_against_the_published_formula(hits: int, total: int, low: float, high: float) -> None:
    from scipy.stats import binomtest

    found = metrics.wilson_interval(hits, total)
    assert found == pytest.approx((low, high), abs=1e-4)
    assert found == pytest.approx(tuple(binomtest(hits, total).proportion_ci(method="wilson")), abs=1e-6)


def test_wilson_interval_of_nothing_says_nothing() -> None:
    assert metrics.wilson_interval(0, 0) == (0.0, 1.0)


def test_class_table_keeps_classes_without_images_as_nulls() -> None:
    table = metrics.class_table(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), ["a", "b", "c"])
    assert table["label"].tolist() == ["a", "b", "c"]
    assert table["support"].tolist() == [3, 1, 0]
    assert table["recall"].tolist()[:2] == pytest.approx([2 / 3, 1.0])
    assert table["precision"].tolist()[:2] == pytest.approx([1.0, 0.5])
    assert table.loc[2, ["precision", "recall", "f1"]].isna().all()


def test_confused_pairs_are_ordered_and_complete() -> None:
    truth_N, predicted_N = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 1, 0, 2])
    counts_KK = metrics.confusion_counts(truth_N, predicted_N, 3)
    pairs = metrics.confused_pairs(counts_KK, ["a", "b", "c"])
    assert pairs[["truth", "label", "images"]].values.tolist() == [["a", "b", 2], ["b", "a", 1]]
    assert pairs["fraction"].tolist() == pytest.approx([2 / 3, 0.5])
    assert pairs["images"].sum() + np.trace(counts_KK) == 6


def test_no_confusion_is_an_empty_table_with_its_columns() -> None:
    pairs = metrics.confused_pairs(np.diag([3, 2]), ["a", "b"])
    assert pairs.columns.tolist() == ["truth", "label", "images", "fraction"]
    assert pairs.empty


def test_accuracy_by_level_grows_from_exact_to_make() -> None:
    truth_N, predicted_N = np.array([0, 0, 0, 0]), np.array([0, 1, 2, 3])
    assert metrics.accuracy_by_level(truth_N, predicted_N, CARS) == {"make": 0.75, "make_model": 0.5, "exact": 0.25}


def test_a_level_that_a_name_does_not_tell_is_left_out() -> None:
    levels = metrics.accuracy_by_level(np.array([0, 1]), np.array([0, 0]), [*CARS[:1], "pickup truck"])
    assert levels == {"exact": 0.5}

from __future__ import annotations

import numpy as np
import pytest

from carray.evaluation import metrics


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
    table = metrics.class_table(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]]), ["a", "b", "c"])
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


def test_class_intervals_are_wilsons() -> None:
    table = metrics.class_table(np.array([[2, 1, 0], [0, 1, 0], [0, 0, 0]]), ["a", "b", "c"])
    assert table["predicted"].tolist() == [2, 2, 0]
    assert table.loc[0, ["recall_low", "recall_high"]].tolist() == pytest.approx(metrics.wilson_interval(2, 3))
    assert table.loc[1, ["precision_low", "precision_high"]].tolist() == pytest.approx(metrics.wilson_interval(1, 2))
    assert table.loc[2, ["recall_low", "recall_high", "precision_low", "precision_high"]].isna().all()


def test_macro_f1_is_scikit_learns(random: np.random.Generator) -> None:
    from sklearn.metrics import f1_score

    for classes in (2, 30):  # of thirty, some occur in one of the two only, and some in none
        truth_N, predicted_N = random.integers(0, classes, 40), random.integers(0, classes, 40)
        predicted_N[:20] = truth_N[:20]
        expected = f1_score(truth_N, predicted_N, average="macro", zero_division=0.0)
        assert metrics.macro_f1(truth_N, predicted_N) == pytest.approx(expected)


def test_bootstrap_interval_of_a_mean_is_that_of_its_standard_error(random: np.random.Generator) -> None:
    values_N = random.normal(3, 2, 400)
    low, high = metrics.bootstrap_interval(np.mean, values_N)
    error = values_N.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values_N.mean() - 1.96 * error, values_N.mean() + 1.96 * error), abs=0.03)
    assert metrics.bootstrap_interval(np.mean, values_N) == (low, high)
    four_times = metrics.bootstrap_interval(np.mean, np.tile(values_N, 4))
    assert (four_times[1] - four_times[0]) == pytest.approx((high - low) / 2, rel=0.1)


def test_bootstrap_keeps_the_images_of_two_samples_together(random: np.random.Generator) -> None:
    truth_N = random.integers(0, 20, 80)
    assert metrics.bootstrap_interval(metrics.macro_f1, truth_N, truth_N, highest=1.0) == (1.0, 1.0)


def test_intervals_stay_in_range_and_hold_the_figure(random: np.random.Generator) -> None:
    truth_N = random.integers(0, 196, 815)
    logits_NK = random.normal(size=(815, 196)).astype(np.float32)
    logits_NK[np.arange(815), truth_N] += 4
    values = metrics.headline(logits_NK, truth_N, temperature=1.0)
    for name in ("top1", "top5", "macro_f1", "loss"):
        assert 0 <= values[f"{name}_low"] < values[name] < values[f"{name}_high"]
    assert values["macro_f1_high"] <= 1


def test_one_image_tells_no_interval_of_loss_and_macro_f1() -> None:
    values = metrics.headline(np.array([[2.0, 1.0]], dtype=np.float32), np.array([0]), temperature=1.0)
    assert (values["macro_f1"], values["macro_f1_low"], values["loss_high"]) == (1.0, None, None)
    assert values["top1_low"] > 0

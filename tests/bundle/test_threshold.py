"""The threshold: hand-computed cases, scipy's own interval, and the promise itself, counted over many draws."""

from __future__ import annotations

import numpy as np
import pytest

from carray.bundle.threshold import acceptance_text, choose_threshold, exact_bounds, images_needed, top_scores


def sure_and_right(images: int, *, score: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    return np.full(images, score), np.ones(images, dtype=bool)


@pytest.mark.parametrize(("hits", "total"), [(0, 1), (1, 1), (0, 40), (40, 40), (37, 40), (1150, 1221)])
def test_exact_bounds_are_scipys(hits: int, total: int) -> None:
    from scipy.stats import binomtest

    low, high = exact_bounds(np.array([hits]), np.array([total]))
    for alternative, bound in (("greater", low), ("less", high)):
        expected = binomtest(hits, total, alternative=alternative).proportion_ci(0.95, method="exact")
        expected_bound = expected.low if alternative == "greater" else expected.high
        assert bound[0] == pytest.approx(expected_bound, abs=1e-9)


@pytest.mark.parametrize(("target", "wrong", "images"), [(0.95, 0, 59), (0.95, 1, 93), (0.9, 0, 29), (0.99, 0, 299)])
def test_images_needed_against_tables_of_the_binomial(target: float, wrong: int, images: int) -> None:
    assert images_needed(target, wrong=wrong) == images
    if wrong == 0:
        assert target**images <= 0.05 < target ** (images - 1)


def test_where_all_are_right_everything_is_accepted() -> None:
    threshold, found = choose_threshold(*sure_and_right(100), target_precision=0.95)
    assert threshold == 0.0
    assert (found.accepted, found.coverage, found.precision) == (100, 1.0, 1.0)
    assert found.precision_low == pytest.approx(0.05 ** (1 / 100))


def test_the_sequence_ends_at_the_first_test_that_fails() -> None:
    """200 right at 0.9, then 10 wrong at 0.7, then 2,000 right at 0.5, which would pass again, but are not asked."""
    score_N = np.repeat([0.9, 0.7, 0.5], [200, 10, 2000])
    right_N = np.repeat([True, False, True], [200, 10, 2000])
    threshold, found = choose_threshold(score_N, right_N, target_precision=0.95)
    assert threshold == 0.701
    assert (found.accepted, found.coverage) == (200, 200 / 2210)
    assert found.coverage_low < found.coverage < found.coverage_high
    assert found.precision_low >= 0.95
    assert "scores from 0.701 up are accepted: 9.0%" in acceptance_text(threshold, found)


def test_a_score_at_the_threshold_is_accepted_as_classification_does() -> None:
    score_N = np.repeat([0.75, 0.749], [100, 100])
    threshold, found = choose_threshold(score_N, score_N == 0.75, target_precision=0.9)
    assert threshold == 0.75
    assert found.accepted == int((score_N >= threshold).sum()) == 100


@pytest.mark.parametrize("images", [0, 1, 58])
def test_too_few_images_are_a_reason_that_says_how_many_it_takes(images: int) -> None:
    threshold, found = choose_threshold(*sure_and_right(images), target_precision=0.95)
    assert threshold is None
    assert found.coverage is None and found.precision_low is None
    assert f"{images} images are too few: even with every label right, 59 are needed" in found.reason
    assert "no threshold accepts labels with a precision of 0.95: " in acceptance_text(threshold, found)


def test_a_target_out_of_reach_is_a_reason_with_the_figures() -> None:
    score_N = np.linspace(0.99, 0.2, 400)
    threshold, found = choose_threshold(score_N, np.arange(400) % 2 == 0, target_precision=0.95)
    assert threshold is None
    assert found.reason.startswith("of the 9")
    assert "does not show 0.95 with 95% confidence" in found.reason


@pytest.mark.parametrize("target", [0.0, 1.0, 1.5, float("nan")])
def test_what_is_no_precision_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_precision is"):
        choose_threshold(*sure_and_right(100), target_precision=target)


def test_top_scores_are_those_of_the_columns() -> None:
    logits_NK = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32) * 4
    scores_NK = np.exp(logits_NK / 1.7) / np.exp(logits_NK / 1.7).sum(axis=1, keepdims=True)
    assert top_scores(logits_NK, temperature=1.7) == pytest.approx(scores_NK.max(axis=1), rel=1e-5)


@pytest.mark.parametrize("images", [150, 1000])
@pytest.mark.parametrize("overconfidence", [1.0, 1.4])
def test_the_promise_is_broken_in_at_most_five_percent_of_draws(images: int, overconfidence: float) -> None:
    """The true precision is known: labels are drawn right with a probability that the score states, or overstates."""
    random, target, draws = np.random.default_rng(11), 0.9, 500
    score_P = 1 / (1 + np.exp(-random.normal(1.5, 1.6, 200_000)))
    truth_P = score_P**overconfidence
    order = np.argsort(-score_P)
    precision_P = np.cumsum(truth_P[order]) / np.arange(1, len(order) + 1)
    ascending_P = -score_P[order]
    broken = chosen = 0
    for _ in range(draws):
        drawn = random.integers(0, len(score_P), images)
        right_N = random.random(images) < truth_P[drawn]
        threshold, _ = choose_threshold(score_P[drawn], right_N, target_precision=target)
        if threshold is not None:
            chosen += 1
            broken += precision_P[np.searchsorted(ascending_P, -threshold, side="right") - 1] < target
    # 5 % of 500 draws, and three standard deviations of chance.
    assert broken / draws <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5
    assert chosen > 0.2 * draws, "a promise that is never made is kept, too, and worth nothing"


def test_a_naive_choice_breaks_the_promise_so_the_count_above_can_fail() -> None:
    random, target, draws, broken = np.random.default_rng(11), 0.9, 200, 0
    score_P = 1 / (1 + np.exp(-random.normal(1.5, 1.6, 100_000)))
    order = np.argsort(-score_P)
    precision_P = np.cumsum(score_P[order]) / np.arange(1, len(order) + 1)
    for _ in range(draws):
        drawn = random.integers(0, len(score_P), 150)
        score_N, right_N = score_P[drawn], random.random(150) < score_P[drawn]
        best = np.argsort(-score_N)
        observed_N = np.cumsum(right_N[best]) / np.arange(1, 151)
        reached = np.flatnonzero(observed_N >= target)
        if len(reached):
            lowest = score_N[best][reached[-1]]
            broken += precision_P[np.searchsorted(-score_P[order], -lowest, side="right") - 1] < target
    assert broken / draws > 0.2

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from carray.bundle.bundle_folder import Acceptance
from carray.evaluation import metrics

SCORES = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
RIGHT = np.array([True, True, True, False, True, False])


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(2)


def test_the_calibration_error_of_two_bins_by_hand() -> None:
    # 4 images at 0.95 of which 3 are right, 2 at 0.55 of which 1 is: 4/6 * 0.20 + 2/6 * 0.05.
    assert metrics.calibration_error(SCORES, RIGHT) == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05)


def test_opposite_errors_in_one_bin_cancel_and_in_two_do_not() -> None:
    assert metrics.calibration_error(np.array([0.75, 0.75]), np.array([True, False])) == pytest.approx(0.25)
    apart = metrics.calibration_error(np.array([0.3, 0.7]), np.array([True, False]))
    assert apart == pytest.approx(0.7)


def test_the_reliability_table_counts_each_image_once_and_agrees_with_the_error(random: np.random.Generator) -> None:
    score_N = np.append(random.random(500), [0.0, 1.0, 1 / 15, 14 / 15])
    right_N = random.random(504) < score_N
    table = metrics.reliability(score_N, right_N)
    assert len(table) == 15 and table["images"].sum() == 504
    assert table["score_low"].iloc[0] == 0 and table["score_high"].iloc[-1] == 1
    gaps = (table["accuracy"] - table["mean_score"]).abs() * table["images"] / 504
    assert metrics.calibration_error(score_N, right_N) == pytest.approx(gaps.sum())
    assert ((table["mean_score"] > table["score_low"]) & (table["mean_score"] <= table["score_high"])).all()


def test_reliability_agrees_with_scikit_learn(random: np.random.Generator) -> None:
    from sklearn.calibration import calibration_curve

    score_N = random.random(800)
    right_N = random.random(800) < score_N**1.5
    accuracy, mean = calibration_curve(right_N, score_N, n_bins=15)
    table = metrics.reliability(score_N, right_N)
    assert table["accuracy"].tolist() == pytest.approx(accuracy.tolist())
    assert table["mean_score"].tolist() == pytest.approx(mean.tolist())


def test_a_bin_without_images_is_null() -> None:
    table = metrics.reliability(SCORES, RIGHT)
    assert (table["images"] > 0).sum() == 2
    assert table.loc[table["images"] == 0, ["mean_score", "accuracy", "low", "high"]].isna().all().all()


def test_chance_alone_makes_the_error_that_true_scores_show(random: np.random.Generator) -> None:
    score_N = random.random(400)
    drawn = [metrics.calibration_error(score_N, random.random(400) < score_N) for _ in range(100)]
    by_chance = metrics.chance_error(score_N)
    assert by_chance == pytest.approx(np.mean(drawn), rel=0.1)
    assert by_chance == metrics.chance_error(score_N)
    assert metrics.chance_error(np.tile(score_N, 25)) < by_chance / 3


def test_coverage_accepts_equal_scores_together() -> None:
    table = metrics.coverage_table(SCORES, RIGHT)
    assert table["threshold"].tolist() == [0.95, 0.55]
    assert table["images"].tolist() == [4, 6]
    assert table["coverage"].tolist() == pytest.approx([4 / 6, 1])
    assert table["accuracy"].tolist() == pytest.approx([3 / 4, 4 / 6])
    assert (table["low"] < table["accuracy"]).all() and (table["accuracy"] < table["high"]).all()


def test_the_area_under_risk_by_hand() -> None:
    # Wrong among the first n of four: 0, 1, 1, 2.
    right_N = np.array([True, False, True, False])
    found = metrics.area_under_risk(np.array([0.9, 0.8, 0.7, 0.6]), right_N)
    assert found == pytest.approx((0 / 1 + 1 / 2 + 1 / 3 + 2 / 4) / 4)
    assert metrics.area_under_risk(np.array([0.9]), np.array([False])) == 1


def test_scores_that_are_no_guide_leave_the_risk_where_it_is(random: np.random.Generator) -> None:
    right_N = random.random(4000) < 0.7
    assert metrics.area_under_risk(np.full(4000, 0.5), right_N) == pytest.approx((~right_N).mean())
    assert metrics.area_under_risk(right_N + 0.0, right_N) < 0.06
    shuffled = random.permutation(4000)
    score_N = random.random(4000).round(1)
    assert metrics.area_under_risk(score_N[shuffled], right_N[shuffled]) == pytest.approx(
        metrics.area_under_risk(score_N, right_N)
    )


def bundle(threshold: float | None, *, target: float | None = 0.9, reason: str = "") -> Any:
    promised = target and Acceptance(target_precision=target, confidence=0.95, split="val", images=9, reason=reason)
    return SimpleNamespace(accept_threshold=threshold, acceptance=promised)


@pytest.mark.parametrize(("right", "verdict"), [(100, "kept"), (90, "kept"), (88, "within chance"), (60, "broken")])
def test_a_promise_is_kept_missed_by_chance_or_broken(right: int, verdict: str) -> None:
    score_N = np.repeat([0.8, 0.79], [100, 50])
    right_N = np.arange(150) < right
    found = metrics.check_acceptance(bundle(0.8), score_N, right_N)
    assert (found["accepted"], found["precision"], found["verdict"]) == (100, right / 100, verdict)
    assert found["coverage_low"] < found["coverage"] == 100 / 150 < found["coverage_high"]
    assert found["promised"]["target_precision"] == 0.9


def test_a_threshold_that_accepts_nothing_is_untested() -> None:
    found = metrics.check_acceptance(bundle(0.99), SCORES, RIGHT)
    assert (found["accepted"], found["precision"], found["verdict"]) == (0, None, "untested")


def test_without_a_threshold_the_reason_is_told() -> None:
    found = metrics.check_acceptance(bundle(None, reason="too few images"), SCORES, RIGHT)
    assert (found["threshold"], found["reason"]) == (None, "too few images")
    found = metrics.check_acceptance(bundle(None, target=None), SCORES, RIGHT)
    assert found["reason"] == "no threshold was ever chosen for this bundle"


def test_a_threshold_set_by_hand_promises_nothing() -> None:
    found = metrics.check_acceptance(bundle(0.9, target=None), SCORES, RIGHT)
    assert (found["accepted"], found["verdict"], found["promised"]) == (4, None, None)

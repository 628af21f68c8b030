"""Rows of hand-made hits, and the hits of a real bundle on images whose outcome is known."""

from __future__ import annotations

import numpy as np
import pytest

from carray.evaluation.corruptions import ROBUSTNESS_SCHEMA, VARIANTS, robustness_rows
from carray.evaluation.metrics import paired_drop, wilson_interval

HITS_VN = np.array([[hit == "1" for hit in hits] for hits in ("1111110000", "0001111000", "1111110000")])
NAMES = [("none", ""), ("blur", "weak"), ("blur", "strong")]


def test_a_drop_is_counted_on_the_images_whose_outcome_changed() -> None:
    plain, blurred, same = robustness_rows(HITS_VN, NAMES)
    assert list(plain) and set(plain) == set(ROBUSTNESS_SCHEMA.names)
    assert (plain["corruption"], plain["top1"], plain["drop_points"]) == ("none", 0.6, 0.0)
    assert (blurred["top1"], blurred["lost"], blurred["gained"]) == (0.4, 3, 1)
    assert blurred["drop_points"] == pytest.approx(20.0)
    assert (blurred["top1_low"], blurred["top1_high"]) == wilson_interval(4, 10)
    assert blurred["drop_low_points"] < 20.0 < blurred["drop_high_points"]
    assert (same["lost"], same["gained"], same["drop_points"]) == (0, 0, 0.0)
    # Ten images without a change prove no equality.
    assert same["drop_low_points"] < 0 < same["drop_high_points"]


def test_a_paired_interval_is_walds_where_images_are_many_and_narrows_with_images() -> None:
    # With many images the half ones hardly matter, and Wald's interval is the same by hand.
    drop, low, high = paired_drop(132, 107, 1144)
    spread = 196 * np.sqrt(132 + 107 - 25**2 / 1144) / 1144
    assert drop == pytest.approx(100 * 25 / 1144)
    assert (low, high) == (pytest.approx(drop - spread, abs=0.02), pytest.approx(drop + spread, abs=0.02))
    _, low, high = paired_drop(1320, 1070, 11440)
    assert 0 < low < high < 4.0


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(400):
        changes = random.choice([0, 1, 2], p=[0.83, 0.12, 0.05], size=300)
        _, low, high = paired_drop(int((changes == 1).sum()), int((changes == 2).sum()), 300)
        held += low <= 7.0 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        robustness_rows(np.empty((3, 0), dtype=bool), NAMES)


def test_none_comes_first_and_the_control_second() -> None:
    assert [name for name, _ in VARIANTS[:2]] == ["none", "reencoded"]
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert {name for name, _ in VARIANTS} >= {"blur", "jpeg", "low_resolution", "crop", "grey", "rotation"}

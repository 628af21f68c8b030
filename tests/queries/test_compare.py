"""The formulas, against published or hand-made numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from carray.queries.compare import mcnemar_p, paired_change, psi_words, stability_index


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # P(X <= 2) + P(X >= 8) of ten fair coins: 2 (1 + 10 + 45) / 1024.
    assert mcnemar_p(2, 8) == pytest.approx(112 / 1024)
    assert mcnemar_p(8, 2) == mcnemar_p(2, 8)
    assert mcnemar_p(5, 5) == 1.0 == mcnemar_p(0, 0)


def test_stability_index_by_hand() -> None:
    assert stability_index([10, 20, 30], [10, 20, 30]) == 0.0
    shares_a, shares_b = np.array([700.5, 300.5]) / 1001, np.array([500.5, 500.5]) / 1001
    by_hand = sum((b - a) * math.log(b / a) for a, b in zip(shares_a, shares_b, strict=True))
    assert stability_index([700, 300], [500, 500]) == pytest.approx(by_hand)
    assert math.isfinite(stability_index([10, 0], [0, 10])) and stability_index([10, 0], [0, 10]) > 1
    assert [psi_words(value) for value in (0.09, 0.1, 0.25, 0.26)] == ["stable", *["some drift"] * 2, "much drift"]


def test_paired_change_is_signed_and_its_interval_shrinks_with_images() -> None:
    change, low, high = paired_change(30, 10, 1000)
    assert change == pytest.approx(0.02) and 0 < low < change < high
    # Bonett and Price by hand: (31 - 11) / 1002 +- z sqrt((42 / 1002 - (20 / 1002)^2) / 1002)
    spread = 1.959964 * math.sqrt((42 / 1002 - (20 / 1002) ** 2) / 1002)
    assert (low, high) == pytest.approx((20 / 1002 - spread, 20 / 1002 + spread))
    assert paired_change(10, 30, 1000)[0] == -change
    none = paired_change(0, 0, 5)
    assert none[0] == 0 and none[1] < 0 < none[2], "five images prove little"


def test_paired_interval_covers_what_it_promises() -> None:
    random, hits = np.random.default_rng(0), 0
    for gained, lost, _ in random.multinomial(400, [0.05, 0.02, 0.93], size=2000):
        _, low, high = paired_change(int(gained), int(lost), 400)
        hits += low <= 0.03 <= high
    assert 0.93 < hits / 2000 < 0.97

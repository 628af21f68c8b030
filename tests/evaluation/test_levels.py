from __future__ import annotations

import numpy as np
import pytest

from carray.evaluation.metrics import KINDS, LEVELS, accuracy_by_level, confusion_kinds, wilson_interval

CARS = [
    "Audi A5 Coupe 2012",  # 0
    "Audi A5 Coupe 2008",  # 1: another year
    "Audi A5 Sedan 2012",  # 2: another body
    "Audi S4 Coupe 2012",  # 3: another model
    "BMW A5 Coupe 2012",  # 4: another make
    "Ford F-150 Regular Cab 2007",  # 5
    "Ford F-150 Super Crew Cab 2007",  # 6: the model has one word more
    "Ram 1500 Crew Cab 2012",  # 7
    "Ram 1500 Quad Cab 2012",  # 8: another cab, all parts alike
    "Chevrolet HHR SS 2010",  # 9: tells no body
    "pickup truck",  # 10: tells nothing
]


def kind(truth: int, predicted: int) -> str:
    table = confusion_kinds(np.array([truth]), np.array([predicted]), CARS)
    return str(table.loc[table["images"] == 1, "kind"].item())


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        (0, 1, "year"),
        (0, 2, "body"),
        (1, 2, "body"),  # the year differs, too: the coarser difference names it
        (0, 3, "model"),
        (0, 4, "make"),
        (5, 6, "model"),
        (7, 8, "variant"),
        (9, 0, "make"),
        (0, 10, "unnamed"),
        (10, 0, "unnamed"),
    ],
)
def test_a_mistake_is_of_its_coarsest_kind(truth: int, predicted: int, expected: str) -> None:
    assert kind(truth, predicted) == expected


def test_kinds_exclude_each_other_and_add_up_to_all_mistakes() -> None:
    random = np.random.default_rng(3)
    truth_N, predicted_N = random.integers(0, len(CARS), 500), random.integers(0, len(CARS), 500)
    table = confusion_kinds(truth_N, predicted_N, CARS)
    assert table["kind"].tolist() == list(KINDS)
    assert table["images"].sum() == (truth_N != predicted_N).sum()
    assert table["fraction_of_mistakes"].sum() == pytest.approx(1)
    assert table["fraction"].sum() == pytest.approx((truth_N != predicted_N).mean())
    assert (table["images"] > 0).all()


def test_without_a_mistake_shares_of_mistakes_are_null() -> None:
    table = confusion_kinds(np.array([0, 1]), np.array([0, 1]), CARS)
    assert table["images"].sum() == 0 and table["fraction_of_mistakes"].isna().all()
    assert (table["fraction"] == 0).all()


def test_each_level_counts_the_images_that_can_tell_it() -> None:
    truth_N, predicted_N = np.array([0, 0, 0, 0, 9, 9, 10]), np.array([1, 2, 3, 4, 9, 0, 10])
    table = accuracy_by_level(truth_N, predicted_N, CARS).set_index("level")
    assert table.index.tolist() == list(LEVELS)
    assert table["images"].to_dict() == {"make": 6, "make_model": 6, "body": 4, "year": 6, "exact": 7}
    expected = {"make": 4 / 6, "make_model": 3 / 6, "body": 3 / 4, "year": 4 / 6, "exact": 2 / 7}
    assert table["accuracy"].to_dict() == pytest.approx(expected)
    assert table.loc["body", ["low", "high"]].tolist() == pytest.approx(wilson_interval(3, 4))


def test_a_prediction_that_does_not_tell_the_level_is_wrong_there() -> None:
    table = accuracy_by_level(np.array([0]), np.array([9]), CARS).set_index("level")
    assert (table.loc["body", "images"], table.loc["body", "accuracy"]) == (1, 0)


def test_a_level_that_no_name_tells_is_null_not_zero() -> None:
    table = accuracy_by_level(np.array([0, 1]), np.array([0, 0]), ["cat", "dog"]).set_index("level")
    assert table.loc["make", "images"] == 0
    assert table.loc[["make", "make_model", "body", "year"], ["accuracy", "low", "high"]].isna().all().all()
    assert table.loc["exact", "accuracy"] == 0.5

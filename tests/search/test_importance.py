"""Which varied value mattered: found where the trials can tell, and left open where they cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from carray.search.importance import importance


def table(count: int, value: Callable[[dict[str, Any]], float], *, family: str = "cnn") -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        hyper = {
            "family": family,
            "stages": 4,
            "width": [16, 32][number % 2],
            "learning_rate": float(10 ** rng.uniform(-4, -2)),
            "eval_size": [None, 96][int(rng.integers(2))],
            "flip": bool(rng.integers(2)),
        }
        rows.append({"family": family, "val_top1": value(hyper), "hyper": json.dumps(hyper)})
    return pd.DataFrame(rows)


def test_what_decides_the_result_comes_first_and_what_is_constant_has_no_row() -> None:
    found = importance(table(30, lambda hyper: 0.3 + 0.4 * (hyper["width"] == 32) + hyper["learning_rate"]))
    assert set(found["hyper"]) == {"width", "learning_rate", "eval_size", "flip"}
    assert found["hyper"].iloc[0] == "width"
    assert found["importance"].iloc[0] > 0.8
    assert math.isclose(found["importance"].sum(), 1)
    assert set(found["trials"]) == {30}


def test_a_learning_rate_is_seen_on_its_logarithm() -> None:
    found = importance(table(40, lambda hyper: 0.5 + 0.1 * math.log10(hyper["learning_rate"])))
    assert found["hyper"].iloc[0] == "learning_rate"


def test_too_few_trials_have_rows_without_numbers() -> None:
    found = importance(table(5, lambda hyper: 0.1 * hyper["width"]))
    assert len(found) == 4
    assert found["importance"].isna().all()
    # Seven would be enough for three values, but four varied.
    assert importance(table(7, lambda hyper: 0.1 * hyper["width"]))["importance"].isna().all()


def test_trials_that_came_out_alike_tell_nothing() -> None:
    assert importance(table(20, lambda hyper: 0.5))["importance"].isna().all()


def test_families_are_apart_and_trials_without_a_result_do_not_count() -> None:
    both = pd.concat([table(20, lambda hyper: 0.01 * hyper["width"]), table(20, lambda hyper: 0.5, family="transfer")])
    lost = pd.DataFrame([{"family": None, "val_top1": None, "hyper": "null"}])
    found = importance(pd.concat([both, lost, both.head(1).assign(val_top1=None)], ignore_index=True))
    assert list(found["family"].unique()) == ["cnn", "transfer"]
    assert set(found.loc[found["family"] == "cnn", "trials"]) == {20}
    assert found.loc[found["family"] == "transfer", "importance"].isna().all()


def test_no_trial_has_no_row() -> None:
    assert importance(table(0, lambda hyper: 0.0).reindex(columns=["family", "val_top1", "hyper"])).empty

"""Early stopping and budgets: decisions are those of Ray's own schedulers, and follow from the log alone."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.search.judge import BUDGETS, Judge, budget_reached, first_stop, replay, spent
from carray.search.space import SearchSettings, TuneSettings


def an_entry(number: int, epoch: int, val_top1: float | None, **others: Any) -> dict[str, Any]:
    return {
        **{"trial_id": f"t{number:05d}", "number": number, "family": "cnn", "epoch": epoch, "val_top1": val_top1},
        **{"train_loss": 1.0, "val_loss": 1.0, **others},
    }


def a_search(scheduler: str, **others: Any) -> SearchSettings:
    return SearchSettings(**{"trials": 15, "epochs": 9, "scheduler": scheduler, **others})


def judge_all(search: SearchSettings, entries: list[dict[str, Any]]) -> list[str]:
    """Decide about epochs one after another, each logged before the next."""
    judge, decisions = Judge(search), []
    for entry in entries:
        decisions.append(judge.decide(entry))
        judge.add(entry)
    return decisions


class RaysOwn:
    """Ray's own scheduler for each family, fed by hand."""

    def __init__(self, search: SearchSettings) -> None:
        self.search = search
        self.families: dict[str, FIFOScheduler] = defaultdict(self.scheduler)
        self.trials: dict[int, Any] = {}
        self.best: dict[int, float] = {}

    def scheduler(self) -> FIFOScheduler:
        search = self.search
        judged: Any = {"time_attr": "epoch", "metric": "best", "mode": "max", "grace_period": search.grace_epochs}
        if search.scheduler == "asha":
            return AsyncHyperBandScheduler(
                max_t=search.epochs, reduction_factor=search.reduction_factor, brackets=1, **judged
            )
        # With an infinite slice it pauses no trial while there are too few to take a median of.
        return MedianStoppingRule(hard_stop=True, min_time_slice=cast("int", math.inf), **judged)

    def goes_on(self, entry: dict[str, Any]) -> bool:
        number, family = entry["number"], self.families[entry["family"]]
        if number not in self.trials:
            self.trials[number] = _Trial(f"{number}")
            family.on_trial_add(cast("Any", None), self.trials[number])
        self.best[number] = max(self.best.get(number, -1.0), entry["val_top1"])
        result = {"epoch": entry["epoch"], "best": self.best[number]}
        return family.on_trial_result(cast("Any", None), self.trials[number], result) == TrialScheduler.CONTINUE


class _Trial:
    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(["asha", "median"]))
@hypothesis_settings(max_examples=200, deadline=None)
def test_decisions_are_those_of_rays_own_schedulers(seed: int, kind: str) -> None:
    """Random searches: curves with ties and drops, two families, trials side by side at different speeds."""
    random = np.random.default_rng(seed)
    epochs = int(random.integers(1, 30))
    search = a_search(
        kind,
        epochs=epochs,
        grace_epochs=int(random.integers(1, min(epochs, 4) + 1)),
        reduction_factor=float(random.choice([1.3, 2, 2.5, 3, 4])),
    )
    judge, rays, log = Judge(search), RaysOwn(search), []
    waiting, running = list(range(24)), dict[int, int]()
    while waiting or running:
        while waiting and len(running) < 5:
            running[waiting.pop(0)] = 0
        number = int(random.choice(list(running)))
        running[number] += 1
        score = round(float(random.uniform(0, 1)), int(random.integers(1, 4)))
        entry = an_entry(number, running[number], score, family="cnn" if number % 3 else "transfer")
        decision, goes_on = judge.decide(entry), rays.goes_on(entry)
        judge.add(entry)
        log.append({**entry, "decision": decision})
        assert (decision == "continue") == (goes_on and running[number] < epochs), entry
        if decision != "continue":
            del running[number]
    assert replay(search, log) == []


def test_asha_stops_the_lower_part_of_a_rung() -> None:
    """At the rung of epoch 1, of which one in three goes on: the threshold is that of those who came before."""
    entries = [an_entry(i, 1, score) for i, score in enumerate([0.5, 0.6, 0.7, 0.55, 0.8, 0.1])]
    decisions = judge_all(a_search("asha", reduction_factor=3), entries)
    assert [i for i, decision in enumerate(decisions) if decision == "stop"] == [3, 5]


def test_the_median_rule_stops_who_is_below_the_median() -> None:
    entries = [an_entry(i, 1, score) for i, score in enumerate([0.1, 0.4, 0.5, 0.6, 0.3, 0.45])]
    assert judge_all(a_search("median"), entries) == [*["continue"] * 4, "stop", "continue"]


def test_families_are_judged_among_themselves() -> None:
    strong = [an_entry(number, 1, 0.8 + number / 100, family="transfer") for number in range(6)]
    weak = [an_entry(6, 1, 0.1, family="cnn"), an_entry(7, 1, 0.1, family="transfer")]
    assert judge_all(a_search("asha"), [*strong, *weak])[-2:] == ["continue", "stop"]


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_no_trial_is_stopped_before_the_grace_epochs(kind: str) -> None:
    entries = [an_entry(i, epoch, (9 - i) / 10) for epoch in (1, 2, 3) for i in range(8)]
    decisions = judge_all(a_search(kind, grace_epochs=3), entries)
    assert next(i for i, decision in enumerate(decisions) if decision == "stop") >= 16
    assert first_stop(a_search(kind, grace_epochs=3)) == 3 and first_stop(a_search("none", grace_epochs=3)) == 9


def test_one_bad_epoch_after_a_good_one_stops_nobody() -> None:
    others = [an_entry(number, epoch, 0.5) for number in range(4) for epoch in (1, 2, 3)]
    own = [an_entry(4, epoch, score) for epoch, score in ((1, 0.3), (2, 0.9), (3, 0.0))]
    assert judge_all(a_search("asha", grace_epochs=3), [*others, *own])[-3:] == ["continue"] * 3


@pytest.mark.parametrize("kind", ["asha", "median", "none"])
def test_a_non_finite_epoch_ends_its_trial_and_is_compared_with_nothing(kind: str) -> None:
    judge = Judge(a_search(kind))
    diverged = an_entry(0, 1, 0.99, val_loss=None)
    assert judge.decide(diverged) == "non_finite"
    judge.add(diverged)
    assert [judge.decide(an_entry(number, 1, 0.1)) for number in (1, 2)] == ["continue"] * 2
    assert Judge(a_search(kind)).decide(an_entry(0, 1, 0.0, train_loss=math.inf)) == "non_finite"


@pytest.mark.parametrize("kind", ["asha", "median", "none"])
def test_the_last_epoch_finishes_a_trial(kind: str) -> None:
    entries = [an_entry(0, epoch, 0.5) for epoch in (1, 2)]
    assert judge_all(a_search(kind, epochs=2), entries) == ["continue", "finish"]


def test_a_training_without_validation_images_is_judged_by_its_training_loss() -> None:
    entries = [an_entry(0, epoch, None, val_loss=None, train_loss=loss) for epoch, loss in ((1, 0.5), (2, None))]
    assert judge_all(a_search("none", epochs=2), entries) == ["continue", "non_finite"]


def test_what_a_log_has_otherwise_is_named() -> None:
    search = a_search("asha")
    log = [an_entry(i, 1, score) for i, score in enumerate([0.5, 0.6, 0.1])]
    log = [{**entry, "decision": decision} for entry, decision in zip(log, judge_all(search, log), strict=True)]
    assert replay(search, log) == []
    assert replay(search, [*log[:2], {**log[2], "decision": "continue"}]) == [
        "t00002, epoch 1: the log says continue, its epochs lead to stop"
    ]
    assert replay(search, [*log, {**log[0]}]) == ["t00000, epoch 1 follows epoch 1"]


def test_a_scheduler_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(SettingsError, match="search.scheduler is 'pbt': input should be 'asha', 'median' or 'none'"):
        parse_settings(TuneSettings, {"search": {"scheduler": "pbt"}})


@pytest.mark.parametrize(
    ("limits", "clock", "device", "sentence"),
    [
        ({}, 1e9, 1e9, None),
        ({"time_budget_minutes": 10}, 599, 1e9, None),
        ({"time_budget_minutes": 10}, 601, 0, "search.time_budget_minutes of 10 is used up (10.02 spent)"),
        ({"money_budget": 5, "price_per_device_hour": 2, "device_hours_budget": 3}, 0, 8999, None),
        (
            {"money_budget": 5, "price_per_device_hour": 2, "device_hours_budget": 3},
            *(0, 9000, "search.money_budget of 5 is used up (5 spent)"),
        ),
        (
            {"money_budget": 50, "price_per_device_hour": 2, "device_hours_budget": 3},
            *(0, 10_800, "search.device_hours_budget of 3 is used up (3 spent)"),
        ),
    ],
)
def test_the_first_budget_that_is_reached_is_named(
    limits: dict[str, float], clock: float, device: float, sentence: str | None
) -> None:
    search = SearchSettings(**limits)
    assert budget_reached(search, spent(search, clock_seconds=clock, device_seconds=device)) == sentence
    assert set(BUDGETS) == {name for name in SearchSettings.model_fields if "budget" in name}


def test_money_is_not_counted_without_a_price() -> None:
    assert "money" not in spent(SearchSettings(), clock_seconds=1, device_seconds=3600)

"""What a run's tables say: the table for a terminal, rungs as Ray counts them, the Pareto front, what mattered."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from written_runs import MARKUP, write_probes, write_run

from carray.core.store.files import read_json
from carray.search import run_folder
from carray.search.leaderboard import (
    configurations,
    importance,
    leaderboard_text,
    pareto_front,
    probe_outcomes,
    rank_correlation,
    rung_epochs,
    rung_table,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("runs") / "run", trials=12)


def test_every_trial_stands_in_a_line_with_its_place_and_what_tells_it_apart(run: str) -> None:
    trials = run_folder.read_trials(run)
    lines = leaderboard_text(trials).splitlines()
    numbered = [line.split() for line in lines if line.strip()[:1].isdigit() and " t0" in line]
    assert [words[:2] for words in numbered] == [[str(i), trial] for i, trial in enumerate(trials["trial_id"], start=1)]
    assert f"{trials['val_top1'].iloc[0]:.1%}" in numbered[0]
    assert any("train=" in word for word in numbered[0]) or "cnn" in numbered[0]
    assert not any("momentum" in line for line in lines)  # the same in all


def test_reasons_of_failed_and_dropped_trials_and_notes_are_told(run: str) -> None:
    text = leaderboard_text(run_folder.read_trials(run))
    assert MARKUP in text
    assert "rung 0: over 20.0% below the best candidate" in text
    assert "note: out of memory: micro-batch halved to 16" in text
    assert "1 not started: the search ended before this trial did: search.time_budget_minutes of 60" in text
    assert "nan" not in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_is_not_overrun(run: str, width: int) -> None:
    lines = leaderboard_text(run_folder.read_trials(run), width=width).splitlines()
    assert max(len(line) for line in lines[1:]) <= max(width, 66)
    assert sum(line.count("t000") for line in lines) == 12


def test_measured_speeds_have_a_column_of_their_own(run: str) -> None:
    trials = run_folder.read_trials(run)
    best = trials["trial_id"].iloc[0]
    lines = leaderboard_text(trials, speeds={best: 123.4}).splitlines()
    assert "images/s" in lines[0] and " 123 " in lines[1] and " 123 " not in lines[2]
    assert "images/s" not in leaderboard_text(trials)


def test_control_codes_are_shown_and_not_obeyed(run: str) -> None:
    trials = run_folder.read_trials(run).assign(reason="one\ntwo\x1b[31m")
    text = leaderboard_text(trials)
    assert "\x1b" not in text
    assert "one\\ntwo\\x1b[31m" in text


def test_a_trial_that_was_never_proposed_has_an_empty_configuration(run: str) -> None:
    trials = run_folder.read_trials(run)
    trials.loc[trials.index[-1], ["family", "hyper"]] = [None, "null"]
    assert configurations(trials)[trials["trial_id"].iloc[-1]] == {}
    assert trials["trial_id"].iloc[-1] in leaderboard_text(trials)


def test_a_single_trial_says_what_it_starts_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=1, epochs=2, families={"cnn": {"default": {"input_size": 64}}})
    assert leaderboard_text(run_folder.read_trials(run)).splitlines()[1].endswith("finished    cnn input_size=64")


def asha(epochs: int, grace: int, factor: float) -> dict[str, Any]:
    return {"scheduler": "asha", "epochs": epochs, "grace_epochs": grace, "reduction_factor": factor}


@pytest.mark.parametrize(
    ("epochs", "grace", "factor"),
    [(9, 1, 3), (9, 2, 3), (10, 1, 3), (6, 1, 1.5), (27, 1, 3), (1, 1, 3), (40, 3, 4), (16, 1, 2)],
)
def test_rungs_are_those_of_rays_asha(epochs: int, grace: int, factor: float) -> None:
    from ray.tune.schedulers import AsyncHyperBandScheduler

    scheduler = AsyncHyperBandScheduler(max_t=epochs, grace_period=grace, reduction_factor=factor)
    milestones = {math.ceil(milestone) for milestone, _ in scheduler._brackets[0]._rungs}
    # At the last epoch a trial has ended anyway.
    assert rung_epochs(asha(epochs, grace, factor)) == sorted(milestones - {epochs})


def test_other_schedulers_have_no_rungs() -> None:
    assert rung_epochs({**asha(9, 1, 3), "scheduler": "median"}) == []


def test_who_reached_a_rung_went_on_or_was_stopped_there() -> None:
    told = [  # trial, epoch, top-1, decision
        (0, 1, 0.5, "continue"),
        (0, 2, 0.4, "continue"),
        (0, 3, 0.45, "stop"),
        (1, 1, 0.2, "stop"),
        (2, 1, 0.6, "continue"),
        (2, 2, 0.0, "non_finite"),
        (3, 1, 0.3, "continue"),
        (3, 2, 0.7, "continue"),
        (3, 3, 0.6, "continue"),
    ]
    epochs = pd.DataFrame(told, columns=["number", "epoch", "val_top1", "decision"]).assign(family="cnn")
    rows = rung_table(epochs, asha(9, 1, 3)).to_dict("records")
    assert [(row["epoch"], row["reached"], row["stopped"], row["best"], row["lowest_on"]) for row in rows] == [
        (1, 4, 1, 0.6, 0.3),
        (3, 2, 1, 0.7, 0.7),  # judged by the best so far, not by the third epoch
    ]
    # Without rungs, only where somebody was stopped.
    other = rung_table(epochs[epochs["number"] < 2], {**asha(9, 1, 3), "scheduler": "median"})
    assert list(other["epoch"]) == [1, 3]
    assert rung_table(epochs.head(0), asha(9, 1, 3)).empty


def test_front_keeps_who_is_beaten_by_nobody_and_equals_together() -> None:
    assert pareto_front([10, 20, 30, 20, 5], [0.9, 0.8, 0.5, 0.8, 0.9]) == [True, True, True, True, False]


def test_candidates_stand_beside_what_their_trials_came_to(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=20)
    write_probes(run)
    trials = run_folder.read_trials(run)
    outcomes = probe_outcomes(read_json(f"{run}/probes.json"), trials)
    assert list(outcomes["val_top1"]) == [0.61, 0.55, 0.42, 0.31]
    transfer = trials[(trials["family"] == "transfer") & (trials["epochs"] > 0)]
    assert outcomes["trials"].sum() == len(transfer)
    assert outcomes["best"].max() == transfer["val_top1"].max()
    assert outcomes["dropped"].sum() == 1


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ([0.5, 0.6, 0.7, None], 1.0),
        ([0.7, 0.6, 0.5, None], -1.0),
        ([0.5, 0.6, None, None], None),
        ([0.5, 0.5, 0.5, None], None),
    ],
)
def test_rank_correlation_compares_candidates_with_a_result(best: list[float | None], expected: float | None) -> None:
    outcomes = pd.DataFrame({"val_top1": [0.1, 0.2, 0.3, 0.4], "best": best})
    assert rank_correlation(outcomes) == (None if expected is None else pytest.approx(expected))


def trials_of(count: int, value: Callable[[dict[str, Any]], float], *, family: str = "cnn") -> pd.DataFrame:
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
    found = importance(trials_of(30, lambda hyper: 0.3 + 0.4 * (hyper["width"] == 32) + hyper["learning_rate"]))
    assert set(found["hyper"]) == {"width", "learning_rate", "eval_size", "flip"}
    assert found["hyper"].iloc[0] == "width"
    assert found["importance"].iloc[0] > 0.8
    assert math.isclose(found["importance"].sum(), 1)
    assert set(found["trials"]) == {30}


def test_a_learning_rate_is_seen_on_its_logarithm() -> None:
    found = importance(trials_of(40, lambda hyper: 0.5 + 0.1 * math.log10(hyper["learning_rate"])))
    assert found["hyper"].iloc[0] == "learning_rate"


def test_too_few_trials_have_rows_without_numbers() -> None:
    found = importance(trials_of(5, lambda hyper: 0.1 * hyper["width"]))
    assert len(found) == 4
    assert found["importance"].isna().all()
    # Seven would be enough for three values, but four varied.
    assert importance(trials_of(7, lambda hyper: 0.1 * hyper["width"]))["importance"].isna().all()


def test_trials_that_came_out_alike_tell_nothing() -> None:
    assert importance(trials_of(20, lambda hyper: 0.5))["importance"].isna().all()


def test_families_are_apart_and_trials_without_a_result_do_not_count() -> None:
    both = pd.concat(
        [trials_of(20, lambda hyper: 0.01 * hyper["width"]), trials_of(20, lambda hyper: 0.5, family="transfer")]
    )
    lost = pd.DataFrame([{"family": None, "val_top1": None, "hyper": "null"}])
    found = importance(pd.concat([both, lost, both.head(1).assign(val_top1=None)], ignore_index=True))
    assert list(found["family"].unique()) == ["cnn", "transfer"]
    assert set(found.loc[found["family"] == "cnn", "trials"]) == {20}
    assert found.loc[found["family"] == "transfer", "importance"].isna().all()


def test_no_trial_has_no_row() -> None:
    assert importance(trials_of(0, lambda hyper: 0.0).reindex(columns=["family", "val_top1", "hyper"])).empty

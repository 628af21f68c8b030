"""What a search's tables say: rungs as Ray counts them, intervals, the Pareto front, what rung 0 foretold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from written_runs import write_probes, write_run

from carray.core.store.files import read_json
from carray.search import run_folder
from carray.search.ranking import interval, pareto_front, probe_outcomes, rung_epochs, rung_table


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


def test_interval_is_wilsons() -> None:
    # Newcombe, 'Two-sided confidence intervals for the single proportion', 1998, table I: 81 of 263.
    low, high = interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert interval(0.0, 10)[0] == 0.0


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

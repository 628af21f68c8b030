"""The drill of the search: it names every difference between two logs, and draws every kind of kill."""

from __future__ import annotations

import random
from typing import Any

import pytest

from jobs.drills.search_log import Reference, changed, differences, disagreements, other_winner
from jobs.drills.tune import KINDS, kills_of


def log_of(*pairs: tuple[int, int], **values: Any) -> list[dict[str, Any]]:
    figures = {
        "family": "cnn",
        "train_loss": 1.5,
        "val_loss": 1.6,
        "val_top1": 0.3,
        "val_top5": 0.7,
        "learning_rate": 0.1,
    }
    return [
        {"sequence": i + 1, "number": number, "epoch": epoch, "decision": "continue", **figures, **values}
        for i, (number, epoch) in enumerate(pairs)
    ]


def test_a_log_is_the_same_as_itself_whatever_the_seconds() -> None:
    drilled = [{**entry, "sequence": 3 * entry["sequence"], "seconds": 7.0} for entry in log_of((0, 1), (0, 2))]
    assert differences(log_of((0, 1), (0, 2)), drilled) == []


@pytest.mark.parametrize(
    ("drilled", "complaint"),
    [
        (log_of((0, 1)), "epochs missing: .(0, 2)"),
        (log_of((0, 1), (0, 2), (1, 1)), "too many: .(1, 1)"),
        (log_of((0, 1), (0, 2), (0, 2)), "trial 0 logged epoch 2 twice"),
        (log_of((0, 2), (0, 1)), "another order: entry 1 is of (trial, epoch) (0, 2), not (0, 1)"),
        (log_of((0, 1), (0, 2), val_top1=0.4), "trial 0 epoch 1: val_top1 is 0.4, not 0.3"),
        (log_of((0, 1), (0, 2), decision="stop"), "trial 0 epoch 2: decision is stop, not continue"),
        (log_of((0, 1), (0, 2), sequence=1), "sequence numbers do not grow"),
    ],
)
def test_every_difference_is_named(drilled: list[dict[str, Any]], complaint: str) -> None:
    found = differences(log_of((0, 1), (0, 2)), drilled)
    assert any(complaint.replace(".(", "[(") in line for line in found), found


UNPRUNED = log_of((0, 1), (0, 2), (1, 1), (1, 2))
REFERENCE = Reference(UNPRUNED[:3], UNPRUNED, {"trials": 2, "best_val_top1": 0.3})


def test_another_order_of_the_same_figures_is_lawful() -> None:
    drilled = log_of((1, 1), (0, 1), (0, 2))
    drilled[0]["decision"], drilled[2]["decision"] = "stop", "finish"
    assert disagreements(REFERENCE, drilled, REFERENCE.done) == []


@pytest.mark.parametrize(
    ("drilled", "done", "complaint"),
    [
        (log_of((0, 1), (1, 1), val_loss=1.7), {}, "trial 0 epoch 1: val_loss is 1.7, not 1.6"),
        (log_of((0, 1), (1, 3)), {}, "trial 1 has no epoch 3"),
        (log_of((0, 1), (1, 1), (1, 1)), {}, "trial 1 logged epoch 1 twice"),
        (log_of((0, 1), (1, 1)), {}, "trial 1 is without an end"),
        (log_of((0, 1), decision="stop"), {}, "1 trials are logged"),
        (log_of((0, 1), (1, 1)), {"best_val_top1": 0.4}, "best_val_top1 is 0.4, and the log's best 0.3"),
    ],
)
def test_what_no_order_explains_is_named(drilled: list[dict[str, Any]], done: dict[str, Any], complaint: str) -> None:
    found = disagreements(REFERENCE, drilled, {**REFERENCE.done, **done})
    assert any(complaint in line for line in found), found


def test_an_entry_that_was_written_anew_is_noticed() -> None:
    before = log_of((0, 1), (0, 2))
    assert changed(before, log_of((0, 1), (0, 2), (1, 1))) == []
    assert len(changed(before, log_of((0, 1)))) == 1
    assert len(changed(before, [{**entry, "logged_at": "later"} for entry in before])) == 2


def test_another_winner_is_noticed() -> None:
    done = {
        "best_trial": "t00001",
        "best_val_top1": 0.5,
        "trials": 3,
        "by_status": {"finished": 3},
        "spent": {"minutes": 1},
    }
    assert other_winner(done, {**done, "spent": 2}) == []
    assert other_winner(done, {**done, "best_trial": "t00002"}) == ["best_trial is t00002, not t00001"]


def test_every_kind_of_kill_has_its_turn() -> None:
    drawn = [kills_of(i, random.Random(i)) for i in range(30)]
    assert [kinds[0] for kinds in drawn] == [KINDS[i % 3] for i in range(30)]
    assert {len(kinds) for kinds in drawn} == {1, 2, 3}

"""The run folder: the log, how trials ended, the tables derived from both, and folders of other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from carray.core.errors import BudgetError, SettingsError
from carray.core.store.files import list_files, read_json, write_json
from carray.search import run_folder
from carray.search.run_log import SearchLog
from carray.search.space import SearchSettings, TuneSettings
from carray.search.train.hyperparameters import CnnHyper


def an_entry(number: int, epoch: int, val_top1: float | None, **others: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("train_loss", "val_loss", "val_top5"), 1.0 if val_top1 is not None else None)
    return {
        **{"number": number, "family": "cnn", "epoch": epoch, "val_top1": val_top1, **figures},
        **{"learning_rate": 0.1, "seconds": 36.0, "images_per_second": 10.0 * epoch, "note": None, **others},
    }


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Give a run of three trials, as `open_run` would write it."""
    hyper = CnnHyper().model_dump(mode="json")
    search = {
        "version": run_folder.VERSION,
        "manifest": "m.parquet",
        "manifest_fingerprint": "f",
        "settings": TuneSettings().model_dump(mode="json"),
        "configurations": [hyper, hyper, None],
    }
    write_json(str(tmp_path / run_folder.SEARCH), search)
    return str(tmp_path)


def a_log(run: str, *, epochs: int = 3) -> SearchLog:
    return SearchLog(run, SearchSettings(trials=3, epochs=epochs), devices=2.0)


def test_an_epoch_is_logged_once_and_sequence_numbers_grow_over_starts(run: str) -> None:
    first = a_log(run)
    first.add(an_entry(0, 1, 0.5))
    first.add(an_entry(1, 1, 0.4))
    second = a_log(run)
    assert second.add(an_entry(0, 1, 0.9)) == "continue"
    assert second.add(an_entry(1, 1, 0.9)) == "stop"
    assert not second.is_logged(an_entry(0, 2, 0.9))
    second.add(an_entry(0, 2, 0.6))
    assert [(e["sequence"], e["number"], e["epoch"]) for e in run_folder.read_log(run)] == [
        (1, 0, 1),
        (2, 1, 1),
        (3, 0, 2),
    ]


def test_running_trials_come_first_in_the_order_they_began(run: str) -> None:
    log = a_log(run)
    assert log.missing == [0, 1, 2]
    log.add(an_entry(2, 1, 0.5))
    log.add(an_entry(1, 1, 0.5))
    assert log.missing == a_log(run).missing == [2, 1, 0]
    assert a_log(run).running == [2, 1]


def test_a_decision_whose_trial_was_not_yet_ended_is_mended(run: str) -> None:
    """The driver was killed between the log entry and trial.json; the trial's checkpoint is of no use any more."""
    log = a_log(run)
    log.add(an_entry(0, 1, 0.5))
    log.add(an_entry(0, 3, 0.5))
    log.add(an_entry(1, 1, 0.4))
    for number in (0, 1):
        Path(run_folder.trial_folder(run, number), "trial.json").unlink()
        Path(run_folder.last_checkpoint(run, number)).write_bytes(b"checkpoint")
    assert a_log(run).missing == [2]
    assert {n: end["status"] for n, end in run_folder.read_trial_ends(run, 3).items()} == {0: "finished", 1: "stopped"}
    assert "stopped by ASHA after epoch 1 with 40.0%" in run_folder.read_trial_ends(run, 3)[1]["reason"]
    assert not Path(run_folder.last_checkpoint(run, 0)).exists()


def test_what_a_killed_writer_left_is_passed_over(run: str) -> None:
    a_log(run).add(an_entry(0, 1, 0.5))
    Path(run, "log", ".writing-abc").write_bytes(b"")
    Path(run, "log", "notes.json").write_text("{")
    assert len(run_folder.read_log(run)) == 1


def test_tables_are_derived_from_the_log(run: str) -> None:
    log = a_log(run, epochs=4)
    log.add(an_entry(0, 1, 0.5, note="out of memory: micro-batch halved to 16"))
    log.add(an_entry(1, 1, 0.9))
    log.add(an_entry(1, 2, None))
    log.add(an_entry(0, 2, 0.4))
    log.remark(0, "its process was lost")
    log.add(an_entry(0, 3, 0.6))
    trials = (
        run_folder.write_tables(run, ended_by="search.money_budget of 5 is used up").set_index("number").sort_index()
    )
    assert list(trials["status"]) == ["out_of_time", "non_finite", "not_started"]
    assert trials.loc[0, "val_top1"] == 0.6
    assert trials.loc[0, "best_epoch"] == 3
    assert trials.loc[0, "note"] == "out of memory: micro-batch halved to 16; its process was lost"
    assert trials.loc[0, "devices"] == 2.0
    assert trials.loc[0, "device_hours"] == pytest.approx(3 * 36 * 2 / 3600)
    assert trials.loc[0, "reason"].endswith("search.money_budget of 5 is used up")
    assert (trials.loc[1, "val_top1"], trials.loc[1, "best_epoch"], trials.loc[1, "epochs"]) == (0.9, 1, 2)
    assert trials.loc[1, "reason"] == "the loss was not finite in epoch 2"
    assert pd.isna(trials.loc[2, "family"])
    assert json.loads(trials.loc[2, "hyper"]) is None
    epochs = pd.read_parquet(Path(run, run_folder.EPOCHS))
    assert list(epochs["sequence"]) == [1, 2, 3, 4, 5]
    assert list(epochs.columns) == run_folder.EPOCHS_SCHEMA.names


def test_a_search_that_runs_is_read_from_its_log(run: str) -> None:
    log = a_log(run)
    log.add(an_entry(0, 1, 0.5))
    log.add(an_entry(1, 3, 0.6))
    trials = run_folder.read_trials(run)
    assert list(trials["trial_id"]) == ["t00001", "t00000", "t00002"]
    assert list(trials["status"]) == ["finished", "unfinished", "not_started"]
    assert "the search has not ended" in trials["reason"][1]
    pd.testing.assert_frame_equal(
        run_folder.write_tables(run).drop(columns=["status", "reason"]), trials.drop(columns=["status", "reason"])
    )
    assert list(run_folder.read_trials(run)["status"]) == ["finished", "out_of_time", "not_started"]
    run_folder.delete_tables(run)  # as a search does that goes on
    log.add(an_entry(0, 2, 0.7))
    assert run_folder.read_trials(run)["val_top1"][0] == 0.7
    assert list(run_folder.read_epochs(run)["sequence"]) == [1, 2, 3]


def test_a_log_that_another_process_has_taken_over_is_left_alone(run: str) -> None:
    def taken() -> None:
        raise BudgetError("taken over")

    log = SearchLog(run, SearchSettings(trials=3, epochs=3), check=taken)
    with pytest.raises(BudgetError):
        log.add(an_entry(0, 1, 0.5))
    assert run_folder.read_log(run) == []


class Clock:
    """A clock that the test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_minutes_are_summed_over_starts_and_not_counted_between_them(run: str) -> None:
    search, clock = SearchSettings(trials=3, epochs=3, time_budget_minutes=10), Clock()
    first = SearchLog(run, search, clock=clock)
    clock.now += 240
    first.add(an_entry(0, 1, 0.5))
    assert (first.spent()["minutes"], first.budget_reached()) == (4, None)
    clock.now += 86_400  # killed, and started again the next day
    second = SearchLog(run, search, clock=clock)
    clock.now += 359
    assert second.budget_reached() is None
    clock.now += 2
    assert second.budget_reached() == "search.time_budget_minutes of 10 is used up (10.02 spent)"


def test_minutes_without_a_log_entry_are_read_from_the_outcome(run: str) -> None:
    """The epochs that the end of the budget cut off have no entry."""
    a_log(run).add(an_entry(0, 1, 0.5))
    write_json(f"{run}/{run_folder.DONE}", {"spent": {"minutes": 10.0}})
    assert SearchLog(run, SearchSettings(trials=3, epochs=3), clock=Clock()).spent()["minutes"] == 10


def test_device_hours_and_money_add_up_over_starts(run: str) -> None:
    search = SearchSettings(trials=3, epochs=3, device_hours_budget=0.05, money_budget=5, price_per_device_hour=2)
    SearchLog(run, search, devices=4.0).add(an_entry(0, 1, 0.5, seconds=36.0))
    again = SearchLog(run, search, devices=0.5)
    assert again.spent()["device_hours"] == pytest.approx(0.04)
    assert again.spent()["money"] == pytest.approx(0.08)
    assert again.budget_reached() is None
    again.add(an_entry(0, 2, 0.5, seconds=72.0))
    assert again.budget_reached() == "search.device_hours_budget of 0.05 is used up (0.05 spent)"


def test_a_proposed_configuration_is_stored(run: str) -> None:
    hyper = CnnHyper(width=12).model_dump(mode="json")
    run_folder.store_configuration(run, 2, hyper)
    assert run_folder.read_search(run)["configurations"][2] == hyper
    assert run_folder.read_search(run)["manifest_fingerprint"] == "f"


@pytest.mark.parametrize(("version", "age"), [(1, "an older"), (run_folder.VERSION + 1, "a newer"), (None, "an older")])
def test_a_run_of_another_version_is_a_sentence(run: str, version: int | None, age: str) -> None:
    write_json(f"{run}/{run_folder.SEARCH}", {**read_json(f"{run}/{run_folder.SEARCH}"), "version": version})
    with pytest.raises(SettingsError, match=f"was written by {age} carray"):
        run_folder.read_search(run)


def test_a_log_on_a_bucket(s3: str) -> None:
    for sequence in range(1, 41):
        decided = {"sequence": sequence, "decision": "continue", "clock_seconds": 1.0, "devices": 1.0}
        run_folder.write_log_entry(f"{s3}/run", an_entry(0, sequence, 0.5, **decided))
    assert [entry["sequence"] for entry in run_folder.read_log(f"{s3}/run")] == list(range(1, 41))
    run_folder.write_trial_end(f"{s3}/run", 3, status="finished", reason=None)
    assert list(run_folder.read_trial_ends(f"{s3}/run", 9)) == [3]
    assert len(list_files(f"{s3}/run/log")) == 40

"""The scheduler that Tune asks: what it logs, and that a log brings a new one to the same decisions."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from carray.core.store.files import list_files
from carray.search.run_folder import read_log, read_trial_ends
from carray.search.run_log import SearchLog
from carray.search.scheduler_on_ray import SearchScheduler
from carray.search.space import SearchSettings


def an_entry(number: int, epoch: int, val_top1: float, **others: Any) -> dict[str, Any]:
    return {
        "number": number,
        "family": "cnn",
        "epoch": epoch,
        "train_loss": 1.0,
        "val_loss": 1.0,
        "val_top1": val_top1,
        "val_top5": 1.0,
        "learning_rate": 0.1,
        "seconds": 1.0,
        "images_per_second": 1.0,
        "note": None,
        **others,
    }


class Driver:
    """Stands where Tune does: hands over an epoch's result, and counts how often a trial was taken up."""

    def __init__(self, run: Path, search: SearchSettings) -> None:
        self.run, self.search = run, search
        self.log = SearchLog(str(run), search, count=search.trials)
        self.scheduler = SearchScheduler(self.log, defaultdict(int))

    def report(self, entry: dict[str, Any]) -> str:
        result = {"entry": json.dumps(entry)}
        return self.scheduler.on_trial_result(None, a_trial(entry["number"]), result)


def a_trial(number: int) -> Any:
    return SimpleNamespace(config={"number": number}, run_metadata=SimpleNamespace(num_failures=0))


def a_search(scheduler: str, **others: Any) -> SearchSettings:
    return SearchSettings(**{"trials": 15, "epochs": 9, "scheduler": scheduler, **others})


def curves(trials: int, epochs: int) -> np.ndarray:
    """Draw validation accuracies, (trials, epochs): they rise to different heights, with noise; odd ones start late."""
    random = np.random.default_rng(3)
    heights, speeds = random.uniform(0.2, 0.9, (trials, 1)), random.uniform(0.1, 1.0, (trials, 1))
    steps = np.arange(1, epochs + 1)
    return np.clip(heights * (1 - np.exp(-speeds * steps)) + random.normal(0, 0.02, (trials, epochs)), 0, 1)


def family_of(number: int) -> str:
    return "transfer" if number % 3 else "cnn"


def run_on(driver: Driver, heights_NE: np.ndarray, *, slots: int = 4, stop_after: int | None = None) -> None:
    """Run trials side by side, at different speeds, until all have ended or so many entries are logged."""
    done = {number: 0 for number in driver.log.missing}
    for entry in read_log(str(driver.run)):
        if entry["number"] in done:
            done[entry["number"]] = max(done[entry["number"]], entry["epoch"])
    waiting, running = list(done), []
    turn = 0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        number = running[turn % len(running)]
        turn += 1 + number % 2
        done[number] += 1
        height = float(heights_NE[number, done[number] - 1])
        if driver.report(an_entry(number, done[number], height, family=family_of(number))) == TrialScheduler.STOP:
            running.remove(number)
        if stop_after is not None and len(list_files(str(driver.run / "log"))) >= stop_after:
            return


def decisions(run: Path) -> dict[tuple[int, int], tuple[str, str | None]]:
    return {(entry["number"], entry["epoch"]): (entry["decision"], entry["note"]) for entry in read_log(str(run))}


@pytest.mark.parametrize("kind", ["asha", "median", "none"])
def test_a_log_brings_a_new_scheduler_to_the_same_decisions(kind: str, tmp_path: Path) -> None:
    search = a_search(kind)
    run_on(Driver(tmp_path / "whole", search), curves(15, 9))
    whole = read_log(str(tmp_path / "whole"))
    assert len(read_trial_ends(str(tmp_path / "whole"), 15)) == 15
    assert ("stop" in {entry["decision"] for entry in whole}) == (kind in ("asha", "median"))
    for kept in (0, 17, len(whole) // 2, len(whole) - 1):
        part = tmp_path / f"part-{kept}"
        (part / "log").mkdir(parents=True)
        for file in sorted((tmp_path / "whole" / "log").iterdir())[:kept]:
            shutil.copy(file, part / "log")
        driver = Driver(part, search)
        for entry in whole[kept:]:
            driver.report({**{key: entry[key] for key in an_entry(0, 0, 0.0)}, "note": None})
        assert decisions(part) == decisions(tmp_path / "whole"), kept


@pytest.mark.parametrize("kind", ["asha", "median", "none"])
def test_epochs_that_are_run_again_change_no_decision(kind: str, tmp_path: Path) -> None:
    """After a kill, running trials report epochs that the log knows, under new names of Tune's."""
    search, heights = a_search(kind), curves(15, 9)
    killed = Driver(tmp_path / "run", search)
    run_on(killed, heights, stop_after=25)
    before = decisions(tmp_path / "run")
    running = killed.log.running
    assert running
    again = Driver(tmp_path / "run", search)
    for number in running:
        last = max(epoch for other, epoch in before if other == number)
        for epoch in range(1, last + 1):
            entry = an_entry(number, epoch, float(heights[number, epoch - 1]), family=family_of(number))
            assert again.report(entry) == TrialScheduler.CONTINUE
    assert decisions(tmp_path / "run") == before
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for driver in (again, Driver(tmp_path / "copy", search)):
        run_on(driver, heights)
    assert len(before) < len(decisions(tmp_path / "copy")) == len(decisions(tmp_path / "run"))
    assert decisions(tmp_path / "run") == decisions(tmp_path / "copy")


def test_the_reason_of_a_stop_names_the_rule(tmp_path: Path) -> None:
    for kind, who in (("asha", "ASHA"), ("median", "the median rule")):
        driver = Driver(tmp_path / kind, a_search(kind))
        answers = [driver.report(an_entry(i, 1, score)) for i, score in enumerate([0.5, 0.6, 0.7, 0.3])]
        assert answers[-1] == TrialScheduler.STOP
        reason = f"stopped by {who} after epoch 1 with 30.0% validation top-1"
        assert read_trial_ends(str(tmp_path / kind), 4)[3] == {"number": 3, "status": "stopped", "reason": reason}


def test_a_non_finite_epoch_and_a_last_one_end_their_trials(tmp_path: Path) -> None:
    driver = Driver(tmp_path, a_search("asha", epochs=2))
    diverged = {**an_entry(0, 1, 0.0), "val_top1": None, "val_loss": None, "train_loss": None}
    assert driver.report(diverged) == TrialScheduler.STOP
    assert [driver.report(an_entry(1, epoch, 0.5)) for epoch in (1, 2)] == [
        TrialScheduler.CONTINUE,
        TrialScheduler.STOP,
    ]
    ends = {number: end["status"] for number, end in read_trial_ends(str(tmp_path), 2).items()}
    assert ends == {0: "non_finite", 1: "finished"}


def test_a_trial_that_says_it_failed_is_noted_once(tmp_path: Path) -> None:
    driver = Driver(tmp_path, a_search("asha"))
    driver.scheduler.on_trial_complete(None, a_trial(2), {"failed": "last_stages is 30", "done": True})
    assert read_trial_ends(str(tmp_path), 15)[2] == {"number": 2, "status": "failed", "reason": "last_stages is 30"}
    assert not read_log(str(tmp_path))


def test_a_last_epoch_that_tune_reports_as_an_end_is_logged_once(tmp_path: Path) -> None:
    driver = Driver(tmp_path, a_search("asha", epochs=1))
    result = {"entry": json.dumps(an_entry(0, 1, 0.5))}
    for _ in range(2):
        driver.scheduler.on_trial_complete(None, a_trial(0), result)
    assert [entry["decision"] for entry in read_log(str(tmp_path))] == ["finish"]

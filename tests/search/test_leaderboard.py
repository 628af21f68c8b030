"""The table for a terminal: every trial, readable in 80 columns, and no text that a terminal would obey."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_runs import MARKUP, write_run

from carray.search import run_folder
from carray.search.leaderboard import configurations, leaderboard_text


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

"""The log: what a trial begun twice leaves behind."""

from __future__ import annotations

from pathlib import Path

from carray.trials.format import read_log, write_log_entry


def test_only_the_last_attempt_of_a_trial_counts(tmp_path: Path) -> None:
    """Its weights replaced those of the first attempt, which had come further and was better."""
    reached = [(1, 0, 1, 0.2), (2, 1, 1, 0.1), (3, 0, 2, 0.8), (4, 0, 1, 0.3), (5, 1, 2, 0.4)]
    for sequence, number, epoch, top1 in reached:
        entry = {"sequence": sequence, "number": number, "epoch": epoch, "val_top1": top1}
        write_log_entry(str(tmp_path), entry)
    kept = [(entry["sequence"], entry["number"], entry["epoch"]) for entry in read_log(str(tmp_path))]
    assert kept == [(2, 1, 1), (4, 0, 1), (5, 1, 2)]

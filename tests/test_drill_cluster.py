"""The drill of several hosts: what it calls written again, and run again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.drills.cluster import Submission, _rerun, _rewritten


def test_what_is_gone_or_written_again_is_named_and_what_is_new_is_not() -> None:
    before = {"log/1.json": ("e1", 1), "part-0.parquet": ("e2", 1), "ledger/0.json": ("e3", 1)}
    after: dict[str, Any] = {"log/1.json": ("e1", 1), "part-0.parquet": ("e2", 2), "log/2.json": ("e4", 2)}
    assert _rewritten(before, before | {"log/2.json": ("e4", 2)}) == []
    assert _rewritten(before, after) == [
        "part-0.parquet was written again or is gone",
        "ledger/0.json was written again or is gone",
    ]


@pytest.mark.parametrize(("left", "complaints"), [(3, 0), (4, 0), (5, 1)])
def test_a_trial_that_had_ended_and_is_run_again_is_noticed(tmp_path: Path, left: int, complaints: int) -> None:
    log = tmp_path / "search.log"
    log.write_text(f"tune: 8 of 8 trials to run, each on 1 CPU\ntune: {left} of 8 trials to run, each on 1 CPU\n")
    job = Submission((), log, "", cluster=None)  # type: ignore[arg-type]
    assert len(_rerun(job, ended=4)) == complaints


def test_a_stopped_job_has_not_ended_well_though_the_line_s_exit_code_is_0(tmp_path: Path) -> None:
    log = tmp_path / "rows.log"
    job = Submission((), log, "", cluster=None, codes=[0], _id="rows-1")  # type: ignore[arg-type]
    log.write_text("Job 'rows-1' was stopped\n")
    assert not job.ended_well
    log.write_text("Job 'rows-1' succeeded\n")
    assert job.ended_well

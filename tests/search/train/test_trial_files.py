"""What a trial keeps: only the process that has the trial writes it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from carray.core.errors import StorageError
from carray.core.store.files import delete, exists, read_bytes
from carray.search import run_folder
from carray.search.train.checkpoint import TrialFiles


def fit(value: float) -> Any:
    """Give what a training is to its keeper: weights that are told apart, and a checkpoint."""
    return SimpleNamespace(
        net=SimpleNamespace(weights_from="none"),
        weights=lambda: {"w": torch.full((1,), value)},
        checkpoint=lambda: f"checkpoint {value}".encode(),
        restore=lambda data: None,
    )


def epoch(number: int, top1: float) -> Any:
    return SimpleNamespace(epoch=number, val_top1=top1)


def test_a_process_that_was_given_up_overwrites_nothing_of_the_next(tmp_path: Path) -> None:
    """Its machine was cut off after epoch 1, the trial went on elsewhere, and then the machine is back."""
    run = str(tmp_path)
    given_up, holder = TrialFiles(run, 0), TrialFiles(run, 0)
    given_up.restore(fit(0))
    given_up.take()
    given_up.keep(fit(1), epoch(1, 0.3))
    holder.restore(fit(0))
    holder.take()
    holder.keep(fit(2), epoch(2, 0.5))
    before = [
        read_bytes(place) for place in (run_folder.best_weights(run, "t00000"), run_folder.last_checkpoint(run, 0))
    ]
    with pytest.raises(StorageError, match="^t00000 was resumed in another process"):
        given_up.keep(fit(9), epoch(2, 0.9))
    assert [
        read_bytes(place) for place in (run_folder.best_weights(run, "t00000"), run_folder.last_checkpoint(run, 0))
    ] == before
    holder.keep(fit(3), epoch(3, 0.6))


def test_a_trial_that_has_ended_is_written_by_nobody(tmp_path: Path) -> None:
    kept = TrialFiles(str(tmp_path), 0)
    kept.take()
    delete(run_folder.trial_holder(str(tmp_path), 0))  # which is how a trial's end begins (record.SearchLog)
    with pytest.raises(StorageError, match="was resumed in another process"):
        kept.keep(fit(1), epoch(1, 0.3))
    assert not exists(run_folder.last_checkpoint(str(tmp_path), 0))


def test_a_process_that_is_only_readied_for_a_trial_takes_it_from_nobody(tmp_path: Path) -> None:
    """Tune starts processes for trials that by then run, or have ended, in one that became free first."""
    run = str(tmp_path)
    holder, readied = TrialFiles(run, 0), TrialFiles(run, 0)
    holder.take()
    readied.restore(fit(0))
    holder.keep(fit(1), epoch(1, 0.3))
    delete(run_folder.trial_holder(run, 0))
    TrialFiles(run, 0).restore(fit(0))
    assert not exists(run_folder.trial_holder(run, 0))

"""Checks what a run's small files hold, before anything relies on it: they may come from anyone's bucket.

From: the documents of search.run_folder, as JSON gave them. To: the same, of the declared types.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from carray.core.settings import Settings

__all__ = ["LogEntry", "SearchDocument", "TrialEnd"]


class _Open(Settings):
    """Lets values stand beside those that are read: later versions add some."""

    model_config = ConfigDict(extra="allow")


class SearchDocument(_Open):
    """Is what search.json holds."""

    version: int
    manifest: str = ""
    manifest_fingerprint: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    configurations: list[dict[str, Any] | None]


class LogEntry(_Open):
    """Is one (trial, epoch) of the log, whose figures are null where they were not finite."""

    sequence: int
    number: int
    family: str
    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    seconds: float
    images_per_second: float
    note: str | None
    decision: str
    clock_seconds: float
    devices: float


class TrialEnd(_Open):
    """Is what trial.json holds."""

    number: int
    status: str
    reason: str | None

"""Lays a run's trials out as text for a terminal, best first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

__all__ = ["leaderboard_text"]

_SHOWN = {
    "transfer": ("backbone", "train", "input_size", "learning_rate"),
    "cnn": ("stages", "blocks", "width", "kernel", "input_size", "learning_rate"),
}
"""What tells one configuration of a family from another; the whole of it stands in trials.parquet."""


def leaderboard_text(trials: pd.DataFrame) -> str:
    """Write one line a trial: its figures, what it was, how it ended."""
    lines = [f"{'trial':<8} {'top-1':>6} {'top-5':>6} {'epoch':>7} {'minutes':>8}  {'status':<11} configuration"]
    for row in trials.to_dict("records"):
        best = "" if pd.isna(row["best_epoch"]) else f"{int(row['best_epoch'])}/{row['epochs']}"
        lines.append(
            f"{row['trial_id']:<8} {_percent(row['val_top1']):>6} {_percent(row['val_top5']):>6} {best:>7} "
            f"{row['seconds'] / 60:>8.1f}  {row['status']:<11} {_configuration(row)}"
        )
        if row["status"] in ("failed", "non_finite"):
            lines.append(f"{'':<8} {row['reason']}")
    return "\n".join(lines)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None or pd.isna(fraction) else f"{fraction:.1%}"


def _configuration(row: Mapping[Any, Any]) -> str:
    hyper = json.loads(str(row["hyper"]))
    return " ".join([str(row["family"]), *(f"{name}={hyper[name]}" for name in _SHOWN[str(row["family"])])])

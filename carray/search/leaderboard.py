"""Lays a run's trials out as text for a terminal, best first.

Invariants: every trial is there; text that came from elsewhere (a reason, a backbone's name) is shown, never obeyed.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.core.text import readable
from carray.search.importance import varied_values

__all__ = ["configurations", "leaderboard_text"]

_TROUBLED = ("failed", "non_finite", "dropped")
"""Statuses that a reader wants to know the reason of, trial by trial."""
_UNENDED = ("out_of_time", "unfinished", "not_started")
"""Statuses whose reason is the same for all."""
_NARROW = 100
"""Columns below which the configuration stands on lines of its own."""
_INDENT = " " * 13
_ALWAYS = ("backbone", "train", "input_size")
"""Stand in every configuration that has them, whether they vary or not."""


def leaderboard_text(
    trials: pd.DataFrame, *, speeds: Mapping[str, float] | None = None, width: int | None = None
) -> str:
    """Write each trial's figures, what it was and how it ended.

    Args:
        trials: Rows as in trials.parquet, best first.
        speeds: Measured end-to-end images a second by trial_id (search.throughput), for a column of their own.
        width: Columns to fill; None: the terminal's, or no limit where the text goes to a file.
    """
    width = _terminal_width() if width is None else width
    told_apart = configurations(trials)
    speed_head = f" {'images/s':>8}" if speeds else ""
    lines = [
        f"{'#':>3}  {'trial':<7} {'top-1':>6} {'top-5':>6} {'epoch':>7} {'minutes':>8}{speed_head}  {'status':<11} "
        "configuration"
    ]
    for place, row in enumerate(trials.to_dict("records"), start=1):
        best = "" if pd.isna(row["best_epoch"]) else f"{int(row['best_epoch'])}/{row['epochs']}"
        speed = f" {_speed(speeds.get(row['trial_id'])):>8}" if speeds else ""
        figures = (
            f"{place:>3}  {row['trial_id']:<7} {_percent(row['val_top1']):>6} {_percent(row['val_top5']):>6} {best:>7} "
            f"{row['seconds'] / 60:>8.1f}{speed}  {row['status']:<11} "
        )
        lines += _with_configuration(figures, told_apart[row["trial_id"]], width)
        if row["status"] in _TROUBLED and pd.notna(row["reason"]):
            lines += _wrapped(row["reason"], width)
        if pd.notna(row["note"]):
            lines += _wrapped(f"note: {row['note']}", width)
    lines += _closing_lines(trials, width)
    return "\n".join(lines)


def configurations(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Give for each trial_id what tells its configuration from the others of its family, by name.

    What it starts from is always among them; the whole configuration stands in trials.parquet. A trial for which the
    searcher has proposed nothing yet has none.
    """
    told_apart: dict[str, dict[str, Any]] = {trial: {} for trial in trials["trial_id"]}
    for family, own in trials[trials["family"].notna()].groupby("family"):
        varied = varied_values(own)
        for row in own.to_dict("records"):
            hyper = json.loads(str(row["hyper"]))
            names = [
                name
                for name in dict.fromkeys([*_ALWAYS, *hyper])
                if name in hyper and (name in varied or name in _ALWAYS)
            ]
            told_apart[row["trial_id"]] = {"family": family} | {name: hyper[name] for name in names}
    return told_apart


def _with_configuration(figures: str, values: Mapping[str, Any], width: int) -> list[str]:
    words = [readable(value if name in ("family", "backbone") else f"{name}={value}") for name, value in values.items()]
    text = " ".join(words)
    if not width or len(figures) + len(text) <= width:
        return [(figures + text).rstrip()]
    if width < _NARROW:
        return [figures.rstrip(), *_wrapped(text, width)]
    return textwrap.wrap(text, width, initial_indent=figures, subsequent_indent=" " * len(figures))


def _closing_lines(trials: pd.DataFrame, width: int) -> list[str]:
    unended = trials[trials["status"].isin(_UNENDED)]
    lines: list[str] = []
    for (status, reason), own in unended.groupby(["status", "reason"]):
        lines += _wrapped(f"{len(own)} {str(status).replace('_', ' ')}: {reason}", width, indent="")
    return lines


def _wrapped(text: Any, width: int, *, indent: str = _INDENT) -> list[str]:
    text = readable(text)
    return (
        textwrap.wrap(text, max(width, 40), initial_indent=indent, subsequent_indent=indent)
        if width
        else [indent + text]
    )


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def _percent(fraction: float | None) -> str:
    return "" if fraction is None or pd.isna(fraction) else f"{fraction:.1%}"


def _speed(images_per_second: float | None) -> str:
    return "" if images_per_second is None else f"{images_per_second:.0f}"

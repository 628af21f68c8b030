"""Draws a search's pictures as SVG that stands inside a page and takes the page's colours, by day and by night.

From: tables of search.ranking and search.importance. To: one `<svg>` element each, with a title and a description.
Invariants: colours are the page's CSS variables; no two pictures share an id; names are text, never markup or
mathematics; a curve says its trial when pointed at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from carray.core.svg import PAGE_COLOURS, percent_axis, picture, plain_log_axis, whole_numbers

__all__ = ["curves_svg", "importance_svg", "probes_svg", "progress_svg", "speed_svg"]

_INK, _SOFT, _BAD = (PAGE_COLOURS[name] for name in ("ink", "soft", "bad"))
_FAMILY_COLOURS = {"transfer": PAGE_COLOURS["first"], "cnn": PAGE_COLOURS["second"]}


def curves_svg(
    epochs: pd.DataFrame, *, family: str, best: str, tips: Mapping[str, str], rungs: Sequence[int], title: str
) -> str:
    """Draw top-1 by epoch of one family's trials, the rungs, and a mark where each trial was ended early.

    Args:
        epochs: One family's rows of epochs.parquet.
        family: Names the colour.
        best: The trial_id to draw above the others.
        tips: What a curve says when pointed at, by trial_id.
        rungs: Epochs at which ASHA judges.
        title: Names the picture.
    """
    with picture(
        title, "Each line is a trial; a cross marks where it was stopped, a ring a loss not finite.", tips
    ) as (
        axes,
        svg,
    ):
        for rung in rungs:
            axes.axvline(rung, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1, zorder=1)
        colour = _FAMILY_COLOURS.get(family, _INK)
        epochs = _finite_so_far(epochs)
        for trial, own in epochs.groupby("trial_id"):
            leads = trial == best
            axes.plot(
                own["epoch"],
                own["val_top1"],
                color=colour,
                linewidth=2.8 if leads else 1.1,
                alpha=1.0 if leads else 0.55,
                zorder=4 if leads else 2,
                marker="o" if leads or len(own) == 1 else None,
                markersize=3.5 if leads else 2,
                gid=f"tip-{trial}",
            )
        for decision, marker in (("stop", "x"), ("non_finite", "o")):
            ended = epochs[epochs["decision"] == decision]
            axes.plot(ended["epoch"], ended["val_top1"], marker, color=_BAD, markersize=4.5, fillstyle="none", zorder=3)
        _label_best(axes, epochs[epochs["trial_id"] == best])
        percent_axis(axes.yaxis)
        axes.set(xlabel="epoch", ylabel="validation top-1")
        axes.set_xlim(0.7, max(epochs["epoch"].max(), 2) + 0.3)
        axes.set_ylim(0, max(0.05, epochs["val_top1"].max() * 1.12))
        whole_numbers(axes.xaxis)
    return svg()


def progress_svg(epochs: pd.DataFrame, *, title: str) -> str:
    """Draw the best top-1 so far of each family against the search's own clock."""
    from matplotlib.lines import Line2D

    with picture(title, "A step up is a new best trial of its family.", {}) as (axes, svg):
        end = epochs["clock_seconds"].max() / 60
        handles = []
        for family, own in epochs.sort_values("sequence").groupby("family"):
            minutes, best = (
                own["clock_seconds"] / 60,
                own["val_top1"].where(own["decision"] != "non_finite").cummax().ffill().fillna(0.0),
            )
            colour = _FAMILY_COLOURS.get(str(family), _INK)
            axes.step([0, *minutes, end], [0, *best, best.max()], where="post", color=colour, linewidth=1.8)
            handles.append(Line2D([], [], color=colour, label=family))
        axes.legend(handles=handles, loc="lower right")
        percent_axis(axes.yaxis)
        axes.set(xlabel="minutes of search", ylabel="best validation top-1 so far")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return svg()


def importance_svg(shares: pd.DataFrame, *, family: str, title: str) -> str:
    """Draw one family's shares of variance as bars, the largest on top; rows as from search.importance."""
    shown = shares.head(12).iloc[::-1]
    height = 0.9 + 0.28 * len(shown)
    with picture(title, "Share of the differences in top-1 that each value explains.", {}, height=height) as (
        axes,
        svg,
    ):
        bars = axes.barh(shown["hyper"], shown["importance"], color=_FAMILY_COLOURS.get(family, _INK), height=0.62)
        axes.bar_label(bars, [f"{share:.0%}" for share in shown["importance"]], padding=3, color=_INK)
        percent_axis(axes.xaxis)
        axes.set_xlim(0, min(1.0, shown["importance"].max() * 1.15 + 0.02))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of variance explained")
    return svg()


def speed_svg(points: pd.DataFrame, *, title: str) -> str:
    """Draw top-1 against measured end-to-end images a second, those of the Pareto front ringed and joined.

    `points` has columns trial_id, family, val_top1, speed and on_front.
    """
    tips = {row["trial_id"]: row["tip"] for row in points.to_dict("records")}
    with picture(title, "Further up is more accurate, further right faster.", tips) as (axes, svg):
        front = points[points["on_front"]].sort_values("speed")
        axes.plot(front["speed"], front["val_top1"], color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        for row in points.to_dict("records"):
            colour = _FAMILY_COLOURS.get(row["family"], _SOFT)
            edge = {"markeredgecolor": _INK, "markeredgewidth": 1.6} if row["on_front"] else {"markeredgewidth": 0}
            gid = f"tip-{row['trial_id']}"
            axes.plot(row["speed"], row["val_top1"], "o", color=colour, markersize=7, gid=gid, **edge)
        for row in _spread(front):
            axes.annotate(
                row["trial_id"],
                (row["speed"], row["val_top1"]),
                xytext=(6, 5),
                textcoords="offset points",
                fontsize=8.5,
            )
        if points["speed"].max() > 5 * points["speed"].min():
            axes.set_xscale("log")
            plain_log_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        axes.margins(x=0.12, y=0.14)
        axes.set(xlabel="images a second, decode included", ylabel="validation top-1")
    return svg()


def probes_svg(outcomes: pd.DataFrame, *, title: str) -> str:
    """Draw what candidates' trials came to against what rung 0 said of them; rows as from standing.probe_outcomes."""
    with picture(title, "Each point is a candidate backbone.", {}) as (axes, svg):
        for place, row in enumerate(outcomes.to_dict("records"), start=1):
            point = (row["val_top1"], row["best"])
            if pd.notna(row["best"]):
                axes.plot(*point, "o", color=_FAMILY_COLOURS["transfer"], markersize=7)
                axes.annotate(str(place), point, xytext=(0, 7), textcoords="offset points", ha="center")
        for axis in (axes.xaxis, axes.yaxis):
            percent_axis(axis)
        axes.margins(0.14)
        axes.set(xlabel="rung 0: top-1 of a linear head", ylabel="best trial's top-1")
    return svg()


def _finite_so_far(epochs: pd.DataFrame) -> pd.DataFrame:
    """Put each epoch that was not finite where its trial had last been, or at nothing."""
    ordered = epochs.sort_values(["trial_id", "epoch"])
    finite = ordered["val_top1"].where(ordered["decision"] != "non_finite")
    return ordered.assign(val_top1=finite.groupby(ordered["trial_id"]).ffill().fillna(0.0))


def _label_best(axes: Any, own: pd.DataFrame) -> None:
    if own["val_top1"].notna().any():
        top = own.nlargest(1, "val_top1").iloc[0]
        label = f"{top['trial_id']}  {top['val_top1']:.1%}"
        place = (top["epoch"], top["val_top1"])
        axes.annotate(label, place, xytext=(-4, 7), textcoords="offset points", ha="right", weight="bold", zorder=5)


def _spread(front: pd.DataFrame, *, most: int = 8) -> Iterator[dict[Any, Any]]:
    """Give at most so many different points of a front, spread along it, so that their names stay legible."""
    front = front.drop_duplicates(["speed", "val_top1"])
    step = max(1, -(-len(front) // most))
    yield from front.iloc[::step].to_dict("records")

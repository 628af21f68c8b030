"""Draws an evaluation's pictures as SVG that stands inside a page and takes the page's colours, by day and by night.

From: an evaluation's tables. To: one `<svg>` element each, with a title and a description.
Invariants: what is drawn stands in a table or a sentence of the page, too; bars of uncertainty are the tables' 95 %
intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from carray.core.svg import PAGE_COLOURS, percent_axis, picture, whole_numbers

__all__ = ["bars_svg", "coverage_svg", "intervals_svg", "reliability_svg"]

_INK, _SOFT, _FIRST, _SECOND, _THIRD = (PAGE_COLOURS[name] for name in ("ink", "soft", "first", "second", "third"))
_MOST_POINTS = 400
"""Of a curve: more would make the page larger, not finer."""


def reliability_svg(bins: pd.DataFrame, *, title: str, colour: str) -> str:
    """Draw accuracy by score, the share of images at each score, and the line on which both are the same.

    `bins` are rows of calibration.parquet of one stage; `colour` names one of the page's.
    """
    seen = bins[bins["images"] > 0]
    tips = {
        f"bin{i}": f"{row['images']:,} images of score {row['mean_score']:.1%} on average: {row['accuracy']:.1%} right"
        for i, row in enumerate(seen.to_dict("records"))
    }
    with picture(title, "On the dotted line, scores mean what they say; below it, they promise too much.", tips) as (
        axes,
        svg,
    ):
        axes.plot([0, 1], [0, 1], color=_SOFT, linestyle=(0, (2, 3)), linewidth=1.2)
        shares = bins["images"] / bins["images"].sum()
        middles, width = (bins["score_low"] + bins["score_high"]) / 2, bins["score_high"] - bins["score_low"]
        axes.bar(middles, shares, width=0.85 * width, color=_SOFT, alpha=0.3, linewidth=0, label="share of images")
        axes.vlines(seen["mean_score"], seen["low"], seen["high"], color=PAGE_COLOURS[colour], linewidth=1.1)
        for i, row in enumerate(seen.to_dict("records")):
            axes.plot(
                row["mean_score"], row["accuracy"], "o", color=PAGE_COLOURS[colour], markersize=5.5, gid=f"tip-bin{i}"
            )
        axes.legend(loc="upper left")
        for axis in (axes.xaxis, axes.yaxis):
            percent_axis(axis)
        axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="score", ylabel="right")
    return svg()


def coverage_svg(coverage: pd.DataFrame, *, title: str, threshold: float | None, target: float | None) -> str:
    """Draw the accuracy of what is accepted against how much is, and mark the bundle's threshold and its target."""
    step = max(1, -(-len(coverage) // _MOST_POINTS))
    shown = pd.concat([coverage.iloc[::step], coverage.iloc[-1:]])
    with picture(title, "Further right more is accepted; the band is the 95 % interval of each point.", {}) as (
        axes,
        svg,
    ):
        axes.fill_between(shown["coverage"], shown["low"], shown["high"], color=_FIRST, alpha=0.2, linewidth=0)
        axes.plot(shown["coverage"], shown["accuracy"], color=_FIRST, linewidth=1.8)
        lowest = shown.loc[shown["coverage"] >= 0.05, "low"].min()
        if target is not None:
            axes.axhline(target, color=_SECOND, linestyle=(0, (4, 3)), linewidth=1.2)
            place, offset = (1, target), {"xytext": (0, 4), "textcoords": "offset points"}
            axes.annotate(f"target {100 * target:.4g}%", place, ha="right", color=_SECOND, **offset)
            lowest = min(lowest, target - 0.03)
        accepted = coverage[coverage["threshold"] >= threshold] if threshold is not None else coverage.iloc[:0]
        if len(accepted):
            last = accepted.iloc[-1]
            axes.plot(last["coverage"], last["accuracy"], "o", color=_SECOND, markersize=8, zorder=5)
            axes.annotate(
                f"score {threshold:.3f}",
                (last["coverage"], last["accuracy"]),
                xytext=(-7, -15),
                textcoords="offset points",
                ha="right",
                weight="bold",
            )
        for axis in (axes.xaxis, axes.yaxis):
            percent_axis(axis)
        axes.set(xlim=(0, 1.01), ylim=(max(0.0, lowest - 0.02), 1.01))
        axes.set(xlabel="accepted", ylabel="right, of the accepted")
    return svg()


def intervals_svg(rows: Sequence[dict[Any, Any]], *, title: str, label: str) -> str:
    """Draw shares as points with their intervals, one line a row of name, accuracy, low and high, the first on top."""
    height = 0.95 + 0.36 * len(rows)
    with picture(title, "Points are measured, lines their 95 % intervals.", {}, height=height) as (axes, svg):
        places = np.arange(len(rows))[::-1]
        for place, row in zip(places, rows, strict=True):
            axes.plot([row["low"], row["high"]], [place, place], color=_FIRST, linewidth=2.2, solid_capstyle="round")
            axes.plot(row["accuracy"], place, "o", color=_FIRST, markersize=7)
            point, offset = (row["accuracy"], place), {"xytext": (0, 7), "textcoords": "offset points"}
            axes.annotate(f"{row['accuracy']:.1%}", point, ha="center", **offset)
        axes.set_yticks(places, [row["name"] for row in rows])
        percent_axis(axes.xaxis)
        low = min(row["low"] for row in rows)
        axes.set(xlim=(max(0, low - 0.04), 1.005), ylim=(-0.5, len(rows) - 0.35), xlabel=label)
        axes.grid(visible=False, axis="y")
    return svg()


def bars_svg(names: Sequence[str], images: Sequence[int], *, title: str, label: str) -> str:
    """Draw counts as bars, the first on top, each with its number."""
    with picture(title, "Bars are counts of images.", {}, height=0.95 + 0.34 * len(names)) as (axes, svg):
        bars = axes.barh(list(names)[::-1], list(images)[::-1], color=_SECOND, height=0.62)
        axes.bar_label(bars, [f"{count:,}" for count in list(images)[::-1]], padding=3, color=_INK)
        axes.set_xlim(0, max(1, *images) * 1.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        whole_numbers(axes.xaxis)
    return svg()

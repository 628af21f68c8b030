"""Draws a bundle under stress as SVG for a page (core.svg).

From: rows of robustness, and `ood_score` of inside and outside images. To: one `<svg>` element each.
Invariants: the order of corruptions is the table's; kinds are told apart by line style, too, not by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.svg import PAGE_COLOURS, percent_axis, picture
from carray.evaluation.corruptions import NONE, REENCODED
from carray.evaluation.outside import INSIDE

__all__ = ["robustness_svg", "roc_svg", "spread_svg"]

Values = npt.NDArray[np.float64]

_INK, _SOFT, _GRID = (PAGE_COLOURS[name] for name in ("ink", "soft", "grid"))
_DASHED, _DOTTED = (0, (5, 2)), (0, (2, 1.5))
_KIND_LINES: list[dict[str, Any]] = [
    {"color": PAGE_COLOURS[colour], "linestyle": style}
    for colour, style in (
        *(("first", "-"), ("second", _DASHED), ("third", _DOTTED)),
        *(("bad", "-"), ("first", _DASHED), ("ink", _DOTTED)),
    )
]
"""As many as there may be kinds (outside.MOST_KINDS)."""


def robustness_svg(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Draw top-1 with its interval for each corruption and severity, beside the plain pictures' as a line and a band.

    Rows are those of ROBUSTNESS_SCHEMA with `words`, the corruption's name for people; the plain one is first.
    """
    plain, shown = rows[0], [row for row in rows if row["corruption"] != NONE]
    tips = {f"{place}": _tip(row) for place, row in enumerate(shown)}
    description = "Each dot is a corruption at one severity, its bar a 95 % interval; the line is of plain pictures."
    with picture(title, description, tips, height=0.8 + 0.235 * len(shown)) as (axes, svg):
        axes.axvspan(plain["top1_low"], plain["top1_high"], color=_GRID, linewidth=0, zorder=0)
        axes.axvline(plain["top1"], color=_SOFT, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1)
        for place, row in enumerate(shown):
            colour = _SOFT if row["corruption"] == REENCODED else PAGE_COLOURS["first"]
            bar = {"color": colour, "linewidth": 1.6, "solid_capstyle": "butt", "zorder": 2}
            axes.plot([row["top1_low"], row["top1_high"]], [place, place], **bar)
            axes.plot(row["top1"], place, "o", color=colour, markersize=6, zorder=3, gid=f"tip-{place}")
            if place and shown[place - 1]["corruption"] != row["corruption"]:
                axes.axhline(place - 0.5, color=_GRID, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(shown)), [f"{row['words']}, {row['severity']}" for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        percent_axis(axes.xaxis)
        axes.set_xlabel("top-1; the dashed line is that of plain pictures")
    return svg()


def _tip(row: Mapping[str, Any]) -> str:
    interval = f"{row['top1_low']:.1%} to {row['top1_high']:.1%}"
    return f"{row['words']}, {row['severity']}: {row['top1']:.1%} ({interval}), {row['drop_points']:.1f} points lost"


def roc_svg(values: Mapping[str, Values], *, title: str) -> str:
    """Draw the ROC curve of each kind of outside images by `ood_score`; `values` has the inside ones under INSIDE."""
    from sklearn.metrics import roc_curve

    with picture(title, "A curve nearer to the upper left corner tells a kind better from inside images.", {}) as (
        axes,
        svg,
    ):
        axes.plot([0, 1], [0, 1], color=_SOFT, linewidth=1, linestyle=(0, (1, 2)))
        axes.axhline(0.95, color=_SOFT, linewidth=0.8, linestyle=(0, (4, 2)))
        inside_N = values[INSIDE]
        for kind, line in zip([kind for kind in values if kind != INSIDE], _KIND_LINES, strict=False):
            outside_M = values[kind]
            is_inside = np.r_[np.ones(len(inside_N)), np.zeros(len(outside_M))]
            let_in_outside, let_in_inside, _ = roc_curve(is_inside, -np.r_[inside_N, outside_M])
            axes.plot(let_in_outside, let_in_inside, linewidth=1.9, label=_short(kind), **line)
        axes.legend(loc="lower right")
        for axis in (axes.xaxis, axes.yaxis):
            percent_axis(axis)
        axes.set(xlabel="outside images let in", ylabel="inside images let in")
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
    return svg()


def spread_svg(values: Mapping[str, Values], *, title: str) -> str:
    """Draw how the scores of inside images and of each kind of outside ones are spread, as parts of each."""
    with picture(title, "How ood_score is spread in each kind; little overlap is what tells them apart.", {}) as (
        axes,
        svg,
    ):
        every = np.concatenate(list(values.values()))
        edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), 31)
        inside_N = values[INSIDE]
        axes.hist(inside_N, edges, weights=_shares(inside_N), color=_GRID, label="inside, the split's images")
        axes.hist(inside_N, edges, weights=_shares(inside_N), histtype="step", color=_INK, linewidth=1.2)
        for kind, line in zip([kind for kind in values if kind != INSIDE], _KIND_LINES, strict=False):
            weights = _shares(values[kind])
            axes.hist(values[kind], edges, weights=weights, histtype="step", linewidth=1.9, label=_short(kind), **line)
        axes.legend(loc="best")
        percent_axis(axes.yaxis)
        axes.set(xlabel="ood_score", ylabel="of the kind's images")
    return svg()


def _shares(values_N: Values) -> Values:
    return np.full(len(values_N), 1 / max(1, len(values_N)))


def _short(kind: str, *, most: int = 24) -> str:
    """Cut a kind's name, and keep matplotlib from hiding one that begins with an underscore."""
    kind = kind if len(kind) <= most else kind[: most - 1] + "…"
    return f"\u200b{kind}"

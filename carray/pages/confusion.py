"""Draws an evaluation's pictures: SVG that takes a page's colours by day and night, the confusion matrix also as PNG.

From: an evaluation's tables, and counts by (true class, predicted class). To: one `<svg>` element each, with a title
and a description.
Invariants: what is drawn stands in a table or a sentence of the page, too; bars of uncertainty are the tables' 95 %
intervals. Rows of a confusion matrix are the truth and add up to 1; a class without images is a grey row, not an empty
one; up to 30 classes each has its name, above that neighbours of one make share a tick. Names are text, never
mathematics.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.core.svg import PAGE_COLOURS, percent_axis, picture, whole_numbers
from carray.evaluation.corruptions import NONE, REENCODED
from carray.images.vehicles import parse_vehicle

__all__ = ["bars_svg", "confusion_png", "confusion_svg"]

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


NAMED_CLASSES = 30
"""With more, class names no longer fit beside the rows."""
NUMBERED_CLASSES = 12
"""With more, the numbers no longer fit into the cells."""
SMALLEST_GAP = 0.012
"""Between the middles of two tick labels, as a fraction of the axis: the height of their letters."""
LONGEST_NAME = 40
"""Letters: a longer name is cut, or it would leave no room for the matrix."""
CELL_COLOUR = (62, 134, 208)
"""A blue that can be told from white and from near black."""


def confusion_png(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw counts (rows are the truth) as a row-normalised picture, and give its PNG bytes."""
    import matplotlib
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts_KK, names = _in_order(counts_KK, classes)
    shares_KK = np.ma.masked_invalid(_row_shares(counts_KK))
    side = 2.5 + _room(names) + 0.35 * len(classes) if len(classes) <= NAMED_CLASSES else 13.0
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")
        # The square root lifts rare confusions, which would vanish beside a strong diagonal.
        image = axes.imshow(shares_KK, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the true class's images")
        _label(axes, names, counts_KK, lines="0.85")
        if len(classes) <= NUMBERED_CLASSES:
            _number_cells(axes, counts_KK, lambda share: "white" if share > 0.4 else "black")
        hits = int(np.trace(counts_KK))
        axes.set_title(f"{hits:,} of {int(counts_KK.sum()):,} images right, {len(classes)} classes")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def confusion_svg(counts_KK: npt.NDArray[np.int64], classes: Sequence[str], *, title: str) -> str:
    """Draw the same for a page: ink of the page's own, cells that darken a light page and lighten a dark one."""
    counts_KK, names = _in_order(counts_KK, classes)
    shares_KK = _row_shares(counts_KK)
    cells_KKC = np.zeros((*shares_KK.shape, 4))
    cells_KKC[..., :3] = np.array(CELL_COLOUR) / 255
    cells_KKC[..., 3] = 0.9 * np.sqrt(np.nan_to_num(shares_KK))
    cells_KKC[np.isnan(shares_KK)] = (0.5, 0.5, 0.5, 0.3)
    side = 1.4 + _room(names) + 0.26 * len(classes) if len(classes) <= NAMED_CLASSES else 9.6
    with picture(title, "Rows are true classes, columns predicted ones.", {}, height=side, width=side + 0.6) as (
        axes,
        svg,
    ):
        axes.grid(visible=False)
        axes.imshow(cells_KKC, interpolation="none")
        _label(axes, names, counts_KK, lines=PAGE_COLOURS["grid"])
        if len(classes) <= NUMBERED_CLASSES:
            _number_cells(axes, counts_KK, lambda share: PAGE_COLOURS["ink"])
    return svg()


def _in_order(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Put classes of one make side by side."""
    order = sorted(range(len(classes)), key=lambda i: (_group(classes[i]).casefold(), classes[i]))
    return counts_KK[np.ix_(order, order)], [classes[i] for i in order]


def _short(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


def _room(names: Sequence[str]) -> float:
    """Give the inches that the longest name needs beside the matrix."""
    return 0.08 * max(len(_short(name)) for name in names)


def _row_shares(counts_KK: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Divide each row by its sum; NaN in a row without images."""
    totals_K = counts_KK.sum(axis=1)[:, None]
    return np.where(totals_K > 0, counts_KK / np.maximum(totals_K, 1), np.nan)


def _label(axes: Any, names: Sequence[str], counts_KK: npt.NDArray[np.int64], *, lines: str) -> None:
    if len(names) <= NAMED_CLASSES:
        _name_every_class(axes, names, counts_KK.sum(axis=1))
    else:
        _name_groups(axes, names, lines=lines)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def _group(name: str) -> str:
    return parse_vehicle(name).make or name[:1].upper()


def _name_every_class(axes: Any, names: Sequence[str], totals_K: npt.NDArray[np.int64]) -> None:
    places, names = range(len(names)), [_short(name) for name in names]
    axes.set_xticks(places, names, rotation=90 if len(names) > 8 else 30, ha="center" if len(names) > 8 else "right")
    axes.set_yticks(places, [f"{name} ({total})" for name, total in zip(names, totals_K, strict=True)])


def _name_groups(axes: Any, names: Sequence[str], *, lines: str) -> None:
    """Put one tick in the middle of each run of neighbours of one make, and a thin line between runs."""
    groups = [_group(name) for name in names]
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
    runs = list(zip(starts, [*starts[1:], len(groups)], strict=True))
    ticks: dict[float, str] = {}
    # The largest first; a small make beside a labelled one goes without, since two labels in one place are none.
    for start, end in sorted(runs, key=lambda run: run[0] - run[1]):
        middle = (start + end - 1) / 2
        if all(abs(middle - other) >= SMALLEST_GAP * len(names) for other in ticks):
            ticks[middle] = groups[start]
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=7)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.tick_params(length=0)
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=lines, linewidth=0.4)
        axes.axvline(start - 0.5, color=lines, linewidth=0.4)


def _number_cells(axes: Any, counts_KK: npt.NDArray[np.int64], colour: Callable[[float], str]) -> None:
    shares_KK = _row_shares(counts_KK)
    for (row, column), count in np.ndenumerate(counts_KK):
        if count:
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour(float(shares_KK[row, column])))


def robustness_svg(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """Draw top-1 with its interval for each corruption and severity, beside the plain pictures' as a line and a band.

    Rows are those of ROBUSTNESS_SCHEMA with `words`, the corruption's name for people; the plain one is first.
    """
    plain, shown = rows[0], [row for row in rows if row["corruption"] != NONE]
    tips = {f"{place}": _robustness_tip(row) for place, row in enumerate(shown)}
    description = "Each dot is a corruption at one severity, its bar a 95 % interval; the line is of plain pictures."
    with picture(title, description, tips, height=0.8 + 0.235 * len(shown)) as (axes, svg):
        axes.axvspan(plain["top1_low"], plain["top1_high"], color=PAGE_COLOURS["grid"], linewidth=0, zorder=0)
        axes.axvline(plain["top1"], color=_SOFT, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1)
        for place, row in enumerate(shown):
            colour = _SOFT if row["corruption"] == REENCODED else PAGE_COLOURS["first"]
            bar = {"color": colour, "linewidth": 1.6, "solid_capstyle": "butt", "zorder": 2}
            axes.plot([row["top1_low"], row["top1_high"]], [place, place], **bar)
            axes.plot(row["top1"], place, "o", color=colour, markersize=6, zorder=3, gid=f"tip-{place}")
            if place and shown[place - 1]["corruption"] != row["corruption"]:
                axes.axhline(place - 0.5, color=PAGE_COLOURS["grid"], linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(shown)), [f"{row['words']}, {row['severity']}" for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        percent_axis(axes.xaxis)
        axes.set_xlabel("top-1; the dashed line is that of plain pictures")
    return svg()


def _robustness_tip(row: Mapping[str, Any]) -> str:
    interval = f"{row['top1_low']:.1%} to {row['top1_high']:.1%}"
    return f"{row['words']}, {row['severity']}: {row['top1']:.1%} ({interval}), {row['drop_points']:.1f} points lost"

"""Draws a confusion matrix, as a PNG and as SVG inside a page.

Rows are true classes and add up to 1; a class without images is a grey row. Up to 30 classes each has its name; above
that, neighbours of one make share a tick.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.images.vehicles import parse_vehicle
from carray.pages.charts import PAGE_COLOURS, chart

__all__ = ["confusion_png", "confusion_svg"]

_NAMED_CLASSES = 30
"""With more, class names no longer fit beside the rows."""
_NUMBERED_CLASSES = 12
"""With more, the numbers no longer fit into the cells."""
_SMALLEST_GAP = 0.012
"""Between the middles of two tick labels, as a fraction of the axis: the height of their letters."""
_LONGEST_NAME = 40
"""Letters: a longer name is cut, or it would leave no room for the matrix."""
_CELL_COLOUR = (62, 134, 208)
"""A blue that can be told from white and from near black."""


def confusion_png(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw counts (rows are true classes) as a row-normalised matrix, and return its PNG bytes."""
    import matplotlib
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    counts_KK, names = _in_order(counts_KK, classes)
    shares_KK = np.ma.masked_invalid(_row_shares(counts_KK))
    side = 2.5 + _room(names) + 0.35 * len(classes) if len(classes) <= _NAMED_CLASSES else 13.0
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        axes.set_facecolor("0.8")
        # The square root lifts rare confusions, which would vanish beside a strong diagonal.
        image = axes.imshow(shares_KK, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
        figure.colorbar(image, ax=axes, shrink=0.7, label="fraction of the true class's images")
        _label(axes, names, counts_KK, lines="0.85")
        if len(classes) <= _NUMBERED_CLASSES:
            _number_cells(axes, counts_KK, lambda share: "white" if share > 0.4 else "black")
        hits = int(np.trace(counts_KK))
        axes.set_title(f"{hits:,} of {int(counts_KK.sum()):,} images right, {len(classes)} classes")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def confusion_svg(counts_KK: npt.NDArray[np.int64], classes: Sequence[str], *, title: str) -> str:
    """Draw the same as SVG in the page's colours; cells darken a light page and lighten a dark one."""
    counts_KK, names = _in_order(counts_KK, classes)
    shares_KK = _row_shares(counts_KK)
    cells_KKC = np.zeros((*shares_KK.shape, 4))
    cells_KKC[..., :3] = np.array(_CELL_COLOUR) / 255
    cells_KKC[..., 3] = 0.9 * np.sqrt(np.nan_to_num(shares_KK))
    cells_KKC[np.isnan(shares_KK)] = (0.5, 0.5, 0.5, 0.3)
    side = 1.4 + _room(names) + 0.26 * len(classes) if len(classes) <= _NAMED_CLASSES else 9.6
    description = "Rows are true classes, columns predicted ones."
    with chart(title, description, height=side, width=side + 0.6) as (axes, svg):
        axes.grid(visible=False)
        axes.imshow(cells_KKC, interpolation="none")
        _label(axes, names, counts_KK, lines=PAGE_COLOURS["grid"])
        if len(classes) <= _NUMBERED_CLASSES:
            _number_cells(axes, counts_KK, lambda share: PAGE_COLOURS["ink"])
    return svg()


def _in_order(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Sort classes so that those of one make are neighbours."""
    order = sorted(range(len(classes)), key=lambda i: (_group(classes[i]).casefold(), classes[i]))
    return counts_KK[np.ix_(order, order)], [classes[i] for i in order]


def _short(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME - 1]}…"


def _room(names: Sequence[str]) -> float:
    """Return the inches that the longest name needs beside the matrix."""
    return 0.08 * max(len(_short(name)) for name in names)


def _row_shares(counts_KK: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Divide each row by its sum; NaN in a row without images."""
    totals_K = counts_KK.sum(axis=1)[:, None]
    return np.where(totals_K > 0, counts_KK / np.maximum(totals_K, 1), np.nan)


def _label(axes: Any, names: Sequence[str], counts_KK: npt.NDArray[np.int64], *, lines: str) -> None:
    if len(names) <= _NAMED_CLASSES:
        ticks, many, shown = range(len(names)), len(names) > 8, [_short(name) for name in names]
        axes.set_xticks(ticks, shown, rotation=90 if many else 30, ha="center" if many else "right")
        totals_K = counts_KK.sum(axis=1)
        axes.set_yticks(ticks, [f"{name} ({total})" for name, total in zip(shown, totals_K, strict=True)])
    else:
        _name_groups(axes, names, lines=lines)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def _group(name: str) -> str:
    return parse_vehicle(name).make or name[:1].upper()


def _name_groups(axes: Any, names: Sequence[str], *, lines: str) -> None:
    """Put one tick at the middle of each make, and a thin line between makes."""
    groups = [_group(name) for name in names]
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
    runs = list(zip(starts, [*starts[1:], len(groups)], strict=True))
    ticks: dict[float, str] = {}
    # The largest make first; a small one beside it gets no label, since the two would overlap.
    for start, end in sorted(runs, key=lambda run: run[0] - run[1]):
        middle = (start + end - 1) / 2
        if all(abs(middle - other) >= _SMALLEST_GAP * len(names) for other in ticks):
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

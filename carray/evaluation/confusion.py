"""Draws a confusion matrix that can be read with six classes and with two hundred.

From: counts by (true class, predicted class). To: a PNG.
Invariants: rows are the truth and add up to 1; a class without images is a grey row, not an empty one; up to 30
classes each has its name, above that neighbours of one make share a tick.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.vehicles import parse_vehicle

__all__ = ["confusion_png"]

NAMED_CLASSES = 30
"""With more, class names no longer fit beside the rows."""
NUMBERED_CLASSES = 12
"""With more, the numbers no longer fit into the cells."""
SMALLEST_GAP = 0.012
"""Between the middles of two tick labels, as a fraction of the axis: the height of their letters."""


def confusion_png(counts_KK: npt.NDArray[np.int64], classes: Sequence[str]) -> bytes:
    """Draw counts (rows are the truth) as a row-normalised picture, and give its PNG bytes."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    order = sorted(range(len(classes)), key=lambda i: (_group(classes[i]).casefold(), classes[i]))
    ordered_KK = counts_KK[np.ix_(order, order)]
    names = [classes[i] for i in order]
    totals_K = ordered_KK.sum(axis=1)
    shares_KK = np.ma.masked_invalid(
        np.where(totals_K[:, None] > 0, ordered_KK / np.maximum(totals_K, 1)[:, None], np.nan)
    )
    few = len(classes) <= NAMED_CLASSES
    side = 4.5 + 0.35 * len(classes) if few else 13.0
    figure = Figure(figsize=(side + 1, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    # The square root lifts rare confusions, which would vanish beside a strong diagonal.
    axes.set_facecolor("0.8")
    picture = axes.imshow(shares_KK, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none")
    figure.colorbar(picture, ax=axes, shrink=0.7, label="fraction of the true class's images")
    if few:
        _name_every_class(axes, names, totals_K)
    else:
        _name_groups(axes, names)
    if len(classes) <= NUMBERED_CLASSES:
        _number_cells(axes, ordered_KK, shares_KK)
    hits = int(np.trace(counts_KK))
    axes.set_title(f"{hits:,} of {int(counts_KK.sum()):,} images right, {len(classes)} classes")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _group(name: str) -> str:
    return parse_vehicle(name).make or name[:1].upper()


def _name_every_class(axes: Any, names: Sequence[str], totals_K: npt.NDArray[np.int64]) -> None:
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90 if len(names) > 8 else 30, ha="center" if len(names) > 8 else "right")
    axes.set_yticks(places, [f"{name} ({total})" for name, total in zip(names, totals_K, strict=True)])


def _name_groups(axes: Any, names: Sequence[str]) -> None:
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
        axes.axhline(start - 0.5, color="0.85", linewidth=0.4)
        axes.axvline(start - 0.5, color="0.85", linewidth=0.4)


def _number_cells(axes: Any, counts_KK: npt.NDArray[np.int64], shares_KK: Any) -> None:
    for (row, column), count in np.ndenumerate(counts_KK):
        if count:
            colour = "white" if shares_KK[row, column] > 0.4 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=colour)

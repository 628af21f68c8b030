"""Draws a report's pictures as SVG that stands inside the page and takes its colours, by day and by night.

From: frames of reports.tallies. To: one `<svg>` element each, with a title and a description.
Invariants: names are text, never markup; a bar says its numbers when pointed at.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from carray.core.svg import PAGE_COLOURS, percent_axis, picture, whole_numbers
from carray.queries import UNCERTAIN_SCORE
from carray.reports.tallies import BINS

__all__ = ["folders_svg", "scores_svg", "years_svg"]

_FIRST, _SECOND, _SOFT, _BAD = (PAGE_COLOURS[name] for name in ("first", "second", "soft", "bad"))


def scores_svg(bins: pd.DataFrame, *, title: str) -> str:
    """Draw how many images have which score; those that a threshold refuses stand out, if there is one."""
    from matplotlib.patches import Patch

    accepted = bins["accept"].astype("boolean")
    refused = (~accepted).fillna(value=False)
    kinds = [("accepted", _FIRST, accepted.fillna(value=False)), ("below the threshold", _SECOND, refused)]
    kinds.append(("scored", _FIRST, accepted.isna()))
    tips: dict[str, str] = {}
    with picture(title, "A bar's height is the number of images with that score.", tips) as (axes, svg):
        heights = pd.Series(0, index=range(BINS))
        handles = []
        for name, colour, chosen in kinds:
            images = bins[chosen].groupby("bin")["images"].sum().reindex(range(BINS), fill_value=0).astype(int)
            if not images.any():
                continue
            for place in images.index[images > 0]:
                span = f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}"
                tips[f"{name[0]}{place}"] = f"score {span}: {images[place]:,} {name}"
                _bar(axes, place / BINS, images[place], bottom=heights[place], colour=colour, tip=f"{name[0]}{place}")
            heights = heights + images
            handles.append(Patch(color=colour, label=name))
        axes.axvline(UNCERTAIN_SCORE, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1)
        if len(handles) > 1:
            axes.legend(handles=handles, loc="upper left")
        axes.set(xlabel="score", ylabel="images")
        axes.set_xlim(0, 1)
        _thousands(axes.yaxis)
    return svg()


def years_svg(years: pd.DataFrame, *, title: str) -> str:
    """Draw how many images show a vehicle of which model year."""
    tips = {f"y{row['name']}": f"{row['name']}: {row['images']:,} images" for row in years.to_dict("records")}
    with picture(title, "A bar's height is the number of images of that model year.", tips) as (axes, svg):
        for row in years.to_dict("records"):
            _bar(axes, row["name"] - 0.4, row["images"], width=0.8, colour=_FIRST, tip=f"y{row['name']}")
        axes.set(xlabel="model year", ylabel="images")
        axes.set_xlim(years["name"].min() - 1, years["name"].max() + 1)
        whole_numbers(axes.xaxis)
        _thousands(axes.yaxis)
    return svg()


def folders_svg(folders: pd.DataFrame, *, title: str) -> str:
    """Draw each folder's share of failures as a bar and its mean score as a dot, in the order of their names.

    `folders` has columns name, tip, failed_fraction and mean_score, and is in that order already.
    """
    tips = {f"f{place}": tip for place, tip in enumerate(folders["tip"])}
    description = "A bar is a folder's share of failures, a dot its mean score."
    with picture(title, description, tips, height=3.0) as (axes, svg):
        for place, row in enumerate(folders.to_dict("records")):
            tips[f"s{place}"] = row["tip"]
            _bar(axes, place - 0.4, row["failed_fraction"], width=0.8, colour=_BAD, tip=f"f{place}")
            if pd.notna(row["mean_score"]):
                size = 5.0 if len(folders) <= 60 else 3.0
                axes.plot(place, row["mean_score"], "o", color=_FIRST, markersize=size, gid=f"tip-s{place}")
        percent_axis(axes.yaxis)
        axes.set(ylabel="failed, and mean score", xlabel="folders, in the order of their names")
        _name_folders(axes, list(folders["name"]))
        axes.set_xlim(-0.7, len(folders) - 0.3)
        axes.set_ylim(0, 1.04)
        axes.grid(visible=False, axis="x")
    return svg()


def _name_folders(axes: Any, names: list[str]) -> None:
    """Write few and short names below their bars; more would cover each other, and a tip says them all the same."""
    if len(names) > 31 or sum(map(len, names)) > 80 or not all(name.isascii() for name in names):
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(names)), names)


def _bar(
    axes: Any, left: float, height: float, *, colour: str, tip: str, bottom: float = 0, width: float = 1 / BINS
) -> None:
    bars = axes.bar(left, height, width=width * 0.92, bottom=bottom, align="edge", color=colour)
    bars.patches[0].set_gid(f"tip-{tip}")


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

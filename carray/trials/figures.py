"""Draws a search's pictures as SVG that stands inside a page and takes the page's colours, by day and by night.

From: tables of trials.standing and trials.importance. To: one `<svg>` element each, with a title and a description.
Invariants: colours are the page's CSS variables; no two pictures share an id; names are text, never markup or
mathematics; a curve says its trial when pointed at.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import pandas as pd

__all__ = ["curves_svg", "importance_svg", "probes_svg", "progress_svg", "speed_svg"]

_PAGE_COLOURS = {
    "ink": "#0a0b01",
    "soft": "#0a0b02",
    "grid": "#0a0b03",
    "transfer": "#0a0b04",
    "cnn": "#0a0b05",
    "bad": "#0a0b06",
    "paper": "#0a0b07",
}
"""What matplotlib is told, by the name of the CSS variable that takes its place afterwards."""
_INK, _SOFT, _GRID, _BAD, _PAPER = (_PAGE_COLOURS[name] for name in ("ink", "soft", "grid", "bad", "paper"))
_SIZE = (5.6, 3.7)
"""Inches of 72 units: a phone shows the picture at about this size, a wide screen half as large again."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, found by searching
    "text.parse_math": False,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.axisbelow": True,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


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
    with _picture(
        title, "Each line is a trial; a cross marks where it was stopped, a ring a loss not finite.", tips
    ) as (
        axes,
        svg,
    ):
        for rung in rungs:
            axes.axvline(rung, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1, zorder=1)
        colour = _PAGE_COLOURS.get(family, _INK)
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
                gid=f"trial-{trial}",
            )
        for decision, marker in (("stop", "x"), ("non_finite", "o")):
            ended = epochs[epochs["decision"] == decision]
            axes.plot(ended["epoch"], ended["val_top1"], marker, color=_BAD, markersize=4.5, fillstyle="none", zorder=3)
        _label_best(axes, epochs[epochs["trial_id"] == best])
        _percent_axis(axes.yaxis)
        axes.set(xlabel="epoch", ylabel="validation top-1")
        axes.set_xlim(0.7, max(epochs["epoch"].max(), 2) + 0.3)
        axes.set_ylim(0, max(0.05, epochs["val_top1"].max() * 1.12))
        _whole_numbers(axes.xaxis)
    return svg()


def progress_svg(epochs: pd.DataFrame, *, title: str) -> str:
    """Draw the best top-1 so far of each family against the search's own clock."""
    from matplotlib.lines import Line2D

    with _picture(title, "A step up is a new best trial of its family.", {}) as (axes, svg):
        end = epochs["clock_seconds"].max() / 60
        handles = []
        for family, own in epochs.sort_values("sequence").groupby("family"):
            minutes, best = own["clock_seconds"] / 60, own["val_top1"].cummax()
            colour = _PAGE_COLOURS.get(str(family), _INK)
            axes.step([0, *minutes, end], [0, *best, best.max()], where="post", color=colour, linewidth=1.8)
            handles.append(Line2D([], [], color=colour, label=family))
        axes.legend(handles=handles, loc="lower right")
        _percent_axis(axes.yaxis)
        axes.set(xlabel="minutes of search", ylabel="best validation top-1 so far")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return svg()


def importance_svg(shares: pd.DataFrame, *, family: str, title: str) -> str:
    """Draw one family's shares of variance as bars, the largest on top; rows as from trials.importance."""
    shown = shares.head(12).iloc[::-1]
    height = 0.9 + 0.28 * len(shown)
    with _picture(title, "Share of the differences in top-1 that each value explains.", {}, height=height) as (
        axes,
        svg,
    ):
        bars = axes.barh(shown["hyper"], shown["importance"], color=_PAGE_COLOURS.get(family, _INK), height=0.62)
        axes.bar_label(bars, [f"{share:.0%}" for share in shown["importance"]], padding=3, color=_INK)
        _percent_axis(axes.xaxis)
        axes.set_xlim(0, min(1.0, shown["importance"].max() * 1.15 + 0.02))
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of variance explained")
    return svg()


def speed_svg(points: pd.DataFrame, *, title: str) -> str:
    """Draw top-1 against measured end-to-end images a second, those of the Pareto front ringed and joined.

    `points` has columns trial_id, family, val_top1, speed and on_front.
    """
    tips = {row["trial_id"]: row["tip"] for row in points.to_dict("records")}
    with _picture(title, "Further up is more accurate, further right faster.", tips) as (axes, svg):
        front = points[points["on_front"]].sort_values("speed")
        axes.plot(front["speed"], front["val_top1"], color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        for row in points.to_dict("records"):
            colour = _PAGE_COLOURS.get(row["family"], _SOFT)
            edge = {"markeredgecolor": _INK, "markeredgewidth": 1.6} if row["on_front"] else {"markeredgewidth": 0}
            gid = f"trial-{row['trial_id']}"
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
            _plain_log_axis(axes.xaxis)
        _percent_axis(axes.yaxis)
        axes.margins(x=0.12, y=0.14)
        axes.set(xlabel="images a second, decode included", ylabel="validation top-1")
    return svg()


def probes_svg(outcomes: pd.DataFrame, *, title: str) -> str:
    """Draw what candidates' trials came to against what rung 0 said of them; rows as from standing.probe_outcomes."""
    with _picture(title, "Each point is a candidate backbone.", {}) as (axes, svg):
        for place, row in enumerate(outcomes.to_dict("records"), start=1):
            point = (row["val_top1"], row["best"])
            if pd.notna(row["best"]):
                axes.plot(*point, "o", color=_PAGE_COLOURS["transfer"], markersize=7)
                axes.annotate(str(place), point, xytext=(0, 7), textcoords="offset points", ha="center")
        for axis in (axes.xaxis, axes.yaxis):
            _percent_axis(axis)
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


def _percent_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%"))


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def _plain_log_axis(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def _picture(
    title: str, description: str, tips: Mapping[str, str], *, height: float = _SIZE[1]
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Give axes to draw on, and a function that gives the SVG once that is done."""
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_SIZE[0], height), layout="constrained")
        buffer = io.StringIO()
        yield figure.subplots(), lambda: _for_page(buffer.getvalue(), title, description, tips)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def _for_page(svg: str, title: str, description: str, tips: Mapping[str, str]) -> str:
    """Make an SVG file an element of a page: its colours the page's, its size the place's, its ids only those used."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    name = re.sub(r"\W+", "-", title.lower())
    view = re.search(r'viewBox="[^"]*"', svg)
    opening = (
        f'<svg {view.group() if view else ""} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'aria-labelledby="{name}-title {name}-text"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>'
    )
    svg = re.sub(r"^<svg[^>]*>", lambda _: opening, svg)
    svg = re.sub(
        r'<g id="trial-(\w+)">',
        lambda found: f'<g class="trial"><title>{escape(tips.get(found[1], found[1]))}</title>',
        svg,
    )
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for variable, colour in _PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()

"""Draws charts with matplotlib as SVG inside a page, in the page's colours by day and by night.

Colours are the CSS variables of base.html.j2; charts with different titles share no id; names are text, never markup or
mathematics; what has a tip shows it when pointed at.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

__all__ = [
    "PAGE_COLOURS",
    "bar_rows",
    "chart",
    "count_axis",
    "interval_rows",
    "percent_axis",
    "plain_log_axis",
    "whole_numbers",
]

PAGE_COLOURS = {
    "ink": "#0a0b01",
    "soft": "#0a0b02",
    "grid": "#0a0b03",
    "first": "#0a0b04",
    "second": "#0a0b05",
    "third": "#0a0b06",
    "bad": "#0a0b07",
    "paper": "#0a0b08",
}
"""Stand-ins that matplotlib draws with, by the CSS variable that replaces each afterwards."""
_INK, _SOFT, _GRID = (PAGE_COLOURS[name] for name in ("ink", "soft", "grid"))
_WIDTH, _HEIGHT = 5.6, 3.7
"""Inches of 72 units: a phone shows the chart at about this size, a wide screen half as large again."""
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: in the page's font, and found by searching
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


def percent_axis(*axes: Any) -> None:
    """Label axes of fractions in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%"))


def whole_numbers(axis: Any) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def count_axis(axis: Any) -> None:
    """Put few ticks, at whole numbers with a comma at each thousand."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def plain_log_axis(axis: Any) -> None:
    """Label a logarithmic axis without powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def chart(
    title: str,
    description: str,
    tips: Mapping[str, str] | None = None,
    *,
    height: float = _HEIGHT,
    width: float = _WIDTH,
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield axes to draw on, and a function that returns the SVG after the block.

    Args:
        title: Names the chart; two charts of a page have different titles.
        description: What it shows, for those who cannot see it.
        tips: What an artist with the gid `tip-NAME` shows when pointed at, by NAME.
        height: In inches of 72 units.
        width: In the same; a chart wider than a phone belongs into an element that scrolls.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        buffer = io.StringIO()
        yield figure.subplots(), lambda: _for_page(buffer.getvalue(), title, description, tips or {})
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})


def bar_rows(axes: Any, names: Sequence[str], values: Sequence[float], texts: Sequence[str], *, colour: str) -> None:
    """Draw a horizontal bar for each name, the first on top, with its text behind it."""
    bars = axes.barh(names, values, color=colour, height=0.62)
    axes.bar_label(bars, texts, padding=3, color=_INK)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def interval_rows(
    axes: Any, names: Sequence[str], points: Sequence[tuple[float, float, float]], colours: Sequence[str]
) -> None:
    """Draw (value, low, high) of each name as a point on a line, the first on top; tips go by the row's index."""
    for y, ((value, low, high), colour) in enumerate(zip(points, colours, strict=True)):
        axes.plot([low, high], [y, y], color=colour, linewidth=1.8, solid_capstyle="butt", zorder=2)
        axes.plot(value, y, "o", color=colour, markersize=6, zorder=3, gid=f"tip-{y}")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    percent_axis(axes.xaxis)


def _for_page(svg: str, title: str, description: str, tips: Mapping[str, str]) -> str:
    """Turn an SVG file into an element of a page, with the page's colours, no fixed size and only ids that are used."""
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
        r'<g id="tip-([\w.-]+)">',
        lambda found: f'<g class="tip"><title>{escape(tips.get(found[1], found[1]))}</title>',
        svg,
    )
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for variable, colour in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()

"""Draws pictures as SVG that stands inside a page and takes the page's colours, by day and by night.

From: what a caller draws on matplotlib's axes. To: one `<svg>` element, with a title and a description.
Invariants: colours are the CSS variables of `core/page.html.j2`; no two pictures of different titles share an id; names
are text, never markup or mathematics; what has a tip says it when pointed at.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any

__all__ = ["PAGE_COLOURS", "percent_axis", "picture", "plain_log_axis", "whole_numbers"]

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
"""What matplotlib is told, by the name of the CSS variable that takes its place afterwards."""
_INK, _SOFT, _GRID = (PAGE_COLOURS[name] for name in ("ink", "soft", "grid"))
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


def percent_axis(axis: Any) -> None:
    """Label an axis of fractions in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%"))


def whole_numbers(axis: Any) -> None:
    """Put ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=10, integer=True))


def plain_log_axis(axis: Any) -> None:
    """Label a logarithmic axis as people write numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def picture(
    title: str, description: str, tips: Mapping[str, str], *, height: float = _SIZE[1], width: float = _SIZE[0]
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Give axes to draw on, and a function that gives the SVG once that is done.

    Args:
        title: Names the picture; two pictures of a page have two titles.
        description: Says what it shows, to who cannot see it.
        tips: What an artist of gid `tip-NAME` says when pointed at, by NAME.
        height: In inches of 72 units.
        width: The same; what is wider than a phone needs a place that scrolls.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
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
        r'<g id="tip-([\w.-]+)">',
        lambda found: f'<g class="tip"><title>{escape(tips.get(found[1], found[1]))}</title>',
        svg,
    )
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for variable, colour in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()

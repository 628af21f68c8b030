"""Draws matplotlib figures as `<svg>` elements of a page, in its light and dark colours.

Colours are the CSS variables of `core/page.html.j2`; ids are unique to a title; names are text, never markup.
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
"""Placeholder colours for matplotlib, by the CSS variable that replaces each."""
_INK, _SOFT, _GRID = (PAGE_COLOURS[name] for name in ("ink", "soft", "grid"))
_SIZE = (5.6, 3.7)
"""Inches of 72 units: the size on a phone; a wide screen shows it half as large again."""
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
    """Label a logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@contextmanager
def picture(
    title: str, description: str, tips: Mapping[str, str], *, height: float = _SIZE[1], width: float = _SIZE[0]
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Yield axes to draw on, and a function that returns the SVG afterwards.

    Args:
        title: The picture's title, unique in its page.
        description: A text for screen readers.
        tips: Tooltips by NAME, of the artists with gid `tip-NAME`.
        height: In inches of 72 units.
        width: In inches of 72 units; above a phone's width it needs a scrolling element.
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
    """Convert an SVG file into an element of a page: with the page's colours, a flexible size and only the used ids."""
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

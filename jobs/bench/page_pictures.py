"""Takes the pictures of a page out of it, each as an SVG file of its own, in the page's colours by day.

From: a page that `core.page` rendered, whose pictures take their colours from CSS variables. To: files named by the
pictures' titles.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from html import unescape
from pathlib import Path

__all__ = ["save_pictures"]

_STYLE = 'style="background: {paper}; font-family: sans-serif"'


def save_pictures(page: Path, folder: Path, titles: Collection[str] | None = None) -> list[Path]:
    """Write each picture of a page, or those with these titles, into a folder; gives the files."""
    text = page.read_text()
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{3,6})", text[text.index(":root") : text.index("@media")]))
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for svg in re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL):
        title = unescape(re.search(r"<title[^>]*>(.*?)</title>", svg, flags=re.DOTALL)[1])  # type: ignore[index]
        if titles is not None and title not in titles:
            continue
        svg = svg.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {_STYLE.format(**colours)} ', 1)
        place = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.svg"
        place.write_text(re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], svg) + "\n")
        written.append(place)
    return written

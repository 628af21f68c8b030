"""Reads an HTML page: its tags and its words."""

from __future__ import annotations

from html.parser import HTMLParser


class Outline(HTMLParser):
    """A page's tags with their attributes, and its words without style and script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words, self._inside = "", ""
        self.feed(page)
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.words += "" if self._inside in ("script", "style") else f"{data} "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Give the attributes of each element with that tag."""
        return [attributes for found, attributes in self.tags if found == tag]

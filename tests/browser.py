"""Opens HTML files in the machine's Chromium, in light or dark mode and any width, and collects errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
_FLAGS += "--disable-component-update --disable-sync".split()


@contextmanager
def start_browser() -> Iterator[Any]:
    """Start a headless Chromium; gives playwright's `Browser`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_FLAGS)
        try:
            yield browser
        finally:
            browser.close()


class OpenedPage:
    """One page in a browser: `tab` is playwright's, `complaints` are errors in the console and network requests."""

    def __init__(self, browser: Any, path: str | Path, *, width: int = 1280, dark: bool = False) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        self.complaints: list[str] = []
        self.tab = self._context.new_page()
        self.tab.on("console", lambda said: self._complain(said) if said.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", self._see)
        self.tab.goto(Path(path).resolve().as_uri())

    def __enter__(self) -> OpenedPage:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    def _complain(self, said: Any) -> None:
        self.complaints.append(said.text)

    def _see(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asked the network for {request.url}")

    def wider_than_the_window(self) -> bool:
        """Say whether the page itself, not a table in it, has to be scrolled sideways."""
        return bool(self.tab.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"))

    def accessibility_faults(self) -> list[str]:
        """Give what axe's rules find: `rule: place` each."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.tab).response["violations"]
        return [f"{rule['id']}: {node['target']} {node['html'][:120]}" for rule in found for node in rule["nodes"]]

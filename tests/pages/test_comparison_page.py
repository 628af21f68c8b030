"""The page of a comparison, in a real browser: foreign text stays text, nothing is out of reach, nothing complains."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import OpenedPage

from carray.comparison.build import compare_runs
from carray.testing.predictions import BROKEN, row, write_predictions

MARKUP = "<img src=x onerror=document.title='taken'> & <b>$x$</b>"
CARS = [f"{make} Number {year} Coupe {year}" for year in range(2000, 2006) for make in ("Audi", "BMW", MARKUP)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compare two runs of 600 images whose labels, paths and keys hold markup."""
    folder = tmp_path_factory.mktemp("page") / "it's <b>mine< & yours"
    a, b = [], []
    for i in range(600):
        label, other = CARS[i % len(CARS)], CARS[(i + (i % 7 == 0)) % len(CARS)]
        a.append(row(f"{MARKUP}{i}", label=label, score=0.3 + (i % 70) / 100, etag="1", bundle_id=MARKUP))
        b.append(row(f"{MARKUP}{i}", label=other, score=0.35 + (i % 65) / 100, etag="1" if i % 50 else "2"))
    b[5] = {"uri": f"{MARKUP}5", **BROKEN}
    sides = [write_predictions(str(folder / name), [rows]) for name, rows in (("a", a), ("b", b))]
    compare_runs(sides[0], sides[1], out=str(folder / "out"))
    return folder / "out" / "index.html"


@pytest.fixture(params=[(1280, False), (1280, True), (390, False), (390, True)], ids=str)
def opened(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[OpenedPage]:
    width, dark = request.param
    with OpenedPage(browser, page, width=width, dark=dark) as found:
        yield found


def test_the_page_is_within_reach_and_complains_of_nothing(opened: OpenedPage) -> None:
    assert opened.accessibility_faults() == []
    assert opened.complaints == []
    assert not opened.wider_than_the_window()
    assert "taken" not in opened.tab.title()
    assert opened.tab.locator("img, b").count() == 0
    assert opened.tab.locator("svg[role=img]").count() == 3
    assert MARKUP in opened.tab.locator("main").inner_text()


def test_the_headline_and_the_tables(browser: Any, page: Path) -> None:
    with OpenedPage(browser, page) as opened:
        tab = opened.tab
        assert re.search(r"A and B give \d+\.\d % of 5\d\d images the same label", tab.locator("h1").inner_text())
        flips = tab.locator("table.sortable").first
        images = [int(text) for text in flips.locator("tbody tr > :nth-child(3)").all_text_contents()]
        assert images == sorted(images, reverse=True) and len(images) == len(CARS)
        flips.locator("th", has_text="Label in A").locator("button").click()
        labels = flips.locator("tbody tr > :first-child").all_text_contents()
        assert labels == sorted(labels, key=str.lower)
        statuses = tab.locator("table").last.inner_text()
        assert "decode_error" in statuses and "599" in statuses


def test_the_page_is_self_contained_and_small(page: Path) -> None:
    text = page.read_text()
    assert len(text.encode()) < 300_000
    assert text.count("<script") == 1
    assert re.findall(r"(?:src|href)=\"(?!#|data:)", text) == []
    assert text.count("<table") == text.count("<caption")

"""The sections that a page includes: what they say, that foreign text stays text, and a browser on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pytest
from browser import OpenedPage

from carray.core import page as pages
from carray.core.store.files import write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation.corruptions import ROBUSTNESS_SCHEMA, VARIANTS, robustness_rows
from carray.evaluation.page import outside_context, robustness_context

MARKUP = "<b>tiles</b> & $drawn$ 'ones'"
PAGE = """{% extends "core/page.html.j2" %}
{% block title %}Under stress{% endblock %}
{% block header %}<h1>Under stress</h1>{% endblock %}
{% block main %}
{% for name, own in sections.items() if own %}<h2 id="{{ name }}">{{ name }}</h2>
{% include "evaluation/sections/" ~ name ~ ".html.j2" %}{% endfor %}
{% endblock %}"""
"""What an evaluation's page has of these sections."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tables of 200 images under corruptions that cost more and more, and of four kinds from outside."""
    folder = tmp_path_factory.mktemp("stress")
    random = np.random.default_rng(0)
    hits_VN = np.array([random.random(200) < max(0.05, 0.8 - 0.03 * i) for i in range(len(VARIANTS))])
    hits_VN[1] = hits_VN[0]
    rows = robustness_rows(hits_VN)
    about = {"split": "test", "drawn": 200, "seed": 0, "unreadable": 2, "images": 200}
    table = table_from_rows(rows, ROBUSTNESS_SCHEMA)
    write_table(table, f"{folder}/robustness.parquet", kind="evaluation robustness", version=1)
    write_json(f"{folder}/robustness.json", about)
    kinds = {
        "photographs": {"images": 60, "scored": 60, "sources": 10, "auroc": 0.91, "auroc_low": 0.8, "auroc_high": 0.97},
        MARKUP: {"images": 40, "scored": 40, "sources": 40, "auroc": 0.987, "auroc_low": 0.95, "auroc_high": 1.0},
        "few": {"images": 4, "scored": 3, "sources": 1, "auroc": 0.875, "auroc_low": None, "auroc_high": None},
        "broken": {"images": 2, "scored": 0, "sources": 0, "auroc": None, "auroc_low": None, "auroc_high": None},
    }
    outside = {"outside": f"/photos/{MARKUP}", "inside_images": 200, "inside_unreadable": 0, "kinds": kinds}
    write_json(f"{folder}/outside.json", about | outside)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Render the sections within a small page of the one look."""
    (folder / "page.html").write_text(_render(_contexts(folder)))
    return folder / "page.html"


def _contexts(folder: Path) -> dict[str, Any]:
    return {"robustness": robustness_context(str(folder)), "outside": outside_context(str(folder))}


def _render(contexts: dict[str, Any]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        source = pages._source
        patch.setattr(pages, "_source", lambda name: PAGE if name == "tests/page.html.j2" else source(name))
        return pages.render_page("tests/page.html.j2", {"sections": contexts})


def _words(text: str) -> str:
    return " ".join(re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]+>", " ", text, flags=re.DOTALL).split())


def test_sections_say_the_figures_of_the_tables(page: Path, folder: Path) -> None:
    words, table = _words(page.read_text()), pd.read_parquet(folder / "robustness.parquet")
    for row in table.to_dict("records"):
        assert f"{100 * row['top1']:.1f} %" in words
    worst = table.iloc[2:].sort_values("drop_points").iloc[-1]
    assert f"Most is lost to {worst['corruption']} ({worst['severity']})" in words
    assert f"{worst['drop_points']:.1f} points less" in words
    clear = int((table["drop_low_points"].iloc[2:] > 0).sum())
    assert 0 < clear < 20 and f"The interval of the drop lies above 0 for {clear} of 20 corruptions" in words
    assert "2 more images could not be read" in words
    assert "(0 lost, 0 gained)" in words
    assert "photographs 0.910 0.800 to 0.970 60 10" in words
    assert "few 0.875 too few sources 3 1" in words
    assert "broken none readable" in words
    assert "It is weakest on few, with an AUROC of 0.875." in words
    assert "3 images could not be read and are in no figure" in words
    assert "claimed for no others" in words


def test_what_was_not_measured_is_not_shown(tmp_path: Path, folder: Path) -> None:
    assert _contexts(tmp_path) == {"robustness": None, "outside": None}
    for name in ("robustness.json", "robustness.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    contexts = _contexts(tmp_path)
    assert contexts["outside"] is None
    rendered = _render(contexts)
    assert 'id="robustness"' in rendered and 'id="outside"' not in rendered


def test_foreign_text_stays_text(page: Path) -> None:
    text = page.read_text()
    assert "<b>" not in text
    assert str(jinja2.filters.escape(MARKUP)) in text


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_finds_no_fault(browser: Any, page: Path, width: int, dark: bool) -> None:
    with OpenedPage(browser, page, width=width, dark=dark) as opened:
        assert opened.tab.locator("svg").count() == 1
        names = opened.tab.locator("tbody th").all_text_contents()
        assert MARKUP in names
        assert opened.accessibility_faults() == []
        assert not opened.wider_than_the_window()
        assert opened.complaints == []

"""The sections that a page includes: what they say, that foreign text stays text, and a browser on them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from browser import OpenedPage

from carray.core import page as pages
from carray.core.storage import write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation.doubt import SCORES_SCHEMA
from carray.evaluation.outliers import OUTLIERS_SCHEMA, SCORES, best_score, logit_scores, measure_outliers
from carray.evaluation.outside import INSIDE, MOST_KINDS
from carray.evaluation.robustness import ROBUSTNESS_SCHEMA, VARIANTS, robustness_rows
from carray.evaluation.stress_figures import _KIND_LINES
from carray.evaluation.stress_page import SCORE_WORDS, stress_context

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
    """Write the tables of 200 images under corruptions that cost more and more, and of three kinds from outside."""
    folder = tmp_path_factory.mktemp("stress")
    random = np.random.default_rng(0)
    hits_VN = np.array([random.random(200) < max(0.05, 0.8 - 0.03 * i) for i in range(len(VARIANTS))])
    hits_VN[1] = hits_VN[0]
    rows = robustness_rows(hits_VN)
    about = {"split": "test", "drawn": 200, "seed": 0, "unreadable": 2, "images": 200}
    _write(folder, "robustness", table_from_rows(rows, ROBUSTNESS_SCHEMA), about)
    kinds = ["photographs"] * 60 + [MARKUP] * 40 + ["few"] * 4
    sources = [f"photo {i // 6}" for i in range(60)] + [f"page {i}" for i in range(40)] + ["one"] * 4
    spread = {INSIDE: 8.0, "photographs": 3.0, MARKUP: 1.0, "few": 4.0}
    scored = []
    for kind, source in [*[(INSIDE, f"car {i}") for i in range(200)], *zip(kinds, sources, strict=True)]:
        logits_NK = random.normal(0, 1, (1, 12)).astype(np.float32)
        logits_NK[0, 0] += spread[kind]
        scores = {name: float(values[0]) for name, values in logit_scores(logits_NK, temperature=0.7).items()}
        scored.append({"uri": source, "kind": kind, "source": source, "status": "ok", **scores, "knn": random.random()})
    frame = pd.DataFrame(scored, columns=SCORES_SCHEMA.names)
    within, beyond = frame[frame["kind"] == INSIDE], frame[frame["kind"] != INSIDE]
    measured = measure_outliers(
        *({name: part[name].to_numpy(np.float64) for name in SCORES} for part in (within, beyond)),
        kinds=kinds,
        sources=sources,
        seed=0,
    )
    about = about | {"outside": f"/photos/{MARKUP}", "inside_images": 200, "inside_unreadable": 0}
    about |= {"kinds": {kind: {"images": 60, "scored": 60} for kind in kinds}, "best": best_score(measured)}
    _write(folder, "outlier_scores", table_from_rows(scored, SCORES_SCHEMA), None)
    _write(folder, "outliers", pa.Table.from_pandas(measured, schema=OUTLIERS_SCHEMA, preserve_index=False), about)
    return folder


def _write(folder: Path, name: str, table: pa.Table, about: dict[str, Any] | None) -> None:
    write_table(table, f"{folder}/{name}.parquet", kind=f"evaluation {name}", version=1)
    if about:
        write_json(f"{folder}/{name}.json", about)


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Render the sections within a small page of the one look."""
    (folder / "page.html").write_text(_render(_contexts(folder)))
    return folder / "page.html"


def _contexts(folder: Path) -> dict[str, Any]:
    return {section: stress_context(str(folder), section) for section in ("robustness", "outliers")}


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
    measured = pd.read_parquet(folder / "outliers.parquet")
    for row in measured.to_dict("records"):
        assert f"{SCORE_WORDS[row['score']]}" in words and f"{row['auroc']:.3f}" in words
    written = measured[measured["score"] == "centred_energy"].sort_values("auroc").iloc[0]
    assert f"it is weakest on {written['kind']}, with an AUROC of {written['auroc']:.3f}" in words
    assert words.count("too few sources") == len(SCORES)
    assert "claimed for no others" in words


def test_what_was_not_measured_is_not_shown(tmp_path: Path, folder: Path) -> None:
    assert _contexts(tmp_path) == {"robustness": None, "outliers": None}
    for name in ("robustness.json", "robustness.parquet"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    contexts = _contexts(tmp_path)
    assert contexts["outliers"] is None
    rendered = _render(contexts)
    assert 'id="robustness"' in rendered and 'id="outliers"' not in rendered


def test_foreign_text_stays_text(page: Path) -> None:
    text = page.read_text()
    assert "<b>" not in text
    assert str(jinja2.filters.escape(MARKUP)) in text


def test_every_kind_there_may_be_has_a_line_of_its_own() -> None:
    lines = [str(sorted(line.items(), key=str)) for line in _KIND_LINES]
    assert len(set(lines)) == len(lines) >= MOST_KINDS


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_finds_no_fault(browser: Any, page: Path, width: int, dark: bool) -> None:
    with OpenedPage(browser, page, width=width, dark=dark) as opened:
        assert opened.tab.locator("svg").count() == 3
        names = opened.tab.locator("tbody th").all_text_contents()
        assert MARKUP in names
        assert opened.accessibility_faults() == []
        assert not opened.wider_than_the_window()
        assert opened.complaints == []

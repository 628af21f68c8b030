"""The report: what it says, that it stands alone, that foreign text stays text, and a browser on it."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import OpenedPage
from outline import Outline

from carray.bundle.bundle_folder import BundleInfo, Certificate
from carray.bundle.scorer import score_columns
from carray.bundle.threshold import choose_on_logits
from carray.core.store.files import read_json, write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation.corruptions import ROBUSTNESS_SCHEMA, VARIANTS, robustness_rows
from carray.evaluation.evaluate import write_evaluation
from carray.evaluation.score import ScoredSplit
from carray.images.pixels import PixelSettings
from carray.pages import evaluation
from carray.pages.evaluation import SECTIONS, write_page

MARKUP = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
CARS = ["Audi A5 Coupe 2012", "Audi A5 Coupe 2008", "Ram 1500 Crew Cab 2012", "Ram 1500 Quad Cab 2012", "$a_b$ unknown"]


def write(
    out: Path,
    *,
    classes: list[str],
    images: int,
    files: Mapping[int, Path] | None = None,
    target: float | None = 0.9,
    spread: float = 3.0,
) -> dict[str, Any]:
    """Write the evaluation of made-up logits; `files` are images that lie somewhere, by their place."""
    random, count = np.random.default_rng(4), len(classes)
    truth_N = random.integers(0, count, images)
    logits_NK = random.normal(size=(images, count)).astype(np.float32)
    logits_NK[np.arange(images), truth_N] += random.normal(spread, 2, images)
    rows, predictions = [], []
    threshold, promised = choose_on_logits(
        logits_NK, truth_N, temperature=1.3, target_precision=target, manifest_fingerprint="other"
    )
    info = BundleInfo(
        **{"version": 1, "bundle_id": "0123456789abcdef", "created_at": "", "classes": classes, "uses_boxes": False},
        **{"pixels": PixelSettings(), "temperature": 1.3, "embedding_size": 8, "accept_threshold": threshold},
        **{"acceptance": promised, "files": {}, "metrics": {}, "parity": {}, "net": {}, "search": {}, "software": {}},
        **{"certificates": {"int8": Certificate(holds=False, reason=f"it loses much {MARKUP}", images=40)}},
    )
    columns = score_columns(logits_NK, info)
    for i in range(images):
        path = (files or {}).get(i, Path(f"/nowhere/{i}.jpg"))
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "none"
        rows.append({"uri": str(path), "escaped": False, "sha256": digest})
        scored = {name: values[i] for name, values in columns.items()}
        predictions.append({"uri": str(path), "truth": classes[truth_N[i]], "status": "ok", **scored})
    reason = {"status": "decode_error", "error_code": "truncated", "error": f"it ends early {MARKUP}"}
    predictions.append({"uri": f"/nowhere/{MARKUP}.jpg", "truth": classes[0], **reason})
    origin = {"version": 2, "bundle_id": info.bundle_id, "accept_threshold": threshold, "split": "test"}
    origin |= {"manifest_fingerprint": "this", "runtime": "fp32", "bundle": "s3://models/it's", "manifest": "m.parquet"}
    other_NK = logits_NK + random.normal(0, 0.3, logits_NK.shape).astype(np.float32)
    split = ScoredSplit([*rows, rows[0]], predictions, truth_N, logits_NK, other_NK)
    return write_evaluation(str(out), origin | {"seen_before": None}, info, split, write_page=write_page)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> Path:
    """Write an evaluation whose class and file names hold markup, of 120 images that are all there."""
    place = tmp_path_factory.mktemp("evaluation")
    files = {}
    for i in range(120):
        files[i] = place / f"{i}<b>&\"'.jpg"
        files[i].write_bytes(make_image(i, width=300, height=200))
    write(place / "out", classes=[*CARS, MARKUP], images=120, files=files, spread=2.0)
    return place / "out"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text()


def words_of(page: str) -> str:
    return Outline(page).words


def test_the_headline_is_a_sentence_with_its_intervals(page: str, folder: Path) -> None:
    metrics, words = read_json(str(folder / "metrics.json")), words_of(page)
    assert f"{100 * metrics['top1']:.1f} % of 120 test images right" in words
    for name in ("top1", "top5"):
        assert f"{100 * metrics[f'{name}_low']:.1f} % to {100 * metrics[f'{name}_high']:.1f} %" in words
    for name in ("macro_f1", "loss"):
        assert f"{metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f}" in words
    assert f"Scores are off by (ECE){100 * metrics['ece']:.1f} %" in words.replace("(ECE) ", "(ECE)")


def test_foreign_text_stays_text(page: str) -> None:
    outline = Outline(page)
    assert len(outline.of("script")) == 1
    assert outline.of("b") == []
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in outline.of("img"))
    assert outline.words.count(MARKUP) > 3
    assert "$a_b$ unknown" in outline.words
    assert all(image["alt"] for image in outline.of("img"))
    assert any("<b>&\"'.jpg: " in str(image["alt"]) for image in outline.of("img"))


def test_the_page_stands_alone(page: str) -> None:
    outline = Outline(page)
    places = [value for _, found in outline.tags for name, value in found.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith(("#", "data:")) for value in places)
    inside = [value for _, found in outline.tags for name, value in found.items() if name == "xlink:href"]
    assert all(value is not None and value.startswith(("#", "data:image/png")) for value in inside)
    ids = Counter(found["id"] for _, found in outline.tags if "id" in found)
    assert [name for name, count in ids.items() if count > 1] == []
    assert {str(link["href"])[1:] for link in outline.of("a")} <= set(ids)
    assert len(outline.of("table")) == len(outline.of("caption"))


def test_every_section_stands_there_and_in_the_navigation(page: str) -> None:
    outline = Outline(page)
    headings = [str(found["id"]) for found in outline.of("h2")]
    unmeasured = {"robustness", "outside"}  # by carray stress, as tests/evaluation/test_stress.py does
    assert headings == [id for id in SECTIONS if id not in unmeasured]
    assert [str(link["href"])[1:] for link in outline.of("a")][: len(headings)] == headings


def test_mistakes_are_shown_with_pictures(page: str, folder: Path) -> None:
    metrics = read_json(str(folder / "metrics.json"))
    mistakes = round(120 * (1 - metrics["top1"]))
    assert f"{mistakes} mistakes in" in words_of(page)
    assert 12 <= len(Outline(page).of("img")) <= 36


def test_the_promise_is_measured_beside_what_was_promised(tmp_path: Path) -> None:
    found = write(tmp_path / "out", classes=CARS, images=600, spread=4.0)["acceptance"]
    words = words_of((tmp_path / "out" / "report.html").read_text())
    assert found["verdict"] == "kept" and "The promise is kept." in words
    assert f"accepts labels with scores from {found['threshold']:.3f} up" in words
    assert f"it accepts {found['accepted']} images" in words
    assert "with 95 % confidence at least 90 % of the accepted are right" in words


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    write(tmp_path / "out", classes=["cat", "dog"], images=9, target=None)
    words = words_of((tmp_path / "out" / "report.html").read_text())
    assert "cannot be told: no class's name tells it" in words
    assert "no threshold was ever chosen for this bundle" in words
    assert "carray calibrate 's3://models/it'\"'\"'s' --manifest" in words
    assert "The image could not be read again: the file does not exist." in words
    assert "1 could not be read and are in no figure" in words
    write(tmp_path / "right", classes=["cat", "dog"], images=9, spread=90)
    assert "No image was mistaken." in words_of((tmp_path / "right" / "report.html").read_text())


@pytest.fixture(scope="module")
def stressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an evaluation with results of `stress`: corruptions that cost more and more, four kinds from outside."""
    folder = tmp_path_factory.mktemp("stressed")
    metrics = write(folder, classes=CARS, images=30)
    random = np.random.default_rng(0)
    hits_VN = np.array([random.random(200) < max(0.05, 0.8 - 0.03 * i) for i in range(len(VARIANTS))])
    hits_VN[1] = hits_VN[0]
    table = table_from_rows(robustness_rows(hits_VN), ROBUSTNESS_SCHEMA)
    write_table(table, f"{folder}/robustness.parquet", kind="evaluation robustness", version=1)
    about = {name: metrics[name] for name in ("bundle_id", "manifest_fingerprint", "split")}
    about |= {"drawn": 200, "seed": 0, "unreadable": 2, "images": 200}
    write_json(f"{folder}/robustness.json", about)
    kinds = {
        "photographs": {"images": 60, "scored": 60, "sources": 10, "auroc": 0.91, "auroc_low": 0.8, "auroc_high": 0.97},
        MARKUP: {"images": 40, "scored": 40, "sources": 40, "auroc": 0.987, "auroc_low": 0.95, "auroc_high": 1.0},
        "few": {"images": 4, "scored": 3, "sources": 1, "auroc": 0.875, "auroc_low": None, "auroc_high": None},
        "broken": {"images": 2, "scored": 0, "sources": 0, "auroc": None, "auroc_low": None, "auroc_high": None},
    }
    outside = {"outside": f"/photos/{MARKUP}", "inside_images": 200, "inside_unreadable": 0, "kinds": kinds}
    write_json(f"{folder}/outside.json", about | outside)
    write_page(str(folder), metrics)
    return folder


def test_what_stress_measured_is_told_with_its_figures(stressed: Path) -> None:
    words, table = words_of((stressed / "report.html").read_text()), pd.read_parquet(stressed / "robustness.parquet")
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


def test_sections_without_anything_to_show_are_left_out(stressed: Path, tmp_path: Path) -> None:
    def shown(folder: Path) -> set[str]:
        write_page(str(folder), read_json(f"{folder}/metrics.json"))
        return {str(found["id"]) for found in Outline((folder / "report.html").read_text()).of("h2")}

    every = set(SECTIONS)
    folder = shutil.copytree(stressed, tmp_path / "copy")
    assert shown(folder) == every
    about = read_json(f"{folder}/robustness.json")
    write_json(f"{folder}/robustness.json", about | {"bundle_id": "another"})
    assert shown(folder) == every - {"robustness"}
    (folder / "outside.json").unlink()
    assert shown(folder) == every - {"robustness", "outside"}


def test_two_hundred_classes_and_eight_thousand_images_make_a_page_under_five_megabytes(
    tmp_path: Path, make_image: Callable[..., bytes]
) -> None:
    noisy = tmp_path / "noisy.jpg"
    noisy.write_bytes(make_image(0, width=640, height=480))
    classes = [f"Make{i // 5} Model{i} Sedan {1990 + i % 30}" for i in range(196)]
    write(tmp_path / "out", classes=classes, images=8000, files=dict.fromkeys(range(8000), noisy), spread=5.0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert len(page.encode()) < 5_000_000
    assert "all stand in confused_pairs.parquet" in page
    assert re.search(r"196 classes, worst first", page)


@pytest.mark.parametrize(("width", "dark"), [(390, True), (1280, False)])
def test_a_browser_shows_markup_as_text_and_complains_of_nothing(
    browser: Any, folder: Path, width: int, dark: bool
) -> None:
    with OpenedPage(browser, folder / "report.html", width=width, dark=dark) as opened:
        tab = opened.tab
        for summary in tab.locator("summary").all():
            summary.click()
        assert "taken" not in tab.title() and tab.locator("script").count() == 1
        assert tab.locator("table.classes tbody th", has_text="onerror").count() == 1
        assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert not opened.wider_than_the_window()
        assert opened.accessibility_faults() == []
        assert opened.complaints == []


def test_the_class_table_is_sorted_by_key(browser: Any, folder: Path) -> None:
    with OpenedPage(browser, folder / "report.html") as opened:
        table = opened.tab.locator("table.classes")

        def column(place: int) -> list[float]:
            texts = table.locator(f"tbody tr > :nth-child({place})").all_text_contents()
            return [float(text.rstrip(" %")) for text in texts]

        assert column(3) == sorted(column(3))
        button = table.get_by_role("button", name="Images")
        button.focus()
        opened.tab.keyboard.press("Enter")
        assert column(2) == sorted(column(2), reverse=True)
        assert opened.tab.locator("#sorted").text_content() == "Sorted by Images, descending."


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_browser_finds_no_fault_in_what_stress_measured(browser: Any, stressed: Path, width: int, dark: bool) -> None:
    with OpenedPage(browser, stressed / "report.html", width=width, dark=dark) as opened:
        assert MARKUP in opened.tab.locator("tbody th").all_text_contents()
        assert opened.accessibility_faults() == []
        assert not opened.wider_than_the_window()
        assert opened.complaints == []


def test_counts_of_mistakes_are_whole_numbers_on_their_axis() -> None:
    svg = evaluation._kinds_svg([{"name": "wrong make", "images": 2}, {"name": "wrong year", "images": 0}])
    assert re.findall(r">(\d\.\d+)<", svg) == []
    assert ">2<" in svg

"""The page of a bucket: what it says, that foreign text stays text, and a browser that filters and sorts."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import OpenedPage
from outline import Outline
from PIL import Image

from carray.__main__ import main
from carray.cli.questions import report
from carray.core.errors import SchemaError, SettingsError
from carray.core.store.files import read_bytes, write_bytes, write_json
from carray.pages.bucket import MOST_THUMBNAILS, THUMBNAILS, write_page
from carray.pages.templates import last_part, readable
from carray.testing.predictions import LABELS, failed, of_files, scored, write_predictions

MARKUP = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & {{ 7 * 7 }}"
"""What a hostile key may hold; a page must show it as it stands."""
NAMES = [
    *("a \"quoted\" 'key'.jpg", "two\nlines.jpg", "Käfer 車.jpg", "100%.jpg", "gpj.\u202excod.jpg"),
    MARKUP.replace("/", "\\") + ".jpg",
]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory, make_image: Callable[..., bytes]) -> tuple[str, str]:
    """Give a finished run over 40 images with odd names and 6 failures of hostile keys: its folder, and the images'."""
    folder = tmp_path_factory.mktemp("bucket")
    names = [f"day-{i % 9}/{i:03d}.jpg" for i in range(34)] + [f"day-9/{name}" for name in NAMES]
    for i, name in enumerate(names):
        write_bytes(f"{folder}/photos/{name}", make_image(i, width=240, height=160))
    rows = of_files([f"{folder}/photos/{name}" for name in names], accept=True)
    rows[3] |= {"label": MARKUP, "top5_labels": [MARKUP, "other"], "make": MARKUP, "accept": False}
    rows += [failed(f"{folder}/photos/day-3/{i}.jpg") for i in range(3)]
    rows += [failed(f"{folder}/photos/day-4/{MARKUP}", "denied", error=MARKUP)] * 2
    rows += [failed(f"{folder}/photos/day-4/x.jpg", "novel_code")]
    path = write_predictions(folder / "predictions", rows, source=f"{folder}/photos", bundle="run/it's a bundle")
    return path, f"{folder}/photos"


@pytest.fixture(scope="module")
def page(bucket: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_page(bucket[0], out=str(out))
    return out


def _words(path: str | Path) -> str:
    return Outline(Path(path).read_text()).words


def test_the_page_says_what_is_there(page: Path, bucket: tuple[str, str]) -> None:
    words = _words(page)
    assert "46 images: 40 scored, 6 failed" in words
    assert "39 of 40 images reach the bundle's threshold" in words
    assert "3 truncated, 2 denied, 1 novel_code" in words
    assert "last image scored 2026-01-02 12:00 UTC" in words
    assert "00000000000000aa" in words and "00000000000000bb" in words
    assert "1 truncated" not in words and "unfinished" not in words
    assert f"carray classify 'run/it'\"'\"'s a bundle' {bucket[1]} --out {bucket[0]} --retry-failed" in words
    assert "mend the rights, then --retry-failed" in words
    assert "10 folders, most failures first" in words
    assert re.search(r"This page holds small copies of \d+ images. Number plates and faces", words)


def test_the_page_stands_alone(page: Path) -> None:
    text = page.read_text()
    tags = Outline(text).tags
    places = [str(value) for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(places) > 20
    assert all(place.startswith(("#", "data:image/jpeg;base64,", "data:,")) for place in places)
    assert len(text.encode()) < 1_000_000
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "49" not in [attributes.get("data-key") for _, attributes in tags]  # {{ 7 * 7 }} was not computed


def test_the_largest_page_stays_below_five_megabytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    photos = [tmp_path / f"{i}.jpg" for i in range(40)]
    for photo in photos:  # coarse noise: its pictures are larger than photographs'
        coarse = Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8))
        coarse.resize((336, 224)).save(photo)
    uris = [str(tmp_path / f"{i % 7}" / f"{i}.jpg") for i in range(1500)]
    for i, uri in enumerate(uris):
        Path(uri).parent.mkdir(exist_ok=True)
        os.link(photos[i % 40], uri)
    path = write_predictions(tmp_path / "p", [scored(uri, score=0.3 + i / 3000) for i, uri in enumerate(uris)])
    outcome = write_page(path, out=str(tmp_path / "report.html"), thumbnails=MOST_THUMBNAILS)
    assert outcome["thumbnails"] > 0.6 * MOST_THUMBNAILS
    each = (tmp_path / "report.html").stat().st_size / outcome["thumbnails"]
    assert each * MOST_THUMBNAILS < 5_000_000


def test_no_thumbnail_reads_no_image(bucket: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr("carray.images.read.fetch_image", read)
    outcome = write_page(bucket[0], out=str(tmp_path / "report.html"), thumbnails=0)
    assert outcome["thumbnails"] == 0 and outcome["cards"] == 45
    words = _words(tmp_path / "report.html")
    assert "No image was read again." in words and "This page holds no photograph" in words
    assert "data:image" not in (tmp_path / "report.html").read_text()


def test_images_that_are_gone_leave_their_reason(tmp_path: Path, image_folder: Path) -> None:
    uris = sorted(map(str, image_folder.rglob("*.jpg")))
    path = write_predictions(tmp_path / "predictions", of_files(uris))
    Path(uris[0]).unlink()
    Path(uris[1]).write_bytes(Path(uris[2]).read_bytes())
    outcome = write_page(path, out=str(tmp_path / "report.html"))
    assert (outcome["cards"], outcome["thumbnails"]) == (12, 11)
    words = _words(tmp_path / "report.html")
    assert "1 image could not be read again" in words and "the file does not exist" in words
    assert "1 has changed since it was scored" in words


def test_an_empty_run_has_an_honest_page(tmp_path: Path) -> None:
    outcome = write_page(write_predictions(tmp_path / "p", []), out=str(tmp_path / "report.html"))
    assert (outcome["images"], outcome["cards"], outcome["mean_score"], outcome["accepted"]) == (0, 0, None, None)
    words = _words(tmp_path / "report.html")
    assert "No images: these predictions hold no row" in words and "Gallery" not in words


def test_a_run_of_failures_has_an_honest_page(tmp_path: Path) -> None:
    rows = [failed(f"/p/{i}.jpg", ("truncated", "denied")[i % 2]) for i in range(12)]
    outcome = write_page(write_predictions(tmp_path / "p", rows), out=str(tmp_path / "report.html"))
    assert (outcome["scored"], outcome["failed"], outcome["cards"]) == (0, 12, 12)
    words = _words(tmp_path / "report.html")
    assert "12 images: none scored, 12 failed" in words and "nothing was scored" in words
    assert "What they show" not in words and "All images lie in one folder, /p/ ." in words


def test_labels_that_are_no_vehicles_have_no_makes(tmp_path: Path) -> None:
    rows = [scored(f"/p/{i}.jpg", label=("cat", "dog")[i % 2], accept=None) for i in range(4)]
    write_page(write_predictions(tmp_path / "p", rows), out=str(tmp_path / "report.html"), thumbnails=0)
    words = _words(tmp_path / "report.html")
    assert "No label names a make: the classes are no vehicles' names." in words
    assert "2 labels, the most frequent first" in words and "the bundle has no threshold" in words
    assert "Model years" not in words and "Bodies" not in words


def test_a_half_written_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_predictions(tmp_path / "p", [scored("/p/1.jpg")], finished=False)
    write_json(f"{path}/_carray/listing.json", {"images": 1200})
    outcome = write_page(path, out=str(tmp_path / "report.html"), thumbnails=0)
    assert outcome["finished"] is False
    words = _words(tmp_path / "report.html")
    assert "1 image so far: 1 scored, none failed" in words
    assert "This run is unfinished: 1 of 1,200 images have a row" in words
    assert capsys.readouterr().err.count("unfinished") == 1


def test_one_file_of_a_run_has_a_page_too(tmp_path: Path) -> None:
    path = write_predictions(tmp_path / "p", [scored("/p/1.jpg")], files=1)
    outcome = write_page(f"{path}/part-000000.parquet", out=str(tmp_path / "report.html"), thumbnails=0)
    assert outcome["finished"] is None
    assert "00000000000000bb" in _words(tmp_path / "report.html")


def test_what_is_no_folder_of_predictions_is_said(tmp_path: Path) -> None:
    out = str(tmp_path / "report.html")
    with pytest.raises(SchemaError, match="holds no Parquet file"):
        write_page(str(tmp_path / "absent"), out=out)
    pd.DataFrame({"uri": ["a"], "status": ["ok"], "score": [0.5]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(SchemaError, match="'etag' is not a column"):
        write_page(str(tmp_path / "other.parquet"), out=out)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("out", "thumbnails", "words"),
    [
        ("{tmp}", 10, "is a folder; give the page's own name, such as {tmp}/report.html"),
        ("{tmp}/new/", 10, "is a folder"),
        ("{tmp}/p/report.html", 10, "lies among the predictions"),
        ("{tmp}/report.html", -1, "thumbnails is -1; allowed are 0"),
        ("{tmp}/report.html", 401, "thumbnails is 401"),
        ("gs://bucket/report.html", 10, "'gs'"),
    ],
)
def test_mistakes_are_sentences(tmp_path: Path, out: str, thumbnails: int, words: str) -> None:
    path = write_predictions(tmp_path / "p", [scored("/p/1.jpg")])
    with pytest.raises(SettingsError) as caught:
        write_page(path, out=out.replace("{tmp}", str(tmp_path)), thumbnails=thumbnails)
    assert words.replace("{tmp}", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_predictions_images_and_page_may_all_lie_on_s3(s3: str, make_image: Callable[..., bytes]) -> None:
    for i in range(8):
        write_bytes(f"{s3}/photos/{i}.jpg", make_image(i))
    path = write_predictions(f"{s3}/predictions", of_files([f"{s3}/photos/{i}.jpg" for i in range(8)]))
    write_bytes(f"{s3}/photos/7.jpg", make_image(99))
    outcome = write_page(path, out=f"{s3}/pages/report.html")
    assert (outcome["thumbnails"], outcome["page"]) == (8, f"{s3}/pages/report.html")
    words = Outline(read_bytes(f"{s3}/pages/report.html").decode()).words
    assert "8 images: 8 scored, none failed" in words and "1 has changed since it was scored" in words


def test_the_command_ends_with_one_line_of_json(
    bucket: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "report.html")
    with pytest.raises(SystemExit) as ended:
        main(["report", bucket[0], "--out", out, "--thumbnails", "10", "--seed", "3"])
    assert not ended.value.code
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    told = json.loads(printed[0])
    assert (told["images"], told["scored"], told["failed"], told["page"]) == (46, 40, 6, out)
    assert 1 <= told["thumbnails"] <= 10


def test_the_commands_default_is_the_reports() -> None:
    assert inspect.signature(report).parameters["thumbnails"].default == THUMBNAILS


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain & <b>bold</b> Käfer 車", "plain & <b>bold</b> Käfer 車"),
        ("two\nlines\tand\0", "two\\nlines\\tand\\x00"),
        ("gpj.\u202ecar.exe", "gpj.\\u202ecar.exe"),  # turns what follows round
        ("zero\u200bwidth\ufeff\u2028", "zero\\u200bwidth\\ufeff\\u2028"),
        (None, ""),
        (float("nan"), ""),
    ],
)
def test_letters_that_do_not_show_are_spelled_out(text: object, shown: str) -> None:
    assert readable(text) == shown


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://b/2026/a.jpg", "a.jpg"),
        ("s3://b/2026/folder/", "folder"),
        ("s3://b/a//b.jpg", "b.jpg"),
        ("/p/two\nlines.jpg", "two\\nlines.jpg"),
        ("no folder.jpg", "no folder.jpg"),
    ],
)
def test_a_keys_own_name(uri: str, name: str) -> None:
    assert last_part(uri) == name


def test_rows_of_nulls_have_cards(tmp_path: Path) -> None:
    nulls = dict.fromkeys(("size_bytes", "width", "height", "etag", "make", "top5_labels", "top5_scores"))
    rows = [failed("/p/x.jpg", "empty", **nulls), scored("/p/y.jpg", **nulls), failed("/p/z.jpg", None, error=None)]
    write_page(write_predictions(tmp_path / "p", rows), out=str(tmp_path / "report.html"), thumbnails=0)
    outline = Outline((tmp_path / "report.html").read_text())
    cards = [found for _, found in outline.tags if found.get("class") == "card"]
    assert [(found["data-key"], bool(found["data-score"])) for found in cards] == [
        *(("/p/y.jpg", True), ("/p/x.jpg", False), ("/p/z.jpg", False))
    ]
    assert "empty, as a job says it" in outline.words and "no code" in outline.words


@pytest.fixture
def opened(browser: Any, page: Path) -> Iterator[OpenedPage]:
    with OpenedPage(browser, page) as opened:
        yield opened


def _shown(opened: OpenedPage) -> list[Any]:
    return opened.tab.locator("#cards > figure:visible").all()


def _values(opened: OpenedPage, name: str) -> list[str]:
    return [str(card.get_attribute(f"data-{name}")) for card in _shown(opened)]


def test_markup_in_keys_and_labels_shows_as_text_and_runs_nothing(opened: OpenedPage) -> None:
    tab = opened.tab
    tab.wait_for_timeout(200)
    assert "taken" not in tab.title() and tab.locator("script").count() == 1
    assert tab.locator("img:not([src^='data:image/jpeg'])").count() == 0
    assert tab.locator("#cards .label", has_text=MARKUP).count() == 1
    hostile = tab.locator("#cards figure", has_text="denied").first
    hostile.locator("summary").click()
    assert MARKUP in hostile.locator("details").inner_text()
    example = tab.locator("table", has_text="without a prediction").locator("tr", has_text="denied").inner_text()
    assert MARKUP in example
    texts = tab.locator("#cards .name").all_text_contents()
    for name in ("a \"quoted\" 'key'.jpg", "two\\nlines.jpg", "Käfer 車.jpg", "gpj.\\u202excod.jpg"):
        assert name in texts
    assert opened.complaints == []


def test_filters_choose_and_say_how_many(opened: OpenedPage) -> None:
    tab, form, told = opened.tab, opened.tab.locator("#filters"), opened.tab.locator("#shown")
    every = len(_shown(opened))
    assert every == 45 and told.text_content() == "45 of 45 shown."
    form.locator("[name=pick]").select_option("failed")
    assert len(_shown(opened)) == 5 and told.text_content() == "5 of 45 shown."
    assert all("failed" in picks.split() for picks in _values(opened, "picks"))
    form.locator("button").click()
    form.locator("[name=make]").select_option("BMW")
    assert set(_values(opened, "make")) == {"BMW"}
    form.locator("[name=low]").fill("0.5")
    form.locator("[name=high]").fill("0.8")
    assert [score for score in _values(opened, "score") if not 0.5 <= float(score) <= 0.8] == []
    assert 0 < len(_shown(opened)) < 12
    form.locator("button").click()
    form.locator("[name=words]").fill("  MINIVAN ")
    assert set(_values(opened, "label")) == {LABELS[2]}
    form.locator("[name=words]").fill("käfer")
    assert len(_shown(opened)) == 1
    form.locator("[name=words]").fill("no such label")
    assert _shown(opened) == [] and told.text_content() == "None fits; reset the filters to see all."
    form.locator("button").click()
    tab.wait_for_function("document.querySelector('#shown').textContent.startsWith('45 of 45')")


def test_cards_are_ordered_by_score_margin_and_key(opened: OpenedPage) -> None:
    order = opened.tab.locator("#filters [name=order]")
    first = _values(opened, "key")
    for name, value, falling in (("score", "score", False), ("score", "-score", True), ("margin", "margin", False)):
        order.select_option(value)
        values = _values(opened, name)
        numbers = [float(text) for text in values if text]
        assert numbers == sorted(numbers, reverse=falling) and len(numbers) == 40
        assert values[-5:] == [""] * 5  # failures, which have none, stand last
    order.select_option("key")
    days = [re.search(r"day-(\d)", key)[1] for key in _values(opened, "key")]  # type: ignore[index]
    assert days == sorted(days)
    order.select_option("")
    assert _values(opened, "key") == first


def test_the_keyboard_is_enough(opened: OpenedPage) -> None:
    tab = opened.tab
    tab.locator("#filters [name=pick]").focus()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Tab")
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.name") == "words"
    tab.keyboard.type("audi")
    chosen = len(_shown(opened))
    assert 0 < chosen < 45
    tab.keyboard.press("Enter")  # sends no form and leaves no page
    assert len(_shown(opened)) == chosen
    tab.locator("#cards figure:visible summary").first.focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#cards details[open]").count() == 1
    assert opened.complaints == []


def test_tables_sort(opened: OpenedPage) -> None:
    table = opened.tab.locator("table", has_text="folders, most failures first")
    names = [text.strip() for text in table.locator("tbody th").all_text_contents()]
    assert names[:2] == ["day-3", "day-4"]
    table.locator("thead button", has_text="Folder").click()
    assert [text.strip() for text in table.locator("tbody th").all_text_contents()] == sorted(names)
    table.locator("thead button", has_text="Mean score").click()
    scores = [float(text) for text in table.locator("tbody td:nth-child(5)").all_text_contents()]
    assert scores == sorted(scores)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_the_page_fits_a_phone_and_everybodys_eyes(browser: Any, page: Path, width: int, dark: bool) -> None:
    with OpenedPage(browser, page, width=width, dark=dark) as opened:
        opened.tab.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")
        assert not opened.wider_than_the_window()
        assert opened.accessibility_faults() == []
        assert opened.complaints == []


def test_pages_of_little_have_no_fault_either(browser: Any, tmp_path: Path) -> None:
    runs = {"nothing": [], "failed": [failed("/p/1.jpg")], "one": [scored("/p/1.jpg", label="cat")]}
    for name, rows in runs.items():
        out = tmp_path / f"{name}.html"
        write_page(write_predictions(tmp_path / name, rows), out=str(out))
        with OpenedPage(browser, out, width=390) as opened:
            assert opened.accessibility_faults() == [] and opened.complaints == []
            assert not opened.wider_than_the_window()

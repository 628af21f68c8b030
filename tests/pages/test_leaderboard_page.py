"""The leaderboard page: what it says, that it stands alone, that foreign text stays text, and a browser on it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from browser import OpenedPage
from outline import Outline
from PIL import Image
from written_runs import FAMILIES, MARKUP, write_probes, write_run

from carray.core.errors import SettingsError
from carray.core.store.files import read_json, write_json
from carray.core.tables import write_table
from carray.pages.leaderboard import write_curves, write_page
from carray.search import run_folder
from carray.search.throughput import _machine, _network_key
from carray.search.train.hyperparameters import read_hyper


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a run of 40 trials whose names and reasons hold markup, with everything that a page can show."""
    folder = tmp_path_factory.mktemp("runs") / "it's <b>mine</b> & $yours$"
    families = json.loads(json.dumps(FAMILIES))
    families["transfer"]["space"]["backbone"].append(MARKUP)
    run = write_run(folder, families=families)
    write_probes(run)
    trials = run_folder.read_trials(run)
    keys = {_network_key(read_hyper(json.loads(hyper))) for hyper in trials["hyper"]}
    networks = {
        key: {"images_per_second": 90.0 + 17 * i, "runtime": "onnxruntime fp32"} for i, key in enumerate(sorted(keys))
    }
    measured = {"machine": _machine(), "measured_at": "2026-11-02T10:00:00+00:00", "images": 48, "networks": networks}
    write_json(f"{run}/throughput.json", measured)
    return run


@pytest.fixture(scope="module")
def page(run: str) -> str:
    return Path(write_page(run)).read_text()


def test_headline_says_who_leads_how_long_it_took_and_what_ended_it(page: str, run: str) -> None:
    trials = run_folder.read_trials(run)
    words = Outline(page).words
    assert f"{trials['trial_id'].iloc[0]} leads with {100 * trials['val_top1'].iloc[0]:.1f} % validation top-1" in words
    assert "search.time_budget_minutes of 60 is used up" in words
    assert "60.0 minutes" in words
    assert "1 dropped" in words and "1 non finite" in words
    assert "no interval: the manifest of this search is not at hand" in words


def test_every_trial_has_a_row_and_who_has_a_result_a_command_that_packs_it(page: str, run: str) -> None:
    trials = run_folder.read_trials(run)
    outline = Outline(page)
    for row in trials.to_dict("records"):
        assert row["trial_id"] in outline.words
        command = f"--trial {row['trial_id']}"
        assert (command in outline.words) == pd.notna(row["val_top1"])
    assert "out of memory: micro-batch halved to 16" in outline.words
    assert "rung 0: over 20.0% below the best candidate" in outline.words


def test_foreign_text_stays_text(page: str, run: str) -> None:
    outline = Outline(page)
    assert len(outline.of("script")) == 1
    assert len(outline.of("img")) == len(outline.of("b")) == 0
    assert f"SettingsError: {MARKUP}" in outline.words
    assert run in outline.words
    # The page's policy lets no script run but its own, should escaping ever fail.
    policy = next(meta["content"] for meta in outline.of("meta") if "http-equiv" in meta)
    assert policy is not None and "default-src 'none'" in policy and "script-src 'sha256-" in policy


def test_the_page_stands_alone_and_is_small(page: str) -> None:
    assert len(page.encode()) < 2_000_000
    outline = Outline(page)
    places = [value for _, attributes in outline.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith(("#", "data:,")) for value in places)
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", page))
    assert page.startswith("<!doctype html>")


def test_pictures_have_titles_tables_have_captions_and_ids_are_unique(page: str) -> None:
    outline = Outline(page)
    ids = Counter(attributes["id"] for _, attributes in outline.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    pictures = outline.of("svg")
    assert len(pictures) == 7  # two families' curves, progress, two families' importance, speed, rung 0
    for picture in pictures:
        assert picture["role"] == "img"
        assert all(name in ids for name in str(picture["aria-labelledby"]).split())
    assert len(outline.of("table")) == len(outline.of("caption")) >= 4
    assert all(heading.get("scope") in ("col", "row") for heading in outline.of("th"))
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", page))
    assert used <= set(ids)


def test_pictures_take_the_pages_colours(page: str) -> None:
    assert "#0a0b0" not in page
    for name in ("ink", "soft", "grid", "first", "second", "bad"):
        assert f"var(--{name})" in page.split("<main>")[1]


def test_rungs_importance_speed_and_rung_0_are_told_in_words_too(page: str) -> None:
    words = Outline(page).words
    assert "Early stopping" in words
    assert "the best 1 in 3 continue" in words
    assert re.search(r"cnn : (learning_rate|width) \d+\.\d %", words)
    assert "The Pareto front, slowest first." in words
    assert re.search(r"correlate by -?\d\.\d\d \(Spearman, \d candidates\)", words)


def test_curves_are_a_picture_whose_best_trial_stands_out(run: str) -> None:
    with Image.open(write_curves(run)) as picture:
        assert picture.format == "PNG" and picture.size == (1200, 480)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or []}
    assert {
        (0x18, 0x64, 0xAB),
        (0xB3, 0x53, 0x0C),
        (0xB3, 0x26, 0x1E),
    } <= colours  # both families, and trials that ended


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=3, epochs=3, families={"cnn": FAMILIES["cnn"]})
    words = Outline(Path(write_page(run)).read_text()).words
    assert "too few trials to tell. 3 have a result, and 2 values varied (learning_rate, width); 6 are needed" in words
    assert f"carray leaderboard {run} --measure" in words
    assert "Rung 0" not in words
    assert "Without a result" not in words


def test_a_search_without_any_result_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=7, epochs=2)
    for path in Path(run, "log").iterdir():
        path.unlink()
    search = read_json(f"{run}/search.json")
    search["configurations"][6] = None  # the searcher had not come to it
    write_json(f"{run}/search.json", search)
    Path(run, "done.json").unlink()
    run_folder.write_tables(run)
    words = Outline(Path(write_page(run)).read_text()).words
    assert "No trial has a result yet" in words
    assert "No epoch was run." in words
    assert "run the same command again to resume" in words


def test_a_training_without_validation_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=1, epochs=3, families={"cnn": FAMILIES["cnn"]})
    for path in Path(run, "log").iterdir():
        entry = read_json(str(path))
        write_json(str(path), entry | {"val_loss": None, "val_top1": None, "val_top5": None})
    run_folder.write_tables(run)
    assert "No trial has a result yet" in Path(write_page(run)).read_text()


def test_the_interval_follows_from_the_validation_images(tmp_path: Path, image_folder: Path) -> None:
    from carray.manifest.prepare import prepare

    manifest = str(tmp_path / "manifest.parquet")
    prepare(str(image_folder), out=manifest)
    run = write_run(tmp_path / "run", trials=2, epochs=2, manifest=manifest)
    words = Outline(Path(write_page(run)).read_text()).words
    assert re.search(r"95 % interval \d+\.\d % to \d+\.\d %, 2 images", words)
    # A manifest that is another one by now counts nothing.
    search = read_json(f"{run}/search.json")
    write_json(f"{run}/search.json", search | {"manifest_fingerprint": "other"})
    assert "no interval" in Path(write_page(run)).read_text()


def test_two_thousand_trials_make_a_page_under_two_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=8, epochs=9)
    trials, epochs = run_folder.read_trials(run), pd.read_parquet(f"{run}/epochs.parquet")
    many = [trials.assign(number=trials["number"] + 8 * i) for i in range(250)]
    table = pd.concat(many, ignore_index=True).sort_values("val_top1", ascending=False)
    table["trial_id"] = [run_folder.trial_id(number) for number in table["number"]]
    log = pd.concat([epochs.assign(number=epochs["number"] + 8 * i) for i in range(250)], ignore_index=True)
    log["trial_id"] = [run_folder.trial_id(number) for number in log["number"]]
    for rows, name, kind, schema in (
        (table, run_folder.TRIALS, "trials", run_folder.TRIALS_SCHEMA),
        (log, run_folder.EPOCHS, "epochs", run_folder.EPOCHS_SCHEMA),
    ):
        written = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
        write_table(written, f"{run}/{name}", kind=kind, version=run_folder.VERSION)
    page = Path(write_page(run)).read_text()
    assert len(page.encode()) < 2_000_000
    assert "1000 more stand in trials.parquet" in page
    assert "the best 150 drawn" in page


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no search.json"):
        write_page(str(tmp_path))


def test_a_browser_sorts_the_table_shows_markup_as_text_and_complains_of_nothing(
    browser: Any, page: str, run: str, tmp_path: Path
) -> None:
    place = tmp_path / "leaderboard.html"
    place.write_text(page)
    with OpenedPage(browser, place, width=390) as opened:
        tab, table = opened.tab, opened.tab.locator("table.sortable")

        def cells(text: str) -> list[str]:
            texts = table.locator(f"tbody tr > :nth-child({headings.index(text) + 1})").all_text_contents()
            return [found.strip() for found in texts]

        def press(text: str) -> None:
            table.locator("thead th").nth(headings.index(text)).locator("button").click()

        headings = [heading.strip() for heading in table.locator("thead th").all_text_contents()]

        first = cells("Status")
        press("Minutes")
        minutes = [float(text) for text in cells("Minutes")]
        assert minutes == sorted(minutes)
        assert table.locator("th", has_text="Minutes").get_attribute("aria-sort") == "ascending"
        press("Minutes")
        assert [float(text) for text in cells("Minutes")] == sorted(minutes, reverse=True)
        press("Status")
        assert cells("Status") == sorted(cells("Status")) != first
        assert tab.locator("#sorted").text_content() == "Sorted by Status, ascending."
        # Falling at the first press, and who has no figure stands last.
        press("Top\u20111")
        top1 = cells("Top\u20111")
        figures = [float(text.rstrip(" %")) for text in top1 if text]
        assert figures == sorted(figures, reverse=True) and top1[-3:] == [""] * 3
        press("Trial")
        assert [int(text.split()[0]) for text in cells("Trial")] == list(range(1, 41))
        assert any(MARKUP in reason for reason in cells("Reason and notes"))
        assert "taken" not in tab.title() and tab.locator("script").count() == 1
        assert not opened.wider_than_the_window()
        assert opened.accessibility_faults() == []
        assert opened.complaints == []

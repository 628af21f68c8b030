"""The leaderboard page: what it says, that it stands alone, that foreign text stays text, and a browser on it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from written_runs import FAMILIES, MARKUP, write_probes, write_run

from carray.core.errors import SettingsError
from carray.core.storage import read_json, write_json
from carray.core.tables import write_table
from carray.trials import format as runs
from carray.trials.hyper import read_hyper
from carray.trials.page import write_page
from carray.trials.throughput import _machine, _network_key

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write a run of 40 trials whose names and reasons hold markup, with everything that a page can show."""
    folder = tmp_path_factory.mktemp("runs") / "it's <b>mine</b> & $yours$"
    families = json.loads(json.dumps(FAMILIES))
    families["transfer"]["space"]["backbone"].append(MARKUP)
    run = write_run(folder, families=families)
    write_probes(run)
    trials = runs.read_trials(run)
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


class Outline(HTMLParser):
    """Collects a page's tags, ids and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.tags if found == tag]


def test_headline_says_who_leads_how_long_it_took_and_what_ended_it(page: str, run: str) -> None:
    trials = runs.read_trials(run)
    words = " ".join(Outline(page).words.split())
    assert f"{trials['trial_id'].iloc[0]} leads with {100 * trials['val_top1'].iloc[0]:.1f} % validation top-1" in words
    assert "search.time_budget_minutes of 60 is used up" in words
    assert "60.0 minutes" in words
    assert "1 dropped" in words and "1 non finite" in words
    assert "no interval: the manifest of this search is not at hand" in words


def test_every_trial_has_a_row_and_who_has_a_result_a_command_that_packs_it(page: str, run: str) -> None:
    trials = runs.read_trials(run)
    outline = Outline(page)
    for row in trials.to_dict("records"):
        assert row["trial_id"] in outline.words
        command = f"--trial {row['trial_id']}"
        assert (command in outline.words) == pd.notna(row["val_top1"])
    assert "out of memory: micro-batch halved to 16" in outline.words
    assert "rung 0: over 20.0% below the best candidate" in outline.words


def test_foreign_text_stays_text(page: str, run: str) -> None:
    outline = Outline(page)
    assert outline.count("script") == 1
    assert outline.count("img") == outline.count("b") == 0
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
    assert outline.count("table") == outline.count("caption") >= 4
    assert all(heading.get("scope") in ("col", "row") for heading in outline.of("th"))
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", page))
    assert used <= set(ids)


def test_pictures_take_the_pages_colours(page: str) -> None:
    assert "#0a0b0" not in page
    for name in ("ink", "soft", "grid", "transfer", "cnn", "bad"):
        assert f"var(--{name})" in page.split("<main>")[1]


def test_rungs_importance_speed_and_rung_0_are_told_in_words_too(page: str) -> None:
    words = " ".join(Outline(page).words.split())
    assert "Who was stopped where" in words
    assert "the best 1 in 3 go on" in words
    assert re.search(r"cnn: (learning_rate|width) \d+\.\d %", words)
    assert "The Pareto front, slowest first." in words
    assert re.search(r"correlate by -?\d\.\d\d \(Spearman, \d candidates\)", words)


def test_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=3, epochs=3, families={"cnn": FAMILIES["cnn"]})
    words = " ".join(Outline(Path(write_page(run)).read_text()).words.split())
    assert (
        "too few trials to tell. 3 came to a result, and 2 values varied (learning_rate, width); 6 are needed" in words
    )
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
    runs.write_tables(run)
    words = " ".join(Outline(Path(write_page(run)).read_text()).words.split())
    assert "No trial has come to a result" in words
    assert "No epoch was run." in words
    assert "repeat the command to go on" in words


def test_a_training_without_validation_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=1, epochs=3, families={"cnn": FAMILIES["cnn"]})
    for path in Path(run, "log").iterdir():
        entry = read_json(str(path))
        write_json(str(path), entry | {"val_loss": None, "val_top1": None, "val_top5": None})
    runs.write_tables(run)
    assert "No trial has come to a result" in Path(write_page(run)).read_text()


def test_the_interval_follows_from_the_validation_images(tmp_path: Path, image_folder: Path) -> None:
    from carray.manifest.build import prepare

    manifest = str(tmp_path / "manifest.parquet")
    prepare(str(image_folder), out=manifest)
    run = write_run(tmp_path / "run", trials=2, epochs=2, manifest=manifest)
    words = " ".join(Outline(Path(write_page(run)).read_text()).words.split())
    assert re.search(r"95 % interval \d+\.\d % to \d+\.\d %, 2 images", words)
    # A manifest that is another one by now counts nothing.
    search = read_json(f"{run}/search.json")
    write_json(f"{run}/search.json", search | {"manifest_fingerprint": "other"})
    assert "no interval" in Path(write_page(run)).read_text()


def test_two_thousand_trials_make_a_page_under_two_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trials=8, epochs=9)
    trials, epochs = runs.read_trials(run), pd.read_parquet(f"{run}/epochs.parquet")
    many = [trials.assign(number=trials["number"] + 8 * i) for i in range(250)]
    table = pd.concat(many, ignore_index=True).sort_values("val_top1", ascending=False)
    table["trial_id"] = [runs.trial_id(number) for number in table["number"]]
    log = pd.concat([epochs.assign(number=epochs["number"] + 8 * i) for i in range(250)], ignore_index=True)
    log["trial_id"] = [runs.trial_id(number) for number in log["number"]]
    for rows, name, kind, schema in (
        (table, runs.TRIALS, "trials", runs.TRIALS_SCHEMA),
        (log, runs.EPOCHS, "epochs", runs.EPOCHS_SCHEMA),
    ):
        written = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
        write_table(written, f"{run}/{name}", kind=kind, version=runs.VERSION)
    page = Path(write_page(run)).read_text()
    assert len(page.encode()) < 2_000_000
    assert "1000 more stand in trials.parquet" in page
    assert "the best 150 drawn" in page


def test_a_folder_that_is_no_run_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no search.json"):
        write_page(str(tmp_path))


WATCHER = """<!doctype html><meta charset="utf-8"><title>waiting</title><body>
<iframe src="leaderboard.html" width="390" height="800"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, table = inside.querySelector("table.sortable");
  const column = text => [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === text);
  const cells = text => [...table.tBodies[0].rows].map(row => row.cells[column(text)].textContent.trim());
  const press = text => table.tHead.rows[0].cells[column(text)].querySelector("button").click();
  const seen = {title: inside.title, scripts: inside.scripts.length, images: inside.images.length};
  seen.first = cells("Status");
  press("Minutes"); seen.minutes = cells("Minutes"); seen.order = table.tHead.rows[0].cells[column("Minutes")].ariaSort;
  press("Minutes"); seen.turned = cells("Minutes");
  press("Status"); seen.status = cells("Status"); seen.said = inside.getElementById("sorted").textContent;
  press("Top\\u20111"); seen.top1 = cells("Top\\u20111");
  press("Trial"); seen.trial = cells("Trial");
  seen.wide = inside.documentElement.scrollWidth;
  seen.reasons = cells("Reason and notes");
  document.body.textContent = JSON.stringify(seen);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="the browser test needs Chromium")
def test_a_browser_sorts_the_table_shows_markup_as_text_and_complains_of_nothing(
    page: str, run: str, tmp_path: Path
) -> None:
    Path(tmp_path, "leaderboard.html").write_text(page)
    Path(tmp_path, "watcher.html").write_text(WATCHER)
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr"
    command = [str(CHROMIUM), *quiet.split(), *more.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", (tmp_path / "watcher.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    seen: dict[str, Any] = json.loads(unescape(done.stdout.split("<body>")[1].split("</body>")[0]))
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    assert "taken" not in seen["title"] and (seen["scripts"], seen["images"]) == (1, 0)
    assert any(MARKUP in reason for reason in seen["reasons"])
    minutes = [float(text) for text in seen["minutes"]]
    assert minutes == sorted(minutes) and seen["order"] == "ascending"
    assert [float(text) for text in seen["turned"]] == sorted(minutes, reverse=True)
    assert seen["status"] == sorted(seen["status"]) != seen["first"]
    assert seen["said"] == "Sorted by Status, ascending."
    # Falling at the first press, and who has no figure stands last.
    figures = [float(text.rstrip(" %")) for text in seen["top1"] if text]
    assert figures == sorted(figures, reverse=True) and seen["top1"][-4:] == [""] * 4
    assert [int(text.split()[0]) for text in seen["trial"]] == list(range(1, 41))
    assert seen["wide"] <= 390

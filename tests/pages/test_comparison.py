"""Comparisons of runs whose every row is known, of two bundles over one manifest, and their page in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import OpenedPage

from carray.__main__ import main
from carray.core.errors import SchemaError, SettingsError
from carray.core.store.files import list_files, read_json, write_bytes
from carray.core.tables import table_metadata
from carray.evaluation.metrics import wilson_interval
from carray.manifest.manifest_file import read_manifest, write_manifest
from carray.pages.comparison import compare_bundles, compare_runs, comparison_text
from carray.testing.predictions import BROKEN, SHARDS, row, write_predictions

AUDI, BMW = "Audi A5 Coupe 2012", "BMW X5 SUV 2007"
MARKUP = "<img src=x onerror=document.title='taken'> & <b>$x$</b>"
CARS = [f"{make} Number {year} Coupe {year}" for year in range(2000, 2006) for make in ("Audi", "BMW", MARKUP)]


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str]:
    """Write two runs: 10 images alike, 3 flips, one failed in B, one of other bytes, one only in each."""
    a = [row(f"same{i}", etag="1", score=0.9) for i in range(10)]
    b = [row(f"same{i}", etag="1", score=0.85) for i in range(10)]
    a += [row(f"flip{i}", score=0.6) for i in range(2)] + [row("back", label=BMW, make="BMW", score=0.95)]
    b += [row(f"flip{i}", label=BMW, score=0.7, etag="x") for i in range(2)] + [row("back", score=0.55)]
    a += [row("fails"), row("changed", etag="1"), row("only a")]
    b += [{"uri": "fails", **BROKEN}, row("changed", etag="2", label=BMW), row("only b"), row("also only b")]
    a, b = ([found | {"bundle_id": name, "runtime": "int8"} for found in side] for side, name in ((a, "aa"), (b, "bb")))
    # In other files and another order: it is the uri that joins.
    a_folder = write_predictions(str(tmp_path / "a"), [a[:5], a[5:]])
    return a_folder, write_predictions(str(tmp_path / "b"), [b[::-1]])


def test_every_image_is_counted_once_where_it_belongs(runs: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    found = compare_runs(*runs, out=out)
    assert found["images"] == {"both": 15, "only_a": 1, "only_b": 2}
    low, high = wilson_interval(10, 13)
    assert found["agreement"] == {"images": 13, "same": 10, "rate": 10 / 13, "low": low, "high": high}
    assert found["agreement_where_a_is_sure"]["images"] == 11
    assert found["agreement_where_a_is_sure"]["same"] == 10
    assert found["agreement_where_b_is_sure"]["images"] == 10
    assert (found["other_bytes"]["images"], found["other_bytes"]["same"]) == (1, 0)
    assert found["a"] == {"path": runs[0], "bundle_id": "aa", "run_id": None, "runtime": "int8"}
    changes = np.array([-0.05] * 10 + [0.1] * 2 + [-0.4])
    assert found["score"]["mean_change"] == pytest.approx(changes.mean(), abs=1e-6)
    spread = 1.959964 * changes.std(ddof=1) / 13**0.5
    assert found["score"]["low"] == pytest.approx(changes.mean() - spread, abs=1e-6)
    assert found["score"]["high"] == pytest.approx(changes.mean() + spread, abs=1e-6)
    assert found["score"]["quantiles"] == {
        **{"0.01": -0.4, "0.05": -0.4, "0.25": -0.05, "0.5": -0.05, "0.75": -0.05, "0.95": 0.1, "0.99": 0.1}
    }
    assert found["labels"] == {"both": 2, "only_a": [], "only_b": []} and found["truth"] is None
    assert read_json(f"{out}/comparison.json") == found


def test_tables_hold_flips_and_shares(runs: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    compare_runs(*runs, out=out)
    flips = pd.read_parquet(f"{out}/flips.parquet")
    assert flips[["label_a", "label_b", "images"]].values.tolist() == [[AUDI, BMW, 2], [BMW, AUDI, 1]]
    assert flips["mean_score_a"].tolist() == pytest.approx([0.6, 0.95])
    classes = pd.read_parquet(f"{out}/classes.parquet").set_index("label")
    assert classes.loc[AUDI, ["images_a", "images_b", "images_both"]].tolist() == [12, 11, 10]
    assert classes.loc[BMW, ["images_a", "images_b", "images_both"]].tolist() == [1, 2, 0]
    assert classes.loc[BMW, "share_change"] == pytest.approx(1 / 13)
    assert classes.loc[BMW, "share_change_low"] < 0 < classes.loc[BMW, "share_change_high"]
    assert table_metadata(f"{out}/flips.parquet")["kind"] == "comparison flips"
    assert {uri.rsplit("/", 1)[1] for uri in list_files(out)} == {
        *("index.html", "comparison.json", "flips.parquet", "classes.parquet")
    }


def test_the_headline_in_words(runs: tuple[str, str]) -> None:
    text = comparison_text(compare_runs(*runs))
    for words in ("76.9 % of 13", "15 in both, 1 only in A, 2 only in B", "1 images changed in between", "0.", "PSI"):
        assert words in text


def test_comparing_again_is_the_same_and_another_is_refused(runs: tuple[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert compare_runs(*runs, out=out) == compare_runs(*runs, out=out)
    with pytest.raises(SettingsError, match="holds the comparison of .*a and .*b; name another folder"):
        compare_runs(*runs[::-1], out=out)


def test_neither_run_is_written_into(runs: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="which is being compared and stays as it is"):
        compare_runs(*runs, out=runs[1])
    third = write_predictions(str(tmp_path / "third"))
    with pytest.raises(SettingsError, match="holds something else, such as"):
        compare_runs(*runs, out=third)
    assert not Path(third, "flips.parquet").exists()


def test_what_cannot_be_compared_is_said(runs: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(runs[0])
    for same in (runs[0], f"{runs[0]}/../a/", str(tmp_path / "link")):
        with pytest.raises(SettingsError, match="A and B are both"):
            compare_runs(runs[0], same)
    far = write_predictions(str(tmp_path / "far"), [[row("far")]])
    with pytest.raises(SchemaError, match=r"a \(16 images\) and .*far \(1 images\) have no uri in common"):
        compare_runs(runs[0], far)
    empty = write_predictions(str(tmp_path / "empty"), [[]])
    with pytest.raises(SchemaError, match=r"empty \(0 images\) have no uri in common"):
        compare_runs(runs[0], empty)
    twice = write_predictions(str(tmp_path / "twice"), [[row("same1"), row("same1", label=BMW)]])
    for pair in ((runs[0], twice), (twice, runs[0])):
        with pytest.raises(SchemaError, match="twice has several rows of one uri, as a run over boxes has"):
            compare_runs(*pair)


def test_nothing_scored_in_both_is_an_honest_page(tmp_path: Path) -> None:
    a = write_predictions(str(tmp_path / "a"), [[row("x"), {"uri": "y", **BROKEN}]])
    b = write_predictions(str(tmp_path / "b"), [[{"uri": "x", **BROKEN}, {"uri": "y", **BROKEN}]])
    found = compare_runs(a, b, out=str(tmp_path / "out"))
    assert found["agreement"]["rate"] is None and found["score"] is None and found["psi"] is None
    assert "nothing to compare" in comparison_text(found)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "no image that A and B both scored" in page and "<svg" not in page
    assert len(pd.read_parquet(tmp_path / "out" / "classes.parquet")) == 0


def test_labels_of_one_side_only_are_named(tmp_path: Path) -> None:
    a = write_predictions(str(tmp_path / "a"), [[row("x", label="Old Car 2000"), row("y")]])
    b = write_predictions(str(tmp_path / "b"), [[row("x", label="New Car 2020"), row("y")]])
    found = compare_runs(a, b, out=str(tmp_path / "out"))
    assert found["labels"] == {"both": 1, "only_a": ["Old Car 2000"], "only_b": ["New Car 2020"]}
    page = (tmp_path / "out" / "index.html").read_text()
    assert "1 label only A gave: Old Car 2000" in page and "bundles of different classes" in page


def test_s3(runs: tuple[str, str], s3: str) -> None:
    there = [f"{s3}/a", f"{s3}/b"]
    for local, remote in zip(runs, there, strict=True):
        for path in [*Path(local).glob("*.parquet"), Path(local, "_carray", "done.json")]:
            write_bytes(f"{remote}/{path.relative_to(local)}", path.read_bytes())
    found, local = compare_runs(*there, out=f"{s3}/out"), compare_runs(*runs)
    assert found["agreement"] == local["agreement"] and found["images"] == local["images"]
    assert read_json(f"{s3}/out/comparison.json") == found
    with pytest.raises(SettingsError, match="A and B are both"):
        compare_runs(there[0], there[0] + "/")


@pytest.fixture(scope="module")
def two_bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Give two tiny bundles that say different things, and a manifest of drawn cars."""
    import torch

    from carray.bundle.pack import pack_bundle
    from carray.images.pixels import PixelSettings
    from carray.manifest.prepare import prepare
    from carray.search.train.hyperparameters import CnnHyper
    from carray.search.train.nets import build_net
    from carray.testing.drawing import DEMO_CLASSES, draw_dataset

    folder = tmp_path_factory.mktemp("two")
    draw_dataset(folder / "images", images_per_class=6)
    prepare(str(folder / "images"), out=str(folder / "m.parquet"))
    classes = sorted(pd.read_parquet(folder / "m.parquet")["label"].unique())
    assert len(classes) == len(DEMO_CLASSES)
    places = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        hyper = CnnHyper(input_size=40, stages=2, width=4)
        places.append(str(folder / f"bundle{seed}"))
        pack_bundle(
            build_net(hyper, class_count=len(classes)),
            places[-1],
            classes=classes,
            pixels=PixelSettings(decode_size=48, input_size=40),
            uses_boxes=False,
            temperature=1.0,
            metrics={},
            net_note=hyper.model_dump(mode="json"),
            search_note={"trial_id": "none"},
            parity_pixels_NHWC=np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8),
        )
    return places[0], places[1], str(folder / "m.parquet")


def test_two_bundles_over_one_manifest_with_truth(two_bundles: tuple[str, str, str], tmp_path: Path) -> None:
    a, b, manifest = two_bundles
    out = str(tmp_path / "out")
    found = compare_bundles(a, b, manifest, out=out, split="train")
    sides = [pd.read_parquet(f"{out}/{side}/predictions.parquet") for side in ("a", "b")]
    right_a, right_b = (side["label"] == side["truth"] for side in sides)
    truth = found["truth"]
    assert truth["images"] == len(sides[0]) == found["agreement"]["images"]
    assert truth["both_right"] == (right_a & right_b).sum()
    assert (truth["only_a_right"], truth["only_b_right"]) == ((right_a & ~right_b).sum(), (right_b & ~right_a).sum())
    assert truth["accuracy_a"] == pytest.approx(right_a.mean())
    assert found["agreement"]["same"] == (sides[0]["label"] == sides[1]["label"]).sum()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Who is right" in page and "McNemar" in page
    assert compare_bundles(a, b, manifest, out=out, split="train") == found
    with pytest.raises(SettingsError, match="same bundle"):
        compare_bundles(a, a, manifest, out=out)


def test_an_evaluation_that_stands_is_joined_with_one_of_shuffled_rows(
    two_bundles: tuple[str, str, str], tmp_path: Path
) -> None:
    a, b, manifest = two_bundles
    table, out = read_manifest(manifest), tmp_path / "out"
    first = compare_bundles(a, b, manifest, out=str(out), split="train")
    shutil.rmtree(out / "b")
    (out / "comparison.json").unlink()
    rows = table.rows.sample(frac=1, random_state=1)
    write_manifest(rows, str(tmp_path / "b.parquet"), classes=table.classes, crop_boxes=table.crop_boxes)
    second = compare_bundles(a, b, str(tmp_path / "b.parquet"), out=str(out), split="train")
    assert second["agreement"] == first["agreement"]
    assert second["truth"] == first["truth"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = 0
        try:
            main(["compare", *arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_command(command: Any, runs: tuple[str, str], tmp_path: Path) -> None:
    code, out, _ = command(*runs, "--out", str(tmp_path / "out"))
    assert code == 0 and (tmp_path / "out" / "index.html").exists()
    assert json.loads(out.splitlines()[-1]) == {"agreement": 10 / 13, "images": 13, "out": str(tmp_path / "out")}
    assert "76.9 %" in command(*runs)[1]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--manifest", "m.parquet"], "--manifest is given without --out"),
        (["--split", "val"], "--split is 'val', but no --manifest is given"),
        (["--runtime", "int8"], "--runtime is 'int8', but no --manifest is given"),
    ],
)
def test_mistakes_are_sentences(command: Any, runs: tuple[str, str], more: list[str], words: str) -> None:
    code, out, err = command(*runs, *more)
    assert (code, out) == (2, "") and words in err.splitlines()[-1]


def test_a_run_compared_with_its_twin_agrees_wholly(tmp_path: Path) -> None:
    twins = [write_predictions(str(tmp_path / name), SHARDS) for name in ("one", "two")]
    found = compare_runs(*twins, out=str(tmp_path / "out"))
    assert found["agreement"]["rate"] == 1.0 and found["psi"] == {"classes": 0.0, "scores": 0.0}
    assert "every compared image has the same label" in (tmp_path / "out" / "index.html").read_text()


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

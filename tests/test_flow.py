"""The whole flow on drawn cars, through the command line: what every stage says of the same images agrees."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import carray
from carray import demo
from carray.__main__ import main
from carray.bundle.bundle_folder import open_bundle
from carray.core.settings import load_settings
from carray.manifest.manifest_file import read_manifest
from carray.queries import accuracy
from carray.search.space import TuneSettings
from carray.testing.drawing import DEMO_CLASSES, draw_broken_files, draw_dataset

EASY_CLASSES = [name for name in DEMO_CLASSES if "Van" in name or "Convertible" in name]
"""Different enough to be told apart after a few seconds of training."""

SETTINGS = """
search: {trials: 1, epochs: 8}
pixels: {decode_size: 48, input_size: 40}
families:
  cnn:
    default: {input_size: 40, stages: 3, width: 12, batch_images: 8, learning_rate: 0.002, label_smoothing: 0}
"""


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> Path:
    """Run prepare, tune, evaluate and classify once, in one folder."""
    folder = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRAY_CACHE", str(folder / "cache"))
        draw_dataset(folder / "images", images_per_class=30)
        for label in set(DEMO_CLASSES) - set(EASY_CLASSES):
            shutil.rmtree(folder / "images" / label)
        draw_broken_files(folder / "images" / EASY_CLASSES[0] / "odd names and bytes")
        (folder / "settings.yaml").write_text(SETTINGS)
        manifest, bundle = f"{folder}/manifest.parquet", f"{folder}/run/bundle"
        main_quietly("prepare", f"{folder}/images", "--out", manifest)
        main_quietly("tune", "--manifest", manifest, "--out", f"{folder}/run", "--config", f"{folder}/settings.yaml")
        main_quietly("evaluate", bundle, "--manifest", manifest, "--split", "train", "--out", f"{folder}/evaluation")
        main_quietly("classify", bundle, manifest, "--split", "train", "--out", f"{folder}/train-predictions")
        main_quietly("classify", bundle, f"{folder}/images", "--out", f"{folder}/predictions")
    return folder


def main_quietly(*arguments: str) -> None:
    """Run a command line; click ends even a good one with SystemExit(0)."""
    try:
        main(list(arguments))
    except SystemExit as end:
        assert end.code in (0, None), arguments


def words_of(*arguments: str) -> str:
    """Run a command line and give all that it says on both streams."""
    both = io.StringIO()
    with contextlib.redirect_stdout(both), contextlib.redirect_stderr(both):
        main_quietly(*arguments)
    return both.getvalue()


def named_paths(words: str, folder: Path) -> set[Path]:
    """Give the paths below a folder that some output names, each of which must be there and hold something."""
    found = {Path(match.rstrip(".,;:)")) for match in re.findall(rf"{re.escape(str(folder))}[^\s\"']*", words)}
    for path in found:
        assert path.exists(), f"{path} is named and is not there"
        assert any(path.iterdir()) if path.is_dir() else path.read_bytes(), f"{path} is empty"
    return found


def test_accuracy_from_the_predictions_is_what_evaluate_says(flow: Path) -> None:
    predictions = carray.read_predictions(str(flow / "train-predictions"))
    truth = read_manifest(str(flow / "manifest.parquet")).of_split("train")
    joined = predictions.merge(truth[["uri", "label"]], on="uri", suffixes=("", "_true"))
    metrics = json.loads((flow / "evaluation" / "metrics.json").read_text())
    assert len(joined) == len(predictions) == metrics["images"]
    assert 0.6 < metrics["top1"] < 1  # it learned, so that the next line compares something
    assert predictions["label"].nunique() > 1
    assert (joined["label"] == joined["label_true"]).mean() == pytest.approx(metrics["top1"])


def test_every_file_is_a_row_and_broken_ones_say_why(flow: Path) -> None:
    files = {str(path) for path in (flow / "images").rglob("*") if path.is_file()}
    rows = pd.read_parquet(flow / "predictions")
    assert set(rows["uri"]) == files
    assert len(rows) == len(files)
    failed = rows[rows["status"] != "ok"]
    assert len(failed) >= 4
    assert failed["error_code"].notna().all()
    assert failed["label"].isna().all()
    assert rows[rows["status"] == "ok"]["score"].between(0, 1).all()


def test_prepare_and_classify_agree_on_what_is_broken(flow: Path) -> None:
    manifest = read_manifest(str(flow / "manifest.parquet")).rows.set_index("uri")
    rows = pd.read_parquet(flow / "predictions").set_index("uri")
    both = manifest.join(rows, how="inner", rsuffix="_scored")
    assert len(both) == len(rows)
    assert (both["error_code"].fillna("") == both["error_code_scored"].fillna("")).all()
    ok = both[both["status"] == "ok"]
    # Made from squares of other sizes, so a bit or two may differ; near duplicates may in four.
    pairs = zip(ok["phash"], ok["phash_scored"], strict=True)
    distances = [((int(one) ^ int(other)) % 2**64).bit_count() for one, other in pairs]
    assert np.median(distances) <= 2
    assert np.mean(np.array(distances) <= 4) > 0.9


def test_bundle_agrees_with_the_search_that_made_it(flow: Path) -> None:
    info = open_bundle(str(flow / "run" / "bundle"))
    winner = pd.read_parquet(flow / "run" / "trials.parquet").iloc[0]
    assert info.metrics["val"]["top1"] == pytest.approx(winner["val_top1"])
    assert info.search["trial_id"] == winner["trial_id"]
    assert info.parity["fp32"]["top1_agreement"] == 1.0
    assert info.search["manifest_fingerprint"] == read_manifest(str(flow / "manifest.parquet")).fingerprint


def test_classifier_in_this_process_agrees_with_the_job(flow: Path) -> None:
    rows = pd.read_parquet(flow / "predictions").query("status == 'ok'").head(5)
    classifier = carray.Classifier.load(str(flow / "run" / "bundle"))
    alone = classifier.predict(list(rows["uri"]))
    assert list(alone["label"]) == list(rows["label"])
    assert np.allclose(alone["score"], rows["score"], atol=1e-5)


def test_query_answers_from_the_same_rows(flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_quietly("query", str(flow / "predictions"), "select count(*) as n from predictions where status = 'ok'")
    ok = (pd.read_parquet(flow / "predictions")["status"] == "ok").sum()
    assert str(ok) in capsys.readouterr().out


def test_a_question_with_labels_is_as_right_as_evaluate_says(flow: Path) -> None:
    found = accuracy(str(flow / "train-predictions"), str(flow / "manifest.parquet")).iloc[0]
    metrics = json.loads((flow / "evaluation" / "metrics.json").read_text())
    assert found["accuracy"] == pytest.approx(metrics["top1"])
    assert found["images"] == metrics["scored"]


def test_two_runs_of_the_same_bundle_agree(flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_quietly("compare", str(flow / "train-predictions"), str(flow / "predictions"), "--out", f"{flow}/comparison")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["agreement"] == 1.0
    assert found["images"] == len(pd.read_parquet(flow / "train-predictions"))
    assert (flow / "comparison" / "index.html").exists()


def test_the_report_counts_what_the_table_holds(flow: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_quietly("report", str(flow / "predictions"), "--out", f"{flow}/report.html")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = pd.read_parquet(flow / "predictions")
    assert found["images"] == len(rows)
    assert found["scored"] == (rows["status"] == "ok").sum()
    assert f"{len(rows):,} images" in (flow / "report.html").read_text()


def test_rows_say_whether_they_are_accepted_by_the_bundle_s_threshold(flow: Path) -> None:
    threshold = open_bundle(str(flow / "run" / "bundle")).accept_threshold
    rows = pd.read_parquet(flow / "predictions").query("status == 'ok'")
    assert rows["accept"].isna().all() if threshold is None else (rows["accept"] == (rows["score"] >= threshold)).all()


@pytest.mark.slow
def test_what_a_command_says_it_wrote_is_there(flow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(flow / "cache"))
    run, manifest = tmp_path / "run", flow / "manifest.parquet"
    shutil.copytree(flow / "run", run)
    again = words_of("tune", "--manifest", str(manifest), "--out", str(run), "--config", str(flow / "settings.yaml"))
    result = json.loads(again.splitlines()[-1])
    assert {Path(result["bundle"]), Path(result["page"])} <= named_paths(result["bundle"] + " " + result["page"], run)
    assert {path.name for path in run.iterdir()} >= {
        "trials.parquet",
        "epochs.parquet",
        "leaderboard.html",
        "curves.png",
    }
    bundle, predictions, data = str(run / "bundle"), str(flow / "predictions"), ["--manifest", str(manifest)]
    of_row = [*data, "--from", str(run)]
    for name, arguments, written in (
        ("leaderboard", [str(run)], "run/leaderboard.html"),
        ("export", [str(run), "--trial", "1", "--out", f"{tmp_path}/exported"], "exported"),
        ("train", [*of_row, "--out", f"{tmp_path}/one", "--set", "epochs=1"], "one/bundle"),
        (
            "train",
            [*of_row, "--out", f"{tmp_path}/refit", "--refit", "--epochs", "1"],
            "refit/bundle",
        ),
        ("quantize", [bundle, *data], "run/bundle"),
        ("calibrate", [bundle, *data, "--target-precision", "0.01"], "run/bundle"),
        ("evaluate", [bundle, *data, "--out", f"{tmp_path}/evaluation"], "evaluation"),
        ("stress", [bundle, *data, "--out", f"{tmp_path}/evaluation", "--images", "4"], "evaluation"),
        ("classify", [bundle, f"{flow}/images", "--out", f"{tmp_path}/again"], "again"),
        ("compact", [predictions, "--to", f"{tmp_path}/compact"], "compact"),
        ("report", [predictions, "--out", f"{tmp_path}/report.html"], "report.html"),
        ("query", [predictions, "by-make", "--out", f"{tmp_path}/answer.csv"], "answer.csv"),
        ("compare", [predictions, f"{tmp_path}/again", "--out", f"{tmp_path}/comparison"], "comparison"),
    ):
        words = words_of(name, *arguments)
        assert tmp_path / written in named_paths(words, tmp_path), (name, words)
        named_paths(words, flow)


def test_the_demo_ends_by_naming_what_is_there(
    tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo itself, with fewer images and one short trial."""
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "IMAGES_PER_CLASS", 8)
    monkeypatch.setattr(demo, "BUCKET_IMAGES_PER_CLASS", 2)
    settings = load_settings(TuneSettings, start=yaml.safe_load(SETTINGS), overrides=["search.epochs=1"])
    monkeypatch.setattr(demo, "_search_settings", lambda: settings)
    words = words_of("demo", "--out", str(tmp_path / "demo"))
    places = words[words.index("Everything lies here:") :]
    named = {str(path.relative_to(tmp_path / "demo")) for path in named_paths(places, tmp_path / "demo")}
    assert named >= {"run/leaderboard.html", "run/bundle", "evaluation/report.html", "predictions", "report.html"}
    named_paths(words, tmp_path)

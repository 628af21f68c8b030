"""The search under a real Ray: tables, the winner, failures that end one trial only, and a repeated command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from carray.core.errors import BudgetError, DataError, SchemaError, SearchError, SettingsError
from carray.core.settings import parse_settings
from carray.core.store.files import join, list_files, read_json, write_json
from carray.core.store.lease import hold_run
from carray.manifest.manifest_file import read_manifest
from carray.manifest.prepare import prepare
from carray.manifest.splits import SplitSettings
from carray.search import run_log
from carray.search.leaderboard import leaderboard_text
from carray.search.run_folder import read_trials
from carray.search.run_log import SearchLog, open_run
from carray.search.search_on_ray import search
from carray.search.space import TuneSettings, draw_trials
from carray.testing.drawing import draw_dataset

CNN = {"input_size": 32, "stages": 2, "width": 8, "batch_images": 16, "learning_rate": 0.003}


BASE = {"search": {"trials": 2, "epochs": 2}, "pixels": {"decode_size": 40, "input_size": 32}}
FAILING = {
    "default": {"backbone": "mobilenetv3_small_050", "weights": "none", "input_size": 32, "last_stages": 30},
    "share": 0.5,
}
"""Is refused before launch; without that check the worker sees that it cannot be, as it would a lost file."""


def small_settings(*, trials: int = 3, space: dict[str, object] | None = None) -> TuneSettings:
    return parse_settings(
        TuneSettings,
        {
            **BASE,
            "search": {"trials": trials, "epochs": 2},
            "families": {"cnn": {"default": CNN, "space": space or {"width": [8, 12]}}},
        },
    )


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, ray_cluster: object) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "search-cache"))


@pytest.fixture(scope="module")
def finished(manifest: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> str:
    run = str(tmp_path_factory.mktemp("search") / "run")
    search(manifest, run=run, settings=small_settings())
    return run


def test_a_second_search_in_one_folder_is_refused_while_the_first_lives(
    finished: str, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carray.core.store.lease.BEAT_SECONDS", 0.1)
    before = {uri: Path(uri).read_bytes() for uri in list_files(join(finished, "log"))}
    with hold_run(finished, what="test"), pytest.raises(BudgetError, match="is working on .*only one driver can"):
        search(manifest, run=finished, settings=small_settings(trials=4))
    assert {uri: Path(uri).read_bytes() for uri in list_files(join(finished, "log"))} == before
    assert len(read_trials(finished)) == 3


def test_tables_hold_every_trial_and_epoch_and_the_best_is_first(finished: str) -> None:
    trials = pd.read_parquet(join(finished, "trials.parquet"))
    epochs = pd.read_parquet(join(finished, "epochs.parquet"))
    assert sorted(trials["number"]) == [0, 1, 2]
    assert trials["val_top1"].is_monotonic_decreasing
    assert trials["epochs"].sum() == len(epochs)
    assert list(epochs["sequence"]) == list(range(1, len(epochs) + 1))
    for row in trials.itertuples():
        own = epochs[epochs["trial_id"] == row.trial_id]
        assert own["val_top1"].max() == row.val_top1
        assert list(own["epoch"]) == list(range(1, row.epochs + 1))


def test_weights_of_every_best_epoch_are_there(finished: str) -> None:
    for trial in read_trials(finished)["trial_id"]:
        assert Path(finished, "trials", trial, "best.safetensors").stat().st_size > 1000


def test_configurations_were_stored_before_launch(finished: str) -> None:
    stored = read_json(join(finished, "search.json"))["configurations"]
    trials = read_trials(finished).sort_values("number")
    assert [json.loads(hyper) for hyper in trials["hyper"]] == stored


def test_leaderboard_names_every_trial(finished: str) -> None:
    trials = read_trials(finished)
    text = leaderboard_text(trials)
    assert all(trial in text for trial in trials["trial_id"])
    assert f"{trials['val_top1'].iloc[0]:.1%}" in text


def test_same_command_again_runs_nothing(finished: str, manifest: str) -> None:
    before = list_files(join(finished, "log"))
    outcome = search(manifest, run=finished, settings=small_settings())
    assert list_files(join(finished, "log")) == before
    assert outcome["trials"] == 3
    assert outcome["ended_by"] is None


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"search": {"trials": 3, "epochs": 2, "seed": 1}}, "its search.seed is 0, not 1; name another --out"),
        ({"search": {"trials": 3, "epochs": 4}}, "its search.epochs is 2, not 4"),
        ({"search": {"trials": 3, "epochs": 2, "scheduler": "none"}}, "its search.scheduler is 'asha', not 'none'"),
        ({"pixels": {"decode_size": 48, "input_size": 32}}, "its pixels.decode_size is 40, not 48"),
        (
            {"families": {"cnn": {"default": CNN, "space": {"width": [8, 16]}}}},
            r"its families.cnn.space.width is \[8, 12\], not \[8, 16\]",
        ),
        ({"search": {"trials": 2, "epochs": 2}}, "holds a search of 3 trials, and search.trials is 2; a search can"),
    ],
)
def test_another_search_on_the_same_run_is_refused(
    finished: str, manifest: str, changed: dict[str, object], sentence: str
) -> None:
    before = read_json(join(finished, "search.json"))
    settings = parse_settings(TuneSettings, {**small_settings().model_dump(), **changed})
    with pytest.raises(SettingsError, match=sentence):
        search(manifest, run=finished, settings=settings)
    assert read_json(join(finished, "search.json")) == before


def test_another_manifest_on_the_same_run_is_refused(finished: str, manifest: str, tmp_path: Path) -> None:
    images = Path(manifest).parent / "images"
    prepare(str(images), out=str(tmp_path / "m.parquet"), split=SplitSettings(val_fraction=0.4))
    with pytest.raises(SettingsError, match="holds another search: its manifest_fingerprint is '[0-9a-f]{16}', not"):
        search(str(tmp_path / "m.parquet"), run=finished, settings=small_settings())


def test_a_moved_manifest_of_the_same_images_goes_on(finished: str, manifest: str, tmp_path: Path) -> None:
    shutil.copy(manifest, tmp_path / "moved.parquet")
    search(str(tmp_path / "moved.parquet"), run=finished, settings=small_settings())
    assert read_json(join(finished, "search.json"))["manifest"] == str(tmp_path / "moved.parquet")


def test_a_run_of_an_older_carray_is_a_sentence(finished: str, manifest: str, tmp_path: Path) -> None:
    write_json(str(tmp_path / "search.json"), {**read_json(join(finished, "search.json")), "version": 1})
    with pytest.raises(SettingsError, match="written by an older carray"):
        search(manifest, run=str(tmp_path), settings=small_settings())


def test_a_failing_and_a_diverging_trial_end_themselves_only(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weight decay of 10 at a learning rate of 10 multiplies weights by -99 a step: they overflow within an epoch."""
    monkeypatch.setattr(run_log, "check_backbones", lambda configurations: None)
    run = str(tmp_path / "run")
    diverging = {"learning_rate": [10.0], "head_learning_rate": [10.0], "weight_decay": [10.0], "batch_images": [2]}
    cnn = {"default": CNN, "space": diverging, "share": 0.8}
    search_settings = {"trials": 3, "epochs": 2}
    settings = {**BASE, "search": search_settings, "families": {"cnn": cnn, "transfer": FAILING}}
    outcome = search(manifest, run=run, settings=parse_settings(TuneSettings, settings))
    trials = read_trials(run).set_index("number")
    assert outcome["by_status"] == {"finished": 1, "failed": 1, "non_finite": 1}
    assert outcome["best_trial"] == "t00000"
    assert trials.index[0] == 0
    assert "last_stages is 30" in trials.loc[1, "reason"]
    assert trials.loc[2, "reason"] == "the loss was not finite in epoch 1"
    assert pd.isna(trials.loc[2, "val_top1"])
    assert not list(Path(run).rglob("last.safetensors"))


def test_a_search_of_which_every_trial_failed_names_the_first_cause(manifest: str, tmp_path: Path) -> None:
    run, settings = str(tmp_path / "run"), small_settings(trials=2)
    open_run(run, read_manifest(manifest), settings, draw_trials(settings))
    for number in (1, 0):
        SearchLog(run, settings.search).fail(number, f"last_stages is 3{number}")
    with pytest.raises(SearchError, match="none of the 2 trials came to a result; the first, t00000, failed: .*is 30"):
        search(manifest, run=run, settings=settings)


def test_unlabelled_manifest_is_refused(tmp_path: Path, image_folder: Path) -> None:
    prepare(str(image_folder / "a"), out=str(tmp_path / "m.parquet"), layout="images")
    with pytest.raises(SchemaError, match=r"no usable image in split 'train' \(0 in train, 0 in val, 0 in test\)"):
        search(str(tmp_path / "m.parquet"), run=str(tmp_path / "run"), settings=small_settings())
    assert not Path(tmp_path, "run").exists()


@pytest.mark.parametrize(
    ("rows", "kind", "sentence"),
    [
        ([("a", "train")] * 3 + [("a", "val")] * 3, SettingsError, "has 1 class; a classifier needs at least two"),
        (
            [("a", ""), ("b", "")],
            SchemaError,
            "in split 'val' .2 in train, 0 in val, 0 in test.; a search",
        ),
        (
            [("a", "test"), ("b", "test")],
            SchemaError,
            "in split 'train' .0 in train, 0 in val, 2 in test",
        ),
    ],
    ids=["one class", "two images", "labels only in test"],
)
def test_images_that_no_search_can_use_are_a_sentence(
    tmp_path: Path, image_folder: Path, rows: list[tuple[str, str]], kind: type[Exception], sentence: str
) -> None:
    images = sorted(image_folder.rglob("*.jpg"))
    lines = [f"{image},{label},{split}" for image, (label, split) in zip(images, rows, strict=False)]
    Path(tmp_path, "t.csv").write_text("\n".join(["uri,label,split", *lines]))
    prepare(str(tmp_path / "t.csv"), out=str(tmp_path / "m.parquet"))
    with pytest.raises(kind, match=sentence):
        search(str(tmp_path / "m.parquet"), run=str(tmp_path / "run"), settings=small_settings())


def test_an_image_that_changed_since_prepare_ends_the_search(tmp_path: Path) -> None:
    draw_dataset(tmp_path / "images", images_per_class=6)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "m.parquet"))
    for image in Path(tmp_path, "images").rglob("*.jpg"):
        image.write_bytes(image.read_bytes() + b" ")
    with pytest.raises(DataError, match="changed since the manifest was prepared; run carray prepare again"):
        search(str(tmp_path / "m.parquet"), run=str(tmp_path / "run"), settings=small_settings())
    assert not Path(tmp_path, "run", "trials").exists()


def test_a_gpu_on_a_cluster_without_one_is_a_sentence(manifest: str, tmp_path: Path) -> None:
    wanted = parse_settings(TuneSettings, {**small_settings().model_dump(), "search": {"gpus_per_trial": 1}})
    with pytest.raises(SettingsError, match="gpus_per_trial is 1, but the cluster has no GPU; lower it"):
        search(manifest, run=str(tmp_path / "run"), settings=wanted)


def test_more_cpus_than_the_machine_has_is_a_sentence(manifest: str, tmp_path: Path) -> None:
    wide = small_settings()
    wide = wide.model_copy(update={"search": wide.search.model_copy(update={"cpus_per_trial": 64})})
    with pytest.raises(SettingsError, match="cpus_per_trial is 64, but the largest machine has 2"):
        search(manifest, run=str(tmp_path / "run"), settings=wide)

"""The search under a real Ray: tables, the winner, failures that end one trial only, and a repeated command."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from carray.core.errors import SchemaError, SearchError, SettingsError
from carray.core.settings import parse_settings
from carray.core.storage import join, list_files, read_json
from carray.drawing import draw_dataset
from carray.manifest.build import prepare
from carray.trials.format import read_trials
from carray.trials.leaderboard import leaderboard_text
from carray.trials.on_ray import search
from carray.trials.space import TuneSettings

CNN = {"input_size": 32, "stages": 2, "width": 8, "batch_images": 16, "learning_rate": 0.003}


BASE = {"search": {"trials": 2, "epochs": 2}, "pixels": {"decode_size": 40, "input_size": 32}}
FAILING = {
    "default": {"backbone": "mobilenetv3_small_050", "weights": "none", "input_size": 32, "last_stages": 30},
    "share": 0.5,
}
"""Passes every check that is made before launch; only the worker, which has the network, sees that it cannot be."""


def small_settings(*, trials: int = 3, space: dict[str, object] | None = None) -> TuneSettings:
    return parse_settings(
        TuneSettings,
        {
            **BASE,
            "search": {"trials": trials, "epochs": 2},
            "families": {"cnn": {"default": CNN, "space": space or {"width": [8, 12]}}},
        },
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=12)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return str(folder / "manifest.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, ray_cluster: object) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "search-cache"))


@pytest.fixture(scope="module")
def finished(manifest: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: object) -> str:
    run = str(tmp_path_factory.mktemp("search") / "run")
    search(manifest, run=run, settings=small_settings())
    return run


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


def test_weights_of_every_best_epoch_and_the_curves_are_there(finished: str) -> None:
    for trial in read_trials(finished)["trial_id"]:
        assert Path(finished, "trials", trial, "best.safetensors").stat().st_size > 1000
    assert Path(finished, "curves.png").read_bytes().startswith(b"\x89PNG")


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


def test_other_settings_on_the_same_run_are_refused(finished: str, manifest: str) -> None:
    with pytest.raises(SettingsError, match="holds another search"):
        search(manifest, run=finished, settings=small_settings(trials=4))


def test_lost_trial_is_run_again_and_the_others_are_kept(manifest: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    search(manifest, run=run, settings=small_settings(trials=2))
    first = read_trials(run).set_index("number")
    Path(run, "done.json").unlink()
    Path(run, "trials", "t00001", "trial.json").unlink()
    search(manifest, run=run, settings=small_settings(trials=2))
    again = read_trials(run).set_index("number")
    assert len(list_files(join(run, "log"))) > first["epochs"].sum()
    # Same configuration and seed, so the lost trial comes out as it did before.
    assert again["val_top1"].to_dict() == pytest.approx(first["val_top1"].to_dict())


def test_one_failing_trial_ends_itself_only(manifest: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    settings = parse_settings(TuneSettings, {**BASE, "families": {"cnn": {"default": CNN}, "transfer": FAILING}})
    outcome = search(manifest, run=run, settings=settings)
    trials = read_trials(run).set_index("family")
    assert outcome["by_status"] == {"finished": 1, "failed": 1}
    assert outcome["best_trial"] == trials.loc["cnn", "trial_id"]
    assert "last_stages is 30" in trials.loc["transfer", "reason"]


def test_all_failing_names_the_first_cause(manifest: str, tmp_path: Path) -> None:
    settings = parse_settings(TuneSettings, {**BASE, "families": {"transfer": FAILING}})
    with pytest.raises(SearchError, match="none of the 2 trials came to a result; the first, t00000, failed: .*is 30"):
        search(manifest, run=str(tmp_path / "run"), settings=settings)


def test_diverging_trial_is_stopped_and_never_best(manifest: str, tmp_path: Path) -> None:
    """Weight decay of 10 at a learning rate of 10 multiplies weights by -99 a step: they overflow within an epoch."""
    run = str(tmp_path / "run")
    diverging = {"learning_rate": [10.0], "head_learning_rate": [10.0], "weight_decay": [10.0], "batch_images": [2]}
    search(manifest, run=run, settings=small_settings(trials=2, space=diverging))
    trials = read_trials(run).set_index("number")
    assert trials.index[0] == 0
    assert trials.loc[1, "status"] == "non_finite"
    assert "not finite" in trials.loc[1, "reason"]
    assert pd.isna(trials.loc[1, "val_top1"])


def test_unlabelled_manifest_is_refused(tmp_path: Path, image_folder: Path) -> None:
    prepare(str(image_folder / "a"), out=str(tmp_path / "m.parquet"), layout="images")
    with pytest.raises(SchemaError, match="no usable image in split 'train'"):
        search(str(tmp_path / "m.parquet"), run=str(tmp_path / "run"), settings=small_settings())


def test_more_cpus_than_the_machine_has_is_a_sentence(manifest: str, tmp_path: Path) -> None:
    wide = small_settings()
    wide = wide.model_copy(update={"search": wide.search.model_copy(update={"cpus_per_trial": 64})})
    with pytest.raises(SettingsError, match="cpus_per_trial is 64, but the largest machine has 2"):
        search(manifest, run=str(tmp_path / "run"), settings=wide)


def test_search_to_a_bucket(manifest: str, s3: str) -> None:
    outcome = search(manifest, run=f"{s3}/run", settings=small_settings(trials=1))
    assert outcome["best_trial"] == "t00000"
    assert len(read_trials(f"{s3}/run")) == 1

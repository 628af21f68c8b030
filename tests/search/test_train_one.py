"""One training without a search: its recipe, its run, and that an interruption changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from carray.core.errors import BudgetError, SearchError, SettingsError
from carray.core.settings import parse_settings
from carray.core.store.files import join, list_files, read_json
from carray.core.store.lease import hold_run
from carray.search.run_folder import read_log, read_trials, trial_id
from carray.search.run_log import SearchLog
from carray.search.train.fit import Fit
from carray.search.train.hyperparameters import CnnHyper
from carray.search.train_one import TrainSettings, read_settings, settings_of_row, train

CNN = {"family": "cnn", "input_size": 32, "stages": 2, "width": 8, "batch_images": 16, "learning_rate": 0.003}
FIGURES = ["epoch", "train_loss", "val_loss", "val_top1", "val_top5", "learning_rate"]


def recipe(*, epochs: int = 3, seed: int = 0, **changes: object) -> TrainSettings:
    values = {
        "hyper": {**CNN, **changes},
        "epochs": epochs,
        "seed": seed,
        "pixels": {"decode_size": 40, "input_size": 32},
    }
    return parse_settings(TrainSettings, values)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "train-cache"))


@pytest.fixture(scope="module")
def trained(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = str(tmp_path_factory.mktemp("train") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "train-cache"))
        train(manifest, run=run, settings=recipe())
    return run


def figures(run: str) -> list[dict[str, Any]]:
    return [{name: entry[name] for name in FIGURES} for entry in read_log(run)]


def test_a_training_leaves_a_run_of_one_trial(trained: str) -> None:
    trials = read_trials(trained)
    epochs = pd.read_parquet(join(trained, "epochs.parquet"))
    assert list(trials["status"]) == ["finished"]
    assert list(epochs["epoch"]) == [1, 2, 3]
    assert trials["val_top1"].iloc[0] == epochs["val_top1"].max()
    assert read_json(join(trained, "done.json"))["val_top1"] == trials["val_top1"].iloc[0]
    assert not Path(trained, "trials", trial_id(0), "last.safetensors").exists()


def test_best_weights_are_those_of_the_best_epoch(trained: str) -> None:
    from safetensors import safe_open

    best = read_trials(trained).iloc[0]
    with safe_open(Path(trained, "trials", trial_id(0), "best.safetensors"), framework="np") as file:
        assert int(file.metadata()["epoch"]) == best["best_epoch"]
        assert float(file.metadata()["val_top1"]) == best["val_top1"]


def test_same_command_again_trains_nothing(trained: str, manifest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fit, "run_epoch", lambda self: 1 / 0)
    before = list_files(join(trained, "log"))
    assert train(manifest, run=trained, settings=recipe())["epochs"] == 3
    assert list_files(join(trained, "log")) == before


@pytest.mark.parametrize(
    ("owner", "name", "left"),
    [(Fit, "run_epoch", [2, 3]), (SearchLog, "add", [3])],
    ids=["in an epoch", "before it is logged"],
)
def test_an_interruption_changes_nothing_and_repeats_no_whole_epoch(
    trained: str,
    manifest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    name: str,
    left: list[int],
) -> None:
    run = str(tmp_path / "run")
    whole, calls = getattr(owner, name), []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(manifest, run=run, settings=recipe())
    assert len(read_log(run)) == 1
    run_epoch, begun = Fit.run_epoch, []
    monkeypatch.setattr(Fit, "run_epoch", lambda fit: begun.append(fit.epoch + 1) or run_epoch(fit))
    train(manifest, run=run, settings=recipe())
    assert begun == left
    assert figures(run) == figures(trained)
    assert read_trials(run)["best_epoch"].iloc[0] == read_trials(trained)["best_epoch"].iloc[0]


def test_a_second_training_in_one_folder_is_refused_while_the_first_lives(
    trained: str, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carray.core.store.lease.BEAT_SECONDS", 0.1)
    with hold_run(trained, what="test"), pytest.raises(BudgetError, match="is working on .*only one driver can"):
        train(manifest, run=trained, settings=recipe())
    assert train(manifest, run=trained, settings=recipe())["epochs"] == 3
    assert not Path(trained, "driver.json").exists()


def test_a_damaged_checkpoint_costs_the_epochs_and_is_noted(
    trained: str, manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = str(tmp_path / "run"), Fit.run_epoch

    def two_epochs(fit: Fit) -> Any:
        if fit.epoch == 2:
            raise KeyboardInterrupt
        return whole(fit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fit, "run_epoch", two_epochs)
        train(manifest, run=run, settings=recipe())
    last = Path(run, "trials", trial_id(0), "last.safetensors")
    last.write_bytes(last.read_bytes()[:1000])
    train(manifest, run=run, settings=recipe())
    assert figures(run) == figures(trained)
    assert "cut short" in read_log(run)[2]["note"]


def test_other_settings_on_the_same_folder_are_refused(trained: str, manifest: str) -> None:
    with pytest.raises(SettingsError, match="holds another search: its .*0.003.* not 0.004"):
        train(manifest, run=trained, settings=recipe(learning_rate=0.004))
    with pytest.raises(SettingsError, match="search.epochs is 3, not 4"):
        train(manifest, run=trained, settings=recipe(epochs=4))


def test_a_refit_on_the_folder_of_a_training_is_refused(trained: str, manifest: str) -> None:
    with pytest.raises(SettingsError, match="one on train, not one on train and val, again after t00007 of elsewhere"):
        train(manifest, run=trained, settings=recipe(), refit_of={"run": "elsewhere", "trial_id": "t00007"})


def test_the_folder_of_a_search_is_refused(trained: str, manifest: str, tmp_path: Path) -> None:
    (tmp_path / "search.json").write_bytes(Path(trained, "search.json").read_bytes())
    with pytest.raises(SettingsError, match="holds a search, which carray tune continues"):
        train(manifest, run=str(tmp_path), settings=recipe())


def test_a_diverging_training_is_said_and_has_no_result(manifest: str, tmp_path: Path) -> None:
    """Weight decay of 10 at a learning rate of 10 multiplies weights by -99 a step: they overflow within an epoch."""
    diverging = recipe(learning_rate=10.0, head_learning_rate=10.0, weight_decay=10.0, batch_images=2)
    with pytest.raises(SearchError, match="the loss was not finite in epoch 1"):
        train(manifest, run=str(tmp_path / "run"), settings=diverging)


def test_a_refit_trains_on_validation_images_and_has_no_figures_of_them(
    manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seen = str(tmp_path / "run"), []
    whole = Fit.run_epoch
    monkeypatch.setattr(Fit, "run_epoch", lambda fit: seen.append(fit) or whole(fit))
    outcome = train(manifest, run=run, settings=recipe(epochs=2), refit_of={"run": "x", "trial_id": "t00000"})
    assert outcome["val_top1"] is None
    trials, epochs = read_trials(run), pd.read_parquet(join(run, "epochs.parquet"))
    assert list(trials["status"]) == ["finished"]
    assert trials["val_top1"].isna().all()
    assert epochs[["val_top1", "val_loss"]].isna().all(axis=None)
    assert epochs["train_loss"].notna().all()
    block = seen[0].block
    assert set(np.unique(block.splits_N[seen[0].train_rows_N])) == {0, 1}


def test_a_refit_keeps_its_last_epochs_weights(manifest: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    run = str(tmp_path / "run")
    train(manifest, run=run, settings=recipe(epochs=2), refit_of={"run": "x", "trial_id": "t00000"})
    with safe_open(Path(run, "trials", trial_id(0), "best.safetensors"), framework="np") as file:
        assert file.metadata()["epoch"] == "2"


def test_a_row_is_trained_as_the_trial_was(trained: str, manifest: str, tmp_path: Path) -> None:
    settings, row = settings_of_row(trained, "1")
    assert settings.configuration() == recipe().configuration()
    assert (settings.epochs, settings.seed, settings.pixels) == (3, 0, recipe().pixels)
    assert row["trial_id"] == trial_id(0)
    assert settings_of_row(trained, trial_id(0), overrides=["hyper.width=12"])[0].configuration().width == 12  # type: ignore[union-attr]


@pytest.mark.parametrize("row", ["0", "2", "t00001", "best"])
def test_a_row_that_is_not_there_is_a_sentence(trained: str, row: str) -> None:
    with pytest.raises(SettingsError, match=f"has no row '{row}'; allowed are 1 to 1.*t00000"):
        settings_of_row(trained, row)


def test_without_a_file_the_known_good_default_is_trained() -> None:
    settings = read_settings(overrides=["epochs=2"])
    assert settings.configuration().family == "transfer"
    assert settings.epochs == 2


def test_a_file_of_tune_stands_for_its_first_familys_default(tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text(
        "search: {trials: 9, epochs: 4, seed: 7}\n"
        "pixels: {decode_size: 48, input_size: 40}\n"
        "families: {transfer: {share: 0.2, default: {input_size: 40}},\n"
        "           cnn: {share: 0.8, default: {input_size: 32, width: 12}, space: {width: [8, 12]}}}\n"
    )
    settings = read_settings(str(tmp_path / "tune.yaml"), overrides=["hyper.dropout=0.25"])
    hyper = settings.configuration()
    assert isinstance(hyper, CnnHyper)
    assert (hyper.width, hyper.dropout) == (12, 0.25)
    assert (settings.epochs, settings.seed, settings.pixels.decode_size) == (4, 7, 48)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["hyper.learning_rat=0.1"], "hyper.learning_rat is not a setting; did you mean learning_rate"),
        (["hyper.width=3"], "hyper.width is not a setting"),
        (["hyper.family=cnn", "hyper.width=3"], "hyper.width is 3"),
        (["hyper.family=vit"], "hyper.family is 'vit'; allowed are cnn and transfer"),
        (["hyper.input_size=512", "pixels.decode_size=184"], "input_size is 512, above pixels.decode_size 184"),
        (["search.epochs=3"], "search is not a setting"),
        (["epochs=0"], "epochs is 0"),
    ],
)
def test_an_impossible_recipe_is_a_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        read_settings(overrides=overrides)


def test_configurations_are_stored_as_a_search_would(trained: str) -> None:
    search = read_json(join(trained, "search.json"))
    assert search["configurations"] == [recipe().configuration().model_dump(mode="json")]
    assert json.loads(read_trials(trained)["hyper"].iloc[0]) == search["configurations"][0]

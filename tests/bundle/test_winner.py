"""What RUN/bundle holds: the winner of today, its refit, or the trial that was chosen on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from carray.bundle import build, winner
from carray.bundle.build import pack_winner
from carray.bundle.format import open_bundle, read_bundle_file
from carray.bundle.winner import export_trial, keep_trained, keep_winner, refit
from carray.core.errors import BundleError, SearchError, SettingsError
from carray.core.settings import parse_settings
from carray.core.storage import join, read_json, write_json
from carray.drawing import draw_dataset
from carray.manifest.build import prepare
from carray.manifest.format import read_manifest
from carray.trials.format import read_trials, write_tables, write_trial_end
from carray.trials.recipe import TrainSettings
from carray.trials.train import refit_run, train

CNN = {"family": "cnn", "input_size": 32, "stages": 2, "width": 8, "batch_images": 16, "learning_rate": 0.003}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "winner-cache"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=10)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return str(folder / "manifest.parquet")


@pytest.fixture(scope="module")
def packed(manifest: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two configurations, lay them out as the search of two trials that would have trained them, and pack."""
    folder = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "winner-cache"))
        run = search_of_two(manifest, folder)
        keep_winner(run)
    return Path(run)


@pytest.fixture
def run(packed: Path, tmp_path: Path) -> str:
    """Give a copy of that run that a test may change."""
    return str(shutil.copytree(packed, tmp_path / "run"))


def search_of_two(manifest: str, folder: Path) -> str:
    run = str(folder / "run")
    for number, width in enumerate((8, 12)):
        settings = parse_settings(
            TrainSettings,
            {"hyper": {**CNN, "width": width}, "epochs": 2, "pixels": {"decode_size": 40, "input_size": 32}},
        )
        place = run if number == 0 else str(folder / "other")
        train(manifest, run=place, settings=settings)
    Path(folder, "other", "trials", "t00000").rename(Path(run, "trials", "t00001"))
    Path(run, "training.json").unlink()
    for entry in sorted(Path(folder, "other", "log").iterdir()):
        values = json.loads(entry.read_text())
        values |= {"number": 1, "trial_id": "t00001", "sequence": values["sequence"] + 2}
        write_json(join(run, "log", f"{values['sequence']:08d}.json"), values)
    search, other = read_json(join(run, "search.json")), read_json(str(folder / "other" / "search.json"))
    search["configurations"] += other["configurations"]
    search["settings"]["search"]["trials"] = 2
    write_json(join(run, "search.json"), search)
    write_trial_end(run, 1, status="finished", reason=None)
    write_tables(run)
    return run


def note(bundle: str) -> dict[str, Any]:
    return open_bundle(bundle).search


def test_a_winner_that_is_packed_is_not_packed_again(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = join(run, "bundle")
    best = read_trials(run).iloc[0]
    assert (note(bundle)["trial_id"], note(bundle)["epoch"]) == (best["trial_id"], best["best_epoch"])
    monkeypatch.setattr(winner, "pack_winner", lambda *given, **named: 1 / 0)
    assert keep_winner(run) == bundle


def test_a_better_winner_is_packed_anew_unless_another_trial_was_chosen(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = read_trials(run)["trial_id"]
    pack_winner(run, trial=second)  # as if it had been the best of an earlier, shorter search
    bundle = keep_winner(run)
    assert note(bundle)["trial_id"] == first
    export_trial(run, second)
    assert keep_winner(run) == bundle
    assert (note(bundle)["trial_id"], note(bundle)["chosen"]) == (second, True)
    assert f"keeps {second}, which was exported on purpose" in capsys.readouterr().err
    export_trial(run, first)  # the winner of today, whom the winner of tomorrow may follow
    assert "chosen" not in note(bundle)


def test_a_winner_that_cannot_be_packed_gives_way_to_the_next_best(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = read_trials(run)["trial_id"]
    shutil.rmtree(join(run, "bundle"))
    packed, export_onnx = build._pack_trial, build.export_onnx
    failing = {first}

    def pack(run: str, search: Any, row: Any, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if row["trial_id"] in failing:  # a network that no exporter knows
                patch.setattr(build, "export_onnx", lambda net, pixels: export_onnx(Unknown(net), pixels))
            return packed(run, search, row, *rest)

    monkeypatch.setattr(build, "_pack_trial", pack)
    assert note(keep_winner(run))["trial_id"] == second
    assert f"{first} cannot be packed, so the next best is tried instead: neither of" in capsys.readouterr().err
    with pytest.raises(BundleError, match="neither of torch's exporters"):
        export_trial(run, first)
    failing.add(second)
    shutil.rmtree(join(run, "bundle"))
    with pytest.raises(BundleError, match=f"none of the 2 trials with a result can be packed; the best, {first}"):
        keep_winner(run)


class Unknown(torch.nn.Module):
    """Computes what no file can hold: another sum each time."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, images_BCHW: torch.Tensor) -> Any:
        self.calls += 1
        logits_BK, embedding_BD = self.net(images_BCHW)
        return logits_BK + 10 * self.calls, embedding_BD


def test_export_elsewhere_leaves_the_winner_alone(run: str, tmp_path: Path) -> None:
    before = note(join(run, "bundle"))
    second = read_trials(run)["trial_id"].iloc[1]
    export_trial(run, "2", out=str(tmp_path / "fast"))
    assert note(str(tmp_path / "fast"))["trial_id"] == second
    assert note(join(run, "bundle")) == before


def test_the_threshold_is_chosen_for_the_precision_that_the_search_asks_for(run: str, tmp_path: Path) -> None:
    validation = len(read_manifest(read_json(join(run, "search.json"))["manifest"]).of_split("val"))
    found = open_bundle(join(run, "bundle")).acceptance
    assert found is not None and (found.target_precision, found.split, found.images) == (0.95, "val", validation)
    search = read_json(join(run, "search.json"))
    for target in (0.01, None):
        search["settings"]["search"]["target_precision"] = target
        write_json(join(run, "search.json"), search)
        info = pack_winner(run, to=str(tmp_path / f"for-{target}"))
        assert (info.acceptance and info.acceptance.target_precision) == target
        assert (info.accept_threshold is None) == (target is None)


def test_an_unknown_or_resultless_trial_is_a_sentence(run: str) -> None:
    with pytest.raises(SettingsError, match="has no row 't00009'; allowed are 1 to 2.*t00000, t00001"):
        export_trial(run, "t00009")
    log = sorted(Path(run, "log").iterdir())[-1]
    log.write_text(json.dumps({**json.loads(log.read_text()), "train_loss": None}))
    write_trial_end(run, 1, status="non_finite", reason="the loss was not finite in epoch 2")
    write_tables(run)
    with pytest.raises(SearchError, match="t00001 of .* came to no result .non_finite: the loss was not finite"):
        export_trial(run, "t00001")


def test_a_refit_packs_its_last_epoch_with_the_temperature_before_it(run: str, manifest: str, tmp_path: Path) -> None:
    from safetensors.numpy import load

    before = open_bundle(join(run, "bundle"))
    out = str(tmp_path / "refit")
    bundle = refit(run, "1", manifest=manifest, out=out)["bundle"]
    info = open_bundle(bundle)
    assert info.temperature == pytest.approx(before.temperature)
    assert info.search["refit"] is True
    assert info.search["trial_id"] == before.search["trial_id"]
    assert info.search["refit_splits"] == ["train", "val"]
    splits = read_manifest(manifest).usable["split"]
    assert info.search["refit_images"] == int(splits.isin(["train", "val"]).sum())
    assert before.search["trial_id"] in info.search["temperature_from"]
    assert list(info.metrics) == ["val_before_refit", "val_full_decode"]
    assert info.certificates["int8"].images_seen_in_training
    assert info.acceptance is not None and info.acceptance.before_refit
    assert before.acceptance is not None and not before.acceptance.before_refit
    assert info.accept_threshold == before.accept_threshold
    assert info.acceptance.images == before.acceptance.images == len(read_manifest(manifest).of_split("val"))
    packed = load(read_bundle_file(bundle, info, "weights.safetensors"))
    last = load(Path(out, "trials", "t00000", "best.safetensors").read_bytes())
    old = load(read_bundle_file(join(run, "bundle"), before, "weights.safetensors"))
    assert all(np.array_equal(packed[name], last[name]) for name in last)
    assert not all(np.array_equal(packed[name], old[name]) for name in old)


def test_refit_of_other_images_is_refused(run: str, tmp_path: Path) -> None:
    draw_dataset(tmp_path / "images", images_per_class=6, seed=3)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "m.parquet"))
    with pytest.raises(SettingsError, match="is not the manifest of"):
        refit(run, "1", manifest=str(tmp_path / "m.parquet"), out=str(tmp_path / "refit"))


def test_a_search_that_asks_for_it_refits_its_winner(run: str) -> None:
    search = read_json(join(run, "search.json"))
    search["settings"]["search"] |= {"refit": True, "refit_epochs": 1}
    write_json(join(run, "search.json"), search)
    bundle = keep_winner(run)
    best = read_trials(run)["trial_id"].iloc[0]
    assert note(bundle)["refit"] is True
    assert note(bundle)["trial_id"] == best
    assert note(bundle)["refit_epochs"] == 1
    assert Path(refit_run(run, best, 1), "done.json").exists()
    created = open_bundle(bundle).created_at
    assert open_bundle(keep_winner(run)).created_at == created


def test_a_training_is_packed_once(manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    settings = {"hyper": CNN, "epochs": 1, "pixels": {"decode_size": 40, "input_size": 32}}
    train(manifest, run=run, settings=parse_settings(TrainSettings, settings))
    bundle = keep_trained(run)
    assert note(bundle)["trial_id"] == "t00000"
    monkeypatch.setattr(winner, "pack_winner", lambda *given, **named: 1 / 0)
    assert keep_trained(run) == bundle

"""What RUN/bundle holds: the winner of today, its refit, or the trial that was chosen on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from carray.bundle import certificates, pack, winner
from carray.bundle.bundle_folder import open_bundle, read_bundle_file
from carray.bundle.pack import pack_winner
from carray.bundle.trained_on import mask_trained_on
from carray.bundle.winner import export_trial, keep_trained, keep_winner, refit
from carray.core.errors import BundleError, SearchError, SettingsError
from carray.core.settings import parse_settings
from carray.core.store.files import join, read_json, write_json
from carray.manifest.manifest_file import read_manifest, write_manifest
from carray.manifest.prepare import prepare
from carray.search.run_folder import best_weights, delete_tables, read_trials, write_tables, write_trial_end
from carray.search.train_one import TrainSettings, refit_run, train
from carray.testing.drawing import draw_dataset

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
    packed, export_onnx = pack._pack_trial, pack.export_onnx
    failing = {first}

    def pack_or_fail(run: str, search: Any, row: Any, *rest: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            if row["trial_id"] in failing:  # a network that no exporter knows
                patch.setattr(pack, "export_onnx", lambda net, pixels: export_onnx(Unknown(net), pixels))
            return packed(run, search, row, *rest)

    monkeypatch.setattr(pack, "_pack_trial", pack_or_fail)
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
    with pytest.raises(SettingsError, match="has no row 't00009'; allowed are 1 to 2.*t00000 to t00001"):
        export_trial(run, "t00009")
    for log in sorted(Path(run, "log").iterdir())[-2:]:
        log.write_text(json.dumps({**json.loads(log.read_text()), "train_loss": None}))
    write_trial_end(run, 1, status="non_finite", reason="the loss was not finite in epoch 1")
    write_tables(run)
    with pytest.raises(SearchError, match="t00001 of .* came to no result .non_finite: the loss was not finite"):
        export_trial(run, "t00001")


def test_a_trial_that_diverged_counts_with_its_best_finite_epoch(run: str, tmp_path: Path) -> None:
    before = read_trials(run).set_index("number").loc[1]
    entry = {**json.loads(sorted(Path(run, "log").iterdir())[-1].read_text()), "sequence": 5, "epoch": 3}
    write_json(join(run, "log", "00000005.json"), {**entry, "train_loss": None, "decision": "non_finite"})
    write_trial_end(run, 1, status="non_finite", reason="the loss was not finite in epoch 3")
    write_tables(run)
    after = read_trials(run).set_index("number").loc[1]
    assert (after["status"], after["epochs"]) == ("non_finite", 3)
    assert (after["val_top1"], after["best_epoch"]) == (before["val_top1"], before["best_epoch"])
    export_trial(run, "t00001", out=str(tmp_path / "diverged"))
    assert note(str(tmp_path / "diverged"))["epoch"] == before["best_epoch"]


def test_a_search_that_has_not_ended_can_be_packed(run: str, tmp_path: Path) -> None:
    best = read_trials(run).iloc[0]
    delete_tables(run)
    Path(run, "done.json").unlink()
    export_trial(run, "1", out=str(tmp_path / "so-far"))
    assert note(str(tmp_path / "so-far"))["trial_id"] == best["trial_id"]


def test_weights_of_another_epoch_than_the_rows_are_refused(run: str, tmp_path: Path) -> None:
    row = read_trials(run).iloc[0]
    place = Path(best_weights(run, row["trial_id"]))
    data = place.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["epoch"] = "7"  # as of a second search in this folder
    text = json.dumps(header).encode()
    place.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(BundleError, match=rf"holds the weights of epoch 7, and the table says {row['best_epoch']}"):
        export_trial(run, row["trial_id"], out=str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_a_refit_packs_its_last_epoch_with_the_temperature_before_it(
    run: str, manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.numpy import load

    monkeypatch.setattr(certificates, "CERTIFY_IMAGES_LEAST", 5)
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
    assert list(info.metrics) == ["val_before_refit"]
    found = info.certificates["int8"]
    assert found.before_refit and (found.images, found.images_left_out) == (9, 0)
    assert found.top1_fp32 == pytest.approx(info.metrics["val_before_refit"]["top1"])
    table = read_manifest(manifest)
    for bundle_, trained in ((bundle, ["train", "val"]), (join(run, "bundle"), ["train"])):
        seen_N = mask_trained_on(bundle_, open_bundle(bundle_), table, table.usable)
        assert seen_N is not None and list(seen_N) == list(table.usable["split"].isin(trained))
    assert info.acceptance is not None and info.acceptance.before_refit
    assert before.acceptance is not None and not before.acceptance.before_refit
    assert info.accept_threshold == before.accept_threshold
    assert info.acceptance.images == before.acceptance.images == len(read_manifest(manifest).of_split("val"))
    packed = load(read_bundle_file(bundle, info, "weights.safetensors"))
    last = load(Path(out, "trials", "t00000", "best.safetensors").read_bytes())
    old = load(read_bundle_file(join(run, "bundle"), before, "weights.safetensors"))
    assert all(np.array_equal(packed[name], last[name]) for name in last)
    assert not all(np.array_equal(packed[name], old[name]) for name in old)


def test_export_of_a_refit_packs_the_refit_anew(run: str, manifest: str, tmp_path: Path) -> None:
    out = str(tmp_path / "refit")
    first = open_bundle(refit(run, "1", manifest=manifest, out=out, epochs=1)["bundle"])
    again = export_trial(out, "1", out=str(tmp_path / "again"))
    assert (again.bundle_id, again.search, again.metrics) == (first.bundle_id, first.search, first.metrics)
    Path(out, "done.json").unlink()
    with pytest.raises(SearchError, match="the refit in .* is unfinished"):
        export_trial(out, "1", out=str(tmp_path / "third"))


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


@pytest.fixture
def shuffled(manifest: str, tmp_path: Path) -> str:
    """Give the same manifest with its rows in another order, as a renamed folder or a database gives them."""
    table, uri = read_manifest(manifest), str(tmp_path / "shuffled.parquet")
    rows = table.rows.sample(frac=1, random_state=1)
    write_manifest(rows, uri, classes=table.classes, crop_boxes=table.crop_boxes)
    return uri


@pytest.mark.parametrize("cache", ["shared", "empty"])
def test_another_order_of_rows_gives_the_same_training_and_bundle(
    run: str, shuffled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    if cache == "empty":
        monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    settings = parse_settings(
        TrainSettings,
        {"hyper": {**CNN, "width": 8}, "epochs": 2, "pixels": {"decode_size": 40, "input_size": 32}},
    )
    train(shuffled, run=str(tmp_path / "again"), settings=settings)
    names = ["epoch", "train_loss", "val_loss", "val_top1"]
    epochs, again = (pd.read_parquet(join(place, "epochs.parquet")) for place in (run, str(tmp_path / "again")))
    first = epochs[epochs["trial_id"] == "t00000"].reset_index(drop=True)
    pd.testing.assert_frame_equal(first[names], again[names], check_exact=False)
    before = pack_winner(run, trial="t00000", to=str(tmp_path / "before"))
    after = open_bundle(keep_trained(str(tmp_path / "again")))
    assert after.metrics["val"] == pytest.approx(before.metrics["val"], rel=1e-4)
    assert (after.temperature, after.acceptance) == (pytest.approx(before.temperature, rel=1e-4), before.acceptance)


def test_a_validation_image_that_is_in_train_too_judges_nothing(
    manifest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_manifest(manifest)
    train_rows, val_rows = table.of_split("train"), table.of_split("val")
    doubles = train_rows.iloc[:7].assign(split="val")
    doubles["uri"] = [shutil.copy(uri, tmp_path / f"{i}.jpg") for i, uri in enumerate(doubles["uri"])]
    doubles["uri"] = doubles["uri"].astype(str)
    rows, uri = pd.concat([train_rows, val_rows, doubles], ignore_index=True), str(tmp_path / "m.parquet")
    write_manifest(rows, uri, classes=table.classes, crop_boxes=False)
    settings = {"hyper": CNN, "epochs": 1, "pixels": {"decode_size": 40, "input_size": 32}}
    train(uri, run=str(tmp_path / "run"), settings=parse_settings(TrainSettings, settings))
    info = open_bundle(keep_trained(str(tmp_path / "run")))
    assert info.metrics["val"]["images"] == len(val_rows) + 7
    assert info.acceptance is not None and info.acceptance.images == len(val_rows)
    assert (info.certificates["int8"].images, info.certificates["int8"].images_left_out) == (len(val_rows), 7)
    assert f"7 of {len(val_rows) + 7} validation images are in train, too" in capsys.readouterr().err


def test_a_manifest_that_became_another_is_not_packed_with(run: str, manifest: str, tmp_path: Path) -> None:
    table, search = read_manifest(manifest), read_json(join(run, "search.json"))
    rows = table.rows.assign(label=list(reversed(table.rows["label"])))
    write_manifest(rows, str(tmp_path / "m.parquet"), classes=table.classes, crop_boxes=table.crop_boxes)
    write_json(join(run, "search.json"), {**search, "manifest": str(tmp_path / "m.parquet")})
    with pytest.raises(SettingsError, match="is no longer the manifest that .* was trained on"):
        pack_winner(run)


def test_a_training_is_packed_once(manifest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(tmp_path / "run")
    settings = {"hyper": CNN, "epochs": 1, "pixels": {"decode_size": 40, "input_size": 32}}
    train(manifest, run=run, settings=parse_settings(TrainSettings, settings))
    bundle = keep_trained(run)
    assert note(bundle)["trial_id"] == "t00000"
    monkeypatch.setattr(winner, "pack_winner", lambda *given, **named: 1 / 0)
    assert keep_trained(run) == bundle

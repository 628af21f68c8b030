"""Kept features: the same as the network computes, shared between trials, complete or absent, and bounded in size."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from carray.core.environment import cache_home
from carray.images.pixels import PixelSettings
from carray.search.train.fit import Fit
from carray.search.train.hyperparameters import TransferHyper
from carray.search.train.inputs import Features, FeatureSource, PixelSource
from carray.search.train.nets import Net, build_net, freeze, split_trunk
from carray.tensors.block import Block

PIXELS = PixelSettings(decode_size=40, input_size=32)
HYPER = TransferHyper(
    backbone="mobilenetv3_small_050", weights="none", input_size=32, last_stages=3, batch_images=8, cached_views=2
)


def block(key: str = "") -> Block:
    random = np.random.default_rng(0)
    labels_N = np.arange(24) % 2
    splits_N = np.where(np.arange(24) % 3 < 2, 0, 1).astype(np.int8)
    return Block(random.integers(0, 256, (24, 40, 40, 3), dtype=np.uint8), labels_N.astype(np.int64), splits_N, key)


def network(hyper: TransferHyper = HYPER) -> Net:
    torch.manual_seed(0)
    net = build_net(hyper, class_count=2)
    freeze(net, hyper)
    return net


def features(net: Net, *, key: str = "", hyper: TransferHyper = HYPER) -> Features:
    parts = split_trunk(net, input_size=32)
    assert parts is not None
    return Features(block(key), net, parts[0], hyper, PIXELS, views=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_parts_of_a_trunk_compute_what_it_computes() -> None:
    net = network().eval()
    parts = split_trunk(net, input_size=32)
    assert parts is not None
    lower, upper = parts
    images_BCHW = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(upper(lower(images_BCHW)), net.trunk(images_BCHW), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in lower.parameters())
    assert any(parameter.requires_grad for parameter in upper.parameters())


def test_a_trunk_whose_children_do_not_follow_one_another_is_not_cut() -> None:
    hyper = TransferHyper(backbone="vit_tiny_patch16_224", weights="none", input_size=32, last_stages=2)
    net = build_net(hyper, class_count=2)
    freeze(net, hyper)
    assert split_trunk(net, input_size=32) is None


def test_a_frozen_trunk_is_cut_whole_and_a_free_one_not_at_all() -> None:
    frozen = HYPER.model_copy(update={"train": "head"})
    parts = split_trunk(network(frozen), input_size=32)
    assert parts is not None
    assert list(parts[1].parameters()) == []
    assert split_trunk(network(HYPER.model_copy(update={"train": "all"})), input_size=32) is None


def test_validation_with_kept_features_is_validation_from_pixels() -> None:
    kept = Fit(HYPER, block(), PIXELS, class_count=2, epochs=2, seed=0)
    anew = Fit(HYPER.model_copy(update={"cached_views": 0}), block(), PIXELS, class_count=2, epochs=2, seed=0)
    assert isinstance(kept._source, FeatureSource)
    assert isinstance(anew._source, PixelSource)
    anew.net.load_state_dict(kept.net.state_dict())
    by_features_NK = kept._source.validation_logits(kept.val_rows_N)
    by_pixels_NK = anew._source.validation_logits(anew.val_rows_N)
    assert np.allclose(by_features_NK, by_pixels_NK, atol=1e-4)


def test_a_view_is_the_same_for_every_trial_and_views_differ() -> None:
    rows_B = np.array([0, 1, 4])
    first = features(network(), key="k").of_rows(rows_B, 0)
    other = HYPER.model_copy(update={"learning_rate": 0.5, "dropout": 0.3})
    assert torch.equal(features(network(), key="k", hyper=other).of_rows(rows_B, 0), first)
    assert not torch.equal(features(network(), key="k").of_rows(rows_B, 1), first)
    assert torch.equal(features(network(), key="k").of_rows(rows_B, 2), first), "view 2 of 2 is view 0 again"


def test_rows_of_both_splits_come_in_the_order_asked_for() -> None:
    kept = features(network())
    rows_B = np.array([0, 1, 2, 3, 5, 5])
    together = kept.of_rows(rows_B, 0)
    for position, row in enumerate(rows_B):
        assert torch.equal(together[position], kept.of_rows(np.array([row]), 0)[0])


def test_a_second_trial_reads_what_the_first_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    features(network(), key="k").of_rows(np.array([0]), 0)
    monkeypatch.setattr(Features, "_compute", lambda *_: pytest.fail("computed again"))
    features(network(), key="k").of_rows(np.array([0]), 0)


def test_other_weights_or_other_crops_have_features_of_their_own(own_cache: Path) -> None:
    features(network(), key="k").of_rows(np.array([0]), 0)
    changed = network()
    with torch.no_grad():
        changed.trunk.conv_stem.weight.mul_(2)
    features(changed, key="k").of_rows(np.array([0]), 0)
    features(network(), key="k", hyper=HYPER.model_copy(update={"crop_scale": 0.5})).of_rows(np.array([0]), 0)
    assert len(list((own_cache / "features" / "k").iterdir())) == 3


def test_processes_at_once_compute_each_view_once(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[object] = []
    compute = Features._compute

    def count(self: Features, split: str, view: int | None) -> object:
        computed.append((split, view))
        return compute(self, split, view)

    monkeypatch.setattr(Features, "_compute", count)
    kept = [features(network(), key="k") for _ in range(3)]
    threads = [threading.Thread(target=one.of_rows, args=(np.array([0]), 0)) for one in kept]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == len(set(computed))
    assert ("train", 0) in computed
    assert not list(own_cache.rglob("*.part"))


def test_what_was_not_used_for_longest_goes_first(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = features(network(), key="k")
    kept.of_rows(np.array([0]), 0)
    (first,) = (path for path in own_cache.rglob("train-0000.npy"))
    monkeypatch.setenv("CARRAY_FEATURES_GB", str(first.stat().st_size * 1.5 / 1e9))
    kept.of_rows(np.array([0]), 1)
    assert [path.name for path in own_cache.rglob("train-*.npy")] == ["train-0001.npy"]
    assert cache_home() == own_cache


def test_half_made_files_of_the_dead_go_and_those_of_the_living_count(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = features(network(), key="k")
    kept.of_rows(np.array([0]), 0)
    (first,) = own_cache.rglob("train-0000.npy")
    dead, living = first.with_name("train-0002.77.part"), first.with_name("train-0003.part")
    for path in (dead, living):
        path.write_bytes(bytes(2 * first.stat().st_size))
    monkeypatch.setenv("CARRAY_FEATURES_GB", str(first.stat().st_size * 3.5 / 1e9))
    with FileLock(living.with_name("train-0003.npy.lock")):
        kept.of_rows(np.array([0]), 1)
    assert not dead.exists()
    assert living.exists()
    assert [path.name for path in own_cache.rglob("train-*.npy")] == ["train-0001.npy"], "1 + 2 + 1 is too much"


def test_training_on_features_learns_the_upper_part_only() -> None:
    fit = Fit(HYPER, block(), PIXELS, class_count=2, epochs=8, seed=0)
    before = {name: value.clone() for name, value in fit.net.state_dict().items()}
    losses = [fit.run_epoch().train_loss for _ in range(8)]
    assert np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    learnable = {name for name, parameter in fit.net.named_parameters() if parameter.requires_grad}
    changed = {
        name for name, _ in fit.net.named_parameters() if not torch.equal(before[name], fit.net.state_dict()[name])
    }
    assert changed <= learnable
    assert "head.weight" in changed
    assert torch.equal(before["trunk.bn1.running_mean"], fit.net.state_dict()["trunk.bn1.running_mean"])


def test_a_block_on_disk_and_one_in_memory_train_alike() -> None:
    on_disk = Fit(HYPER, block("k"), PIXELS, class_count=2, epochs=2, seed=0).run_epoch()
    in_memory = Fit(HYPER, block(), PIXELS, class_count=2, epochs=2, seed=0).run_epoch()
    assert dataclasses.replace(on_disk, seconds=0, images_per_second=0) == dataclasses.replace(
        in_memory, seconds=0, images_per_second=0
    )

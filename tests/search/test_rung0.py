"""Rung 0: the same images for every candidate, an order that respects defaults, and answers that are kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from carray.core.settings import parse_settings
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.manifest.prepare import prepare
from carray.search import rung0 as probes
from carray.search.resources import Share
from carray.search.rung0 import Probe, order_trials, probe, read_probes, write_probes
from carray.search.space import TuneSettings
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.tensors.block import Block
from carray.testing.drawing import draw_dataset

BACKBONE = "mobilenetv3_small_050"
SMALL = PixelSettings(decode_size=40, input_size=32)


def coloured_block(*, per_class: int = 20, classes: int = 3, mixed_up: bool = False) -> Block:
    """Give a block whose classes are colours, or, mixed up, whose labels have nothing to do with its pixels."""
    rng = np.random.default_rng(0)
    labels_N = np.repeat(np.arange(classes), per_class)
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]])
    noise = rng.normal(0, 20, (len(labels_N), 40, 40, 3))
    pixels_NHWC = (colours[labels_N][:, None, None] + noise).clip(0, 255).astype(np.uint8)
    splits_N = np.where(np.arange(len(labels_N)) % 4 == 0, 1, 0).astype(np.int8)
    return Block(pixels_NHWC, rng.permutation(labels_N) if mixed_up else labels_N, splits_N)


def transfer(backbone: str = "a", *, input_size: int = 160) -> TransferHyper:
    return TransferHyper(backbone=backbone, input_size=input_size)


def answer(backbone: str, val_top1: float, *, input_size: int = 160) -> Probe:
    return Probe(backbone, "auto", input_size, val_top1, 1.0)


def test_every_class_gives_a_few_training_images_and_the_choice_repeats() -> None:
    block = coloured_block(per_class=40)
    train_N, val_N = probes.choose_rows(block)
    assert set(np.bincount(block.labels_N[train_N])) == {probes.TRAIN_IMAGES_PER_CLASS}
    assert set(block.splits_N[train_N]) == {0}
    assert np.array_equal(val_N, block.of_split("val"))
    assert all(np.array_equal(*both) for both in zip((train_N, val_N), probes.choose_rows(block), strict=True))


def test_many_validation_images_are_not_all_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "VAL_IMAGES", 7)
    block = coloured_block()
    val_N = probes.choose_rows(block)[1]
    assert len(set(val_N)) == 7
    assert set(val_N) <= set(block.of_split("val"))


def test_a_probe_tells_features_that_say_something_from_those_that_do_not() -> None:
    candidate = (BACKBONE, "none", 32)
    told = probe(candidate, coloured_block(), SMALL, class_count=3)
    assert told.candidate == candidate
    assert told.val_top1 > 0.9
    assert probe(candidate, coloured_block(mixed_up=True), SMALL, class_count=3).val_top1 < 0.8
    assert probe(candidate, coloured_block(), SMALL, class_count=3).val_top1 == told.val_top1


def test_better_candidates_run_first_and_each_familys_default_stays_in_front() -> None:
    configurations = [transfer("bad"), CnnHyper(), transfer("middling"), CnnHyper(), transfer("good"), transfer("bad")]
    known = [answer("bad", 0.3), answer("middling", 0.35), answer("good", 0.4)]
    order, dropped = order_trials(configurations, known, margin=0.2)
    assert order == [0, 1, 4, 3, 2, 5]
    assert dropped == {}


def test_only_what_is_further_below_the_best_than_the_margin_is_dropped() -> None:
    configurations = [transfer("bad"), transfer("bad"), transfer("near"), transfer("best"), CnnHyper(), transfer("bad")]
    known = [answer("bad", 0.25), answer("near", 0.31), answer("best", 0.5)]
    order, dropped = order_trials(configurations, known, margin=0.2)
    assert order == [0, 4, 3, 2]  # 0 is the default, so it is not dropped
    assert list(dropped) == [1, 5]
    assert all(words in dropped[1] for words in ("bad at 160 pixels", "25.0%", "20.0%", "50.0%", "best at 160"))
    assert order_trials(configurations, known, margin=1.0)[1] == {}


def test_a_candidate_without_an_answer_comes_last_and_is_not_dropped() -> None:
    configurations = [transfer("a"), transfer("silent"), transfer("a"), transfer("b"), None]
    order, dropped = order_trials(configurations, [answer("a", 0.9), answer("b", 0.8)], margin=0.05)
    assert order == [0, 2, 1, 4]
    assert list(dropped) == [3]


def test_input_size_and_weights_tell_candidates_apart() -> None:
    configurations = [transfer("a"), transfer("a"), transfer("a", input_size=96)]
    known = [answer("a", 0.3), answer("a", 0.4, input_size=96)]
    assert order_trials(configurations, known, margin=0.5)[0] == [0, 2, 1]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=8)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return read_manifest(str(folder / "manifest.parquet"))


def rung0(**search: object) -> TuneSettings:
    return parse_settings(TuneSettings, {"search": search, "pixels": SMALL.model_dump()})


def small(input_size: int, weights: str = "none") -> dict[str, object]:
    hyper = TransferHyper(backbone=BACKBONE, weights=weights, input_size=input_size, train="head")
    return hyper.model_dump(mode="json")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [(rung0(rung0="off"), [24, 32]), (rung0(), [32, 32]), (rung0(), [32])],
    ids=["off", "one candidate", "one trial"],
)
def test_nothing_is_asked_where_nothing_is_to_choose(
    manifest: Manifest, tmp_path: Path, settings: TuneSettings, sizes: list[int]
) -> None:
    from carray.search.search_on_ray import rank_trials

    configurations = [small(size) for size in sizes]
    numbers = list(range(len(sizes)))
    share = Share(cpus=1, gpus=0, at_once=2)
    assert rank_trials(str(tmp_path), manifest, settings, configurations, share) == (numbers, {})
    assert read_probes(str(tmp_path)) == []


def test_answers_are_kept_and_not_asked_for_twice(
    manifest: Manifest,
    tmp_path: Path,
    ray_cluster: object,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from carray.search.search_on_ray import rank_trials

    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    configurations = [small(32), small(24), None, small(32, weights=str(tmp_path / "absent")), small(24)]
    run, share = str(tmp_path / "run"), Share(cpus=1, gpus=0, at_once=2)
    order, dropped = rank_trials(run, manifest, rung0(rung0_margin=1), configurations, share)
    assert sorted(order) == list(range(5))
    assert order[0] == 0
    assert dropped == {}
    assert {one.input_size for one in read_probes(run)} == {24, 32}
    assert "no answer" in capsys.readouterr().err

    # What another start knows already decides; only the candidate that gave no answer is asked again.
    write_probes(run, [Probe(BACKBONE, "none", 24, 0.1, 1.0), Probe(BACKBONE, "none", 32, 0.9, 1.0)])
    order, dropped = rank_trials(run, manifest, rung0(), configurations, share)
    assert (order, list(dropped)) == ([0, 2, 3], [1, 4])
    assert "1 to go" in capsys.readouterr().err


def test_a_search_runs_no_trial_of_a_clear_loser(
    manifest: Manifest, tmp_path: Path, ray_cluster: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from carray.search.run_folder import read_trials
    from carray.search.search_on_ray import search

    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    run, default = str(tmp_path / "run"), {**small(32), "batch_images": 16}
    del default["family"]
    family = {"default": default, "space": {"input_size": [24, 32]}}
    values = {
        "search": {"trials": 5, "epochs": 1, "seed": 1},
        "pixels": SMALL.model_dump(),
        "families": {"transfer": family},
    }
    write_probes(run, [Probe(BACKBONE, "none", 24, 0.9, 1.0), Probe(BACKBONE, "none", 32, 0.1, 1.0)])
    outcome = search(manifest.uri, run=run, settings=parse_settings(TuneSettings, values))
    trials = read_trials(run).sort_values("number")
    sizes = [json.loads(hyper)["input_size"] for hyper in trials["hyper"]]
    assert set(sizes[1:]) == {24, 32}
    assert list(trials["status"]) == ["finished", *("finished" if size == 24 else "dropped" for size in sizes[1:])]
    assert all("rung 0" in reason for reason in trials.loc[trials["status"] == "dropped", "reason"])
    assert outcome["by_status"]["dropped"] == sizes[1:].count(32)

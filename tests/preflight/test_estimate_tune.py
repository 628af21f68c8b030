"""What is said of a search beforehand: by a trial's own code and an earlier run's log, as ranges."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from written_runs import write_run

from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.manifest.manifest_file import read_manifest
from carray.manifest.prepare import prepare
from carray.preflight import estimate_tune as tune
from carray.preflight.estimate_tune import estimate_tune
from carray.preflight.estimates import Machines, Range
from carray.preflight.tune_probe import NetCost, TrainingCost, frozen_key, net_key
from carray.search import run_folder
from carray.search.proposals import draw_trials
from carray.search.resources import Share
from carray.search.space import TuneSettings
from carray.testing.drawing import draw_dataset


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give a manifest of a few drawn cars."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=10)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return str(folder / "manifest.parquet")


def settings(**search: object) -> TuneSettings:
    small = {"input_size": 32, "stages": 2, "width": 4, "batch_images": 16}
    return parse_settings(
        TuneSettings,
        {
            "search": {"trials": 9, "epochs": 9, "cpus_per_trial": 1, **search},
            "pixels": {"decode_size": 40, "input_size": 32},
            "families": {"cnn": {"default": small, "space": {"width": [4, 8], "learning_rate": [0.001, 0.002]}}},
        },
    )


def test_an_estimate_trains_the_spaces_networks(manifest):
    found = estimate_tune(
        manifest, settings=settings(), machines=Machines(2, 2, hour_price=3.6), most_networks=1, probe_workers=1
    )
    said = json.loads(json.dumps(found.as_json()))
    assert (said["trials"], said["epochs_all_in_full"], said["trials_at_once"]) == (9, 81, 4)
    assert (said["networks"], said["networks_measured"]) == (2, 1)
    assert said["epochs"] == [9, 81]
    assert 0 < said["search_seconds"][0] < said["search_seconds"][1]
    assert said["machine_money"][1] == pytest.approx(said["machine_hours"][1] * 3.6, rel=0.01)
    assert said["device_hours"][1] == pytest.approx(said["machine_hours"][1] * 2, rel=0.01)
    text = found.as_text()
    assert "81 if no trial is stopped (asha)" in text
    assert "from every trial stopped as early as possible, after epoch 1, to none stopped" in text
    assert "--networks measures more" in text


def test_gpus_are_not_guessed_at_without_one(manifest):
    with pytest.raises(SettingsError, match="torch sees none on this machine"):
        estimate_tune(manifest, settings=settings(gpus_per_trial=1), machines=Machines(1, 2, gpus=1))


COST = NetCost(train=Range(0.01, 0.02), val=Range(0.001, 0.002), frozen=Range(0.0, 0.0))


def scaled(
    manifest: str,
    chosen: TuneSettings,
    *,
    machines: Machines,
    at_once: int = 2,
    cost: NetCost = COST,
    earlier_run: str | None = None,
):
    hypers = draw_trials(chosen)
    known = TrainingCost({net_key(h): cost for h in hypers}, Range(0.001, 0.002), 5.0, 0.0)
    epochs, meaning = tune._epochs(chosen.search, len(hypers), earlier_run)
    return tune._scale(
        read_manifest(manifest),
        chosen,
        hypers,
        Share(1, 0, at_once),
        machines,
        known,
        epochs=epochs,
        epochs_meaning=meaning,
    )


def test_without_a_scheduler_every_epoch_is_run(manifest):
    found = scaled(manifest, settings(scheduler="none"), machines=Machines(1, 2))
    assert found["epochs"] == Range(81, 81)
    assert "all, since search.scheduler none stops no trial" in found.as_text()
    counts = read_manifest(manifest).split_counts()
    quick = 9 * (0.01 * counts["train"] + 0.001 * counts["val"] + tune.EPOCH_SECONDS.low) + tune.TRIAL_SECONDS.low
    slow = 9 * (0.02 * counts["train"] + 0.002 * counts["val"] + tune.EPOCH_SECONDS.high) + tune.TRIAL_SECONDS.high
    # Of nine trials, two at once: five in a row at most, and at least half of the work on each.
    assert found["search_seconds"].low == pytest.approx(4.5 * quick / 1.25)
    assert found["search_seconds"].high == pytest.approx(5 * slow * 1.25)


def test_a_scheduler_may_save_epochs_and_more_trials_at_once_save_time(manifest):
    asha = scaled(manifest, settings(), machines=Machines(1, 2))
    unstopped = scaled(manifest, settings(scheduler="none"), machines=Machines(1, 2))
    assert asha["epochs"] == Range(9, 81)
    assert asha["search_seconds"].low < unstopped["search_seconds"].low
    assert asha["search_seconds"].high == unstopped["search_seconds"].high
    assert scaled(manifest, settings(grace_epochs=3), machines=Machines(1, 2))["epochs"] == Range(27, 81)
    wide = scaled(manifest, settings(), machines=Machines(4, 2), at_once=8)
    assert wide["search_seconds"].high < asha["search_seconds"].high


def test_an_earlier_run_shows_how_many_epochs_are_run(manifest, tmp_path: Path):
    run = write_run(tmp_path / "run")  # 40 trials of 9 epochs by ASHA
    trials = run_folder.read_trials(run)
    share = trials["epochs"].sum() / (9 * (trials["status"] != "not_started").sum())
    few = scaled(manifest, settings(), machines=Machines(1, 2), earlier_run=run)
    many = scaled(manifest, settings(trials=900), machines=Machines(1, 2), earlier_run=run)
    assert few["epochs"].low < 81 * share < few["epochs"].high < 81
    assert many["epochs"].low < 8100 * share < many["epochs"].high
    assert many["epochs"].high / many["epochs"].low < few["epochs"].high / few["epochs"].low
    unknown = scaled(manifest, settings(), machines=Machines(1, 2))
    assert (
        unknown["search_seconds"].low
        < few["search_seconds"].low
        < few["search_seconds"].high
        < unknown["search_seconds"].high
    )
    assert f"{run} ran {trials['epochs'].sum()} of its 39 trials' 351" in few.as_text()


def test_an_earlier_run_that_stopped_otherwise_is_refused(manifest, tmp_path: Path):
    run = write_run(tmp_path / "run")
    with pytest.raises(SettingsError, match="had search.epochs 9, but this search has 6; name a run"):
        estimate_tune(manifest, settings=settings(epochs=6), machines=Machines(1, 2), earlier_run=run)
    with pytest.raises(SettingsError, match="had search.scheduler asha, but this search has median"):
        estimate_tune(manifest, settings=settings(scheduler="median"), machines=Machines(1, 2), earlier_run=run)
    with pytest.raises(SettingsError, match=r"holds no search.json"):
        estimate_tune(manifest, settings=settings(), machines=Machines(1, 2), earlier_run=str(tmp_path))


def test_a_budget_ends_the_search_and_says_so(manifest):
    slow = NetCost(train=Range(10, 20), val=Range(1, 2), frozen=Range(0, 0))
    found = scaled(manifest, settings(time_budget_minutes=5), machines=Machines(1, 2), cost=slow)
    assert found["ended_by"] == "search.time_budget_minutes"
    assert found["seconds"].high <= 300 + tune.PACK_SECONDS.high
    assert "search.time_budget_minutes ends the search" in found.as_text()
    free = scaled(manifest, settings(), machines=Machines(1, 2), cost=slow)
    assert free["ended_by"] is None
    assert free["seconds"].low > found["seconds"].high
    assert tune._limit(settings().search, Share(1, 0, 2)) == (math.inf, "")
    money = settings(money_budget=2.0, price_per_device_hour=1.0)
    assert tune._limit(money.search, Share(1, 0, 2)) == (3600.0, "search.money_budget")


def test_a_refit_comes_on_top(manifest):
    refit = scaled(manifest, settings(refit=True, refit_epochs=3), machines=Machines(1, 2))
    assert refit["refit_seconds"].low > 0
    images = refit["images"]
    assert refit["refit_seconds"].high == pytest.approx(0.02 * 3 * images * 1.25)


def test_features_of_a_frozen_trunk_are_paid_once_a_view():
    plain = parse_settings(
        TuneSettings,
        {
            "search": {"trials": 4, "epochs": 4, "scheduler": "none", "rung0": "off"},
            "families": {"transfer": {"default": {"train": "head", "cached_views": 2}, "space": {}}},
        },
    )
    hypers = draw_trials(plain)
    counts = {"train": 100, "val": 10}
    nets = [NetCost(Range(0.001, 0.001), Range(0, 0), Range(0.1, 0.1)) for _ in hypers]
    work = tune._Work(plain, hypers, nets, counts, 2, Share(1, 0, 1), Machines())
    seconds = work.trials_seconds(Range(16, 16))
    trials, epochs, features = 4 * 0.3, 16 * (0.1 + 0.05), 2 * 10.0 + 1.0
    assert seconds.low == pytest.approx(trials + epochs + features)


def test_only_what_changes_an_epochs_time_makes_another_network():
    first, *others = draw_trials(settings())
    assert {net_key(first)} | {net_key(other) for other in others} == {
        net_key(first.model_copy(update={"width": width})) for width in (4, 8)
    }
    assert net_key(first) == net_key(first.model_copy(update={"learning_rate": 0.5, "mixup": 0.2}))
    assert net_key(first) != net_key(first.model_copy(update={"input_size": 40}))
    assert frozen_key(first) == ""


def test_rung_0_is_estimated_where_there_is_something_to_choose(manifest):
    space = {"default": {"train": "head", "input_size": 32}, "space": {"input_size": [32, 40]}}
    chosen = parse_settings(
        TuneSettings,
        {
            "search": {"trials": 6, "epochs": 2, "cpus_per_trial": 1},
            "pixels": {"decode_size": 40, "input_size": 32},
            "families": {"transfer": space},
        },
    )
    assert scaled(manifest, chosen, machines=Machines(1, 2))["rung0_seconds"].low > 0
    assert scaled(manifest, settings(), machines=Machines(1, 2))["rung0_seconds"] == Range(0.0, 0.0)


def test_a_manifest_that_is_gone_is_a_sentence(tmp_path: Path):
    from carray.core.errors import StorageError

    with pytest.raises(StorageError, match="does not exist"):
        estimate_tune(str(tmp_path / "absent.parquet"), settings=settings(), machines=Machines())

"""Population-based training: who copies whom, with which values, and that a killed search's orders are obeyed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.core.storage import exists, write_bytes
from carray.drawing import draw_dataset
from carray.manifest.build import prepare
from carray.trials.draw import draw_trials
from carray.trials.format import read_log
from carray.trials.on_ray import search
from carray.trials.population import Population, check_population, copied_state, read_copy
from carray.trials.space import TuneSettings

SPACE = {"learning_rate": {"log_uniform": [1e-3, 1e-2]}, "dropout": {"uniform": [0.0, 0.5]}, "policy": ["none", "rand"]}
SMALL = {"input_size": 32, "stages": 2, "width": 8, "batch_images": 16}


def settings_of(**search: Any) -> TuneSettings:
    return parse_settings(
        TuneSettings,
        {
            "search": {"trials": 8, "epochs": 6, "grace_epochs": 2, "scheduler": "pbt", **search},
            "families": {"cnn": {"default": SMALL, "space": SPACE}},
            "pixels": {"decode_size": 40, "input_size": 32},
        },
    )


def population_of(settings: TuneSettings, run: Path) -> Population:
    return Population(settings, str(run), [hyper.model_dump(mode="json") for hyper in draw_trials(settings)])


def entry_of(number: int, epoch: int, val_top1: float) -> dict[str, Any]:
    return {"number": number, "epoch": epoch, "val_top1": val_top1}


def test_the_worst_quarter_copies_from_the_best_quarter_of_the_same_epoch(tmp_path: Path) -> None:
    population = population_of(settings_of(), tmp_path)
    scores = [0.9, 0.8, 0.5, 0.1, 0.7, 0.2, 0.6, 0.05]
    copies = [population.judge(entry_of(number, 2, score)) for number, score in enumerate(scores)]
    # Three are too few; 3 is the worst of four, 5 is the second worst of six, and 7 of eight.
    assert [copy.number for copy in copies if copy] == [3, 5, 7]
    assert all(copy.source in (0, 1) and copy.epoch == 2 for copy in copies if copy)
    assert population.judge(entry_of(7, 3, 0.05)) is None  # not an epoch at which trials copy
    assert population.judge(entry_of(7, 6, 0.05)) is None  # nor after the last one
    # At the next such epoch only those that have come there count.
    assert [population.judge(entry_of(number, 4, scores[number])) for number in range(3)] == [None] * 3


def test_a_trial_as_good_as_the_best_copies_nobody(tmp_path: Path) -> None:
    population = population_of(settings_of(), tmp_path)
    assert [population.judge(entry_of(number, 2, 0.5)) for number in range(8)] == [None] * 8


def test_a_copy_varies_what_the_space_varies_within_its_ranges(tmp_path: Path) -> None:
    settings = settings_of(trials=100, epochs=20)
    population = population_of(settings, tmp_path)
    drawn = [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]
    copies = [population.judge(entry_of(number, 2, (100 - number) / 100)) for number in range(100)]
    found = [copy for copy in copies if copy]
    assert len(found) > 20
    for copy in found:
        assert 1e-3 <= copy.hyper["learning_rate"] <= 1e-2 and 0 <= copy.hyper["dropout"] <= 0.5
        same = {key: copy.hyper[key] for key in copy.hyper if key not in SPACE}
        assert same == {key: drawn[copy.source][key] for key in same}
    ratios = {round(copy.hyper["learning_rate"] / drawn[copy.source]["learning_rate"], 2) for copy in found}
    assert {0.8, 1.25} < ratios and len(ratios) > 2  # some were drawn anew
    assert {copy.hyper["policy"] for copy in found} == {"none", "rand"}


def test_a_copy_of_a_copy_varies_the_copied_values(tmp_path: Path) -> None:
    population = population_of(settings_of(), tmp_path)
    first = [population.judge(entry_of(number, 2, 0.9 - number / 10)) for number in range(4)][3]
    assert first is not None
    second = [
        population.judge(entry_of(number, 4, score)) for number, score in ((3, 0.9), (2, 0.3), (1, 0.4), (0, 0.1))
    ]
    assert second[3] is not None and second[3].source == 3
    ratios = {key: second[3].hyper[key] / first.hyper[key] for key in ("learning_rate", "dropout")}
    assert any(ratio == pytest.approx(factor, rel=0.01) for ratio in ratios.values() for factor in (0.8, 1.25))


def test_orders_are_a_function_of_the_seed_and_the_log(tmp_path: Path) -> None:
    entries = [
        entry_of(number, epoch, ((number * 37 + epoch) % 11) / 11) for epoch in (1, 2, 3, 4) for number in range(8)
    ]

    def copies(seed: int) -> list[Any]:
        population = population_of(settings_of(seed=seed), tmp_path)
        return [population.judge(entry) for entry in entries]

    assert copies(0) == copies(0)
    assert copies(0) != copies(1)


def test_states_that_nobody_can_copy_any_more_are_deleted(tmp_path: Path) -> None:
    run = str(tmp_path)
    population = population_of(settings_of(), tmp_path)

    def report(number: int, epoch: int, score: float, unfinished: range) -> list[int]:
        if epoch in (2, 4):
            write_bytes(copied_state(run, number, epoch), b"state")
        population.judge(entry_of(number, epoch, score))
        population.sweep(unfinished)
        return [other for other in range(8) if exists(copied_state(run, other, 2))]

    for number in range(3):
        kept = report(number, 2, 0.9 - number / 10, range(8))
    assert kept == [0, 1]  # the best quarter of eight is two
    assert report(3, 2, 0.1, range(8)) == [0, 1]
    copy = population._copies[3]
    # Two better ones come before trial 3 has taken its source's state.
    report(4, 2, 0.95, range(8))
    assert copy.source in report(5, 2, 0.96, range(8))
    assert report(3, 3, 0.5, range(8)) == [4, 5]
    for number in range(8):
        kept = report(number, 3, 0.5, range(8))
    assert kept == []


def test_an_order_that_a_killed_start_left_is_taken_back(tmp_path: Path) -> None:
    settings = settings_of()
    population = population_of(settings, tmp_path)
    copy = [population.judge(entry_of(number, 2, 0.9 - number / 10)) for number in range(4)][3]
    population.order(3, copy)
    assert read_copy(str(tmp_path), 3) == copy
    population.order(3, None)
    assert read_copy(str(tmp_path), 3) is None
    population.order(3, copy)
    population.judge(entry_of(3, 4, 0.9))
    population.order(3, None)  # of an earlier epoch, so obeyed long since, and what a restart begins with
    assert read_copy(str(tmp_path), 3) == copy


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"families": {"cnn": {}, "transfer": {}}}, "must be of one family, not of cnn and transfer"),
        (
            {"families": {"cnn": {"space": {"width": [16, 32], "dropout": [0.1, 0.2]}}}},
            "varies width, which cannot change",
        ),
        ({"families": {"cnn": {}}}, "families.cnn.space is empty"),
        ({"search": {"searcher": "tpe"}}, "search.searcher is tpe, but search.scheduler pbt varies values itself"),
        ({"search": {"trials": 3}}, "search.trials is 3; search.scheduler pbt needs 4 or more"),
        ({"search": {"epochs": 6, "grace_epochs": 6}}, "pbt would copy nothing within search.epochs 6"),
    ],
)
def test_what_cannot_be_copied_is_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    values = settings_of().model_dump(mode="json")
    values["search"] |= changes.get("search", {})
    values["families"] = changes.get("families", values["families"])
    with pytest.raises(SettingsError, match=sentence):
        check_population(parse_settings(TuneSettings, values))


def test_other_schedulers_take_any_space() -> None:
    check_population(parse_settings(TuneSettings, {}))
    check_population(settings_of())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("drawn")
    draw_dataset(folder / "images", images_per_class=12)
    prepare(str(folder / "images"), out=str(folder / "manifest.parquet"))
    return str(folder / "manifest.parquet")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path_factory.getbasetemp() / "population-cache"))


def a_process(settings: TuneSettings, run: Path, manifest: str, number: int) -> Any:
    """Start one trial's process here, in this one."""
    from ray import tune

    from carray.trials.population_on_ray import PopulationRunner

    shared = {
        "run": str(run),
        "manifest": manifest,
        "settings": settings.model_dump(mode="json"),
        "cpus": 1,
        "gpus": 0,
        "environment": {},
    }
    hyper = draw_trials(settings)[number].model_dump(mode="json")
    return tune.with_parameters(PopulationRunner, shared=shared)({"number": number, "hyper": hyper})


def test_a_trial_obeys_an_order_and_does_so_again_after_a_kill(manifest: str, tmp_path: Path) -> None:
    settings = settings_of(epochs=3, grace_epochs=1, trials=4)
    run = tmp_path / "run"
    scores = {}
    for number in range(4):
        process = a_process(settings, run, manifest, number)
        scores[number] = json.loads(process.train()["entry"])["val_loss"]
    population = population_of(settings, run)
    # Trial 3 is to copy one of the others, whatever chance gave it.
    copy = [population.judge(entry_of(number, 1, 0.9 - number / 10)) for number in range(4)][3]
    assert copy is not None
    population.order(3, copy)
    shutil.copytree(run, tmp_path / "killed")
    second = json.loads(process.train()["entry"])
    assert (second["number"], second["epoch"]) == (3, 2)
    assert process._fit.hyper.learning_rate == copy.hyper["learning_rate"]
    assert process._fit.history[0].val_loss == pytest.approx(scores[copy.source]) != scores[3]

    # Killed before that epoch: a new process reports the epoch that the log knows, then obeys, with the same outcome.
    again = a_process(settings, tmp_path / "killed", manifest, 3)
    assert json.loads(again.train()["entry"])["val_loss"] == pytest.approx(scores[3])
    after = json.loads(again.train()["entry"])
    assert {**after, "seconds": 0, "images_per_second": 0} == {**second, "seconds": 0, "images_per_second": 0}

    # Killed after it: the order has been obeyed, and its values stay.
    late = a_process(settings, run, manifest, 3)
    assert json.loads(late.train()["entry"])["epoch"] == 2
    assert late._fit.hyper.learning_rate == copy.hyper["learning_rate"]
    assert json.loads(late.train()["entry"])["epoch"] == 3


def test_a_state_that_is_gone_lets_the_trial_go_on_from_its_own(manifest: str, tmp_path: Path) -> None:
    settings = settings_of(epochs=3, grace_epochs=1, trials=4)
    process = a_process(settings, tmp_path, manifest, 3)
    process.train()
    population = population_of(settings, tmp_path)
    population.order(3, [population.judge(entry_of(number, 1, 0.9 - number / 10)) for number in range(4)][3])
    result = process.train()
    assert json.loads(result["entry"])["epoch"] == 2
    assert "could not take over the other trial's weights" in result["restarted"]


def test_a_search_copies_better_trials_and_says_so(manifest: str, tmp_path: Path, ray_cluster: object) -> None:
    """Two places for six trials: the fourth and later ones find others to be compared with."""
    run = str(tmp_path / "run")
    # A rate at which nothing is learnt against one at which something is: somebody is the worst at every epoch.
    space = {"learning_rate": {"log_uniform": [1e-6, 1e-2]}, "dropout": {"uniform": [0.0, 0.5]}}
    values = settings_of(epochs=4, grace_epochs=1, trials=6, cpus_per_trial=1).model_dump(mode="json")
    values["families"]["cnn"]["space"] = space
    outcome = search(manifest, run=run, settings=parse_settings(TuneSettings, values))
    assert outcome["by_status"] == {"finished": 6}
    entries = read_log(run)
    copied = [entry for entry in entries if "goes on from" in (entry["note"] or "")]
    assert copied
    for entry in copied:
        assert entry["decision"] == "continue"
        order = read_copy(run, entry["number"])
        assert order is not None and order.epoch >= entry["epoch"]
    last = {entry["number"]: entry["epoch"] for entry in entries}
    assert set(last.values()) == {4}
    assert len(entries) == 6 * 4
    assert not list(Path(run).rglob("epoch-*"))
    assert not any("could not take over" in (entry["note"] or "") for entry in entries)

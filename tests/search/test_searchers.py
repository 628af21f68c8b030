"""Where configurations come from: their order, what TPE proposes, and that a resumed search proposes the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher

from carray.core.settings import parse_settings
from carray.core.store.files import write_json
from carray.manifest.prepare import prepare
from carray.search.run_folder import VERSION, read_search, read_trials
from carray.search.run_log import SearchLog
from carray.search.search_on_ray import Configurations, search
from carray.search.space import TuneSettings, draw_trials
from carray.search.tpe import FIRST_DRAWN, Observation, propose
from carray.search.train.hyperparameters import CnnHyper
from carray.testing.drawing import draw_dataset

SPACE = {
    "learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "dropout": {"uniform": [0.0, 0.5]},
    "width": [16, 24, 32],
    "blocks": {"integers": [1, 3]},
}


def a_search(searcher: str = "tpe", *, trials: int = 40, families: Any = None, seed: int = 0) -> TuneSettings:
    return parse_settings(
        TuneSettings,
        {
            "search": {"searcher": searcher, "trials": trials, "epochs": 2, "seed": seed, "scheduler": "none"},
            "families": families or {"cnn": {"space": SPACE}},
        },
    )


def score_of(hyper: Any) -> float:
    """Stand for a training: best at a rate of 0.01, without dropout."""
    return max(0.0, 1.0 - 0.3 * abs(math.log10(hyper["learning_rate"]) + 2) - hyper["dropout"])


def observed(settings: TuneSettings, count: int, *, drawn: bool = True) -> list[Observation]:
    """Give how the first `count` trials ended, of random draws or of what was proposed meanwhile."""
    told: list[Observation] = []
    for number, random in zip(range(count), draw_trials(settings), strict=False):
        hyper = (random if drawn else propose(settings, number, told)).model_dump(mode="json")
        told.append(Observation(number, hyper, 2, score_of(hyper)))
    return told


def test_the_first_of_each_family_is_its_default_and_the_next_are_drawn() -> None:
    families = {"cnn": {"share": 0.5, "space": SPACE}, "transfer": {"share": 0.5, "space": {"train": ["head", "all"]}}}
    settings = a_search(families=families, trials=12)
    drawn = draw_trials(settings)
    told = observed(settings, FIRST_DRAWN)
    assert [propose(settings, number, told[:number]) for number in range(6)] == drawn[:6]
    assert drawn[0].model_dump() == type(drawn[0])().model_dump()
    # Of both families there were fewer than would tell TPE anything.
    assert propose(settings, 11, told) == drawn[11]


def test_later_proposals_differ_from_random_ones_and_depend_on_what_was_observed() -> None:
    settings = a_search()
    told = observed(settings, 12)
    proposed = propose(settings, 20, told)
    assert proposed != draw_trials(settings)[20]
    reversed_scores = [Observation(o.number, o.hyper, 2, 1.0 - (o.score or 0.0)) for o in told]
    assert propose(settings, 20, reversed_scores) != proposed
    assert propose(settings, 21, told) != proposed
    assert propose(a_search(seed=1), 20, told) != proposed


def test_a_proposal_is_a_function_of_seed_number_and_observations() -> None:
    settings = a_search(trials=60)
    told = observed(settings, 40)  # from 26 on Optuna weighs earlier ones less, so that their order matters
    shuffled = [told[int(i)] for i in np.random.default_rng(0).permutation(len(told))]
    assert propose(settings, 50, told) == propose(settings, 50, shuffled)


def test_proposals_are_better_than_draws_on_average() -> None:
    settings = a_search()
    drawn = [o.score or 0.0 for o in observed(settings, 40)[20:]]
    proposed = [o.score or 0.0 for o in observed(settings, 40, drawn=False)[20:]]
    assert np.mean(proposed) > np.mean(drawn) + 0.1


def test_proposals_stay_in_their_ranges_and_can_be_read() -> None:
    settings = a_search()
    told = observed(settings, 12)
    for number in range(12, 40):
        hyper = propose(settings, number, told)
        assert isinstance(hyper, CnnHyper)
        assert 1e-4 <= hyper.learning_rate <= 1e-1 and 0 <= hyper.dropout <= 0.5
        assert hyper.width in (16, 24, 32) and hyper.blocks in (1, 2, 3)
        assert float(f"{hyper.learning_rate:.4g}") == hyper.learning_rate


def test_trials_without_a_score_count_for_nothing() -> None:
    settings = a_search()
    told = observed(settings, FIRST_DRAWN - 1)
    failed = [Observation(number, o.hyper, 0, None) for number, o in enumerate(observed(settings, 12), start=100)]
    assert propose(settings, 20, [*told, *failed]) == draw_trials(settings)[20]
    assert propose(settings, 20, observed(settings, 12) + failed) == propose(settings, 20, observed(settings, 12))


def test_a_stopped_trial_weighs_less_than_a_finished_one_of_the_same_score() -> None:
    settings = a_search()
    told = observed(settings, 12)
    best = max(told, key=lambda o: o.score or 0.0)
    best_stopped = [Observation(o.number, o.hyper, 1 if o is best else 2, o.score) for o in told]
    assert propose(settings, 20, best_stopped) != propose(settings, 20, told)


def test_a_default_outside_of_the_space_does_no_harm() -> None:
    families = {"cnn": {"default": {"width": 64, "learning_rate": 1.0}, "space": SPACE}}
    settings = a_search(families=families)
    told = observed(settings, 12)
    assert told[0].hyper["width"] == 64
    assert propose(settings, 20, told) != draw_trials(settings)[20]


def test_values_that_do_not_go_together_are_proposed_anew() -> None:
    """A micro-batch of 64 cannot be above the batch of 32."""
    space = {"micro_batch_images": [16, 64], "dropout": {"uniform": [0.0, 0.5]}}
    wide = a_search(families={"cnn": {"default": {"batch_images": 64}, "space": space}})
    narrow = a_search(families={"cnn": {"default": {"batch_images": 32}, "space": space}})
    proposed = [propose(narrow, number, observed(wide, 12)) for number in range(20, 30)]
    assert {hyper.micro_batch_images for hyper in proposed} == {16}


def stored_run(tmp_path: Path, settings: TuneSettings, configurations: list[Any]) -> str:
    run = str(tmp_path / "run")
    write_json(
        f"{run}/search.json",
        {"version": VERSION, "settings": settings.model_dump(mode="json"), "configurations": configurations},
    )
    return run


def a_searcher(run: str, settings: TuneSettings, configurations: list[Any], numbers: list[int]) -> Configurations:
    log = SearchLog(run, settings.search, count=len(configurations))
    return Configurations(run, settings, log, configurations, numbers)


@pytest.mark.parametrize("kind", ["random", "grid"])
def test_known_configurations_are_given_in_the_order_asked_for(kind: str, tmp_path: Path) -> None:
    families = {"cnn": {"space": {"width": [16, 24, 32]}}}
    settings = a_search(kind, trials=3, families=families)
    configurations: list[Any] = [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]
    searcher = a_searcher(str(tmp_path), settings, configurations, [2, 0])
    assert searcher.set_search_properties(None, None, {"constant": 1})
    assert searcher.suggest("a") == {"number": 2, "hyper": configurations[2]}
    assert searcher.suggest("b") == {"number": 0, "hyper": configurations[0]}
    assert searcher.suggest("c") == Searcher.FINISHED


def play(run: str, settings: TuneSettings, configurations: list[Any], missing: list[int], *, count: int) -> list[Any]:
    """Run trials one after another, each to its end, with the log written as a search writes it."""
    log = SearchLog(run, settings.search, count=len(configurations))
    searcher = Configurations(run, settings, log, configurations, missing)
    given = []
    for turn in range(count):
        suggested = searcher.suggest(f"tune-{turn}")
        assert suggested is not None
        number, hyper = suggested["number"], suggested["hyper"]
        assert read_search(run)["configurations"][number] == hyper  # stored before it is launched
        given.append(suggested)
        score = None if number % 7 == 6 else score_of(hyper)  # one in seven diverges
        entry = {"number": number, "family": "cnn", "epoch": 2, "train_loss": 1.0}
        entry |= {"val_loss": None if score is None else 1.0, "val_top1": score or 0.0, "val_top5": None}
        entry |= {"seconds": 1.0, "images_per_second": 1.0, "note": None}
        assert log.add(entry) == ("non_finite" if score is None else "finish")
    return given


def test_a_search_that_goes_on_proposes_what_it_would_have_proposed(tmp_path: Path) -> None:
    settings = a_search(trials=14)
    whole_run = stored_run(tmp_path / "whole", settings, [None] * 14)
    whole = play(whole_run, settings, [None] * 14, list(range(14)), count=14)
    run = stored_run(tmp_path / "killed", settings, [None] * 14)
    first = play(run, settings, [None] * 14, list(range(14)), count=10)
    # Configuration 10 was proposed and stored, and then the search was killed: it is launched as it was stored.
    begun = a_searcher(run, settings, read_search(run)["configurations"], [10, 11, 12, 13]).suggest("lost")
    stored = read_search(run)["configurations"]
    assert stored[11] is None
    rest = play(run, settings, stored, [10, 11, 12, 13], count=4)
    assert begun == rest[0]
    assert first + rest == whole
    assert [one["hyper"] for one in whole] != [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]


def test_a_trial_that_failed_is_no_observation_and_no_harm(tmp_path: Path) -> None:
    settings = a_search(trials=3)
    run = stored_run(tmp_path, settings, [None] * 3)
    log = SearchLog(run, settings.search, count=3)
    searcher = Configurations(run, settings, log, [None] * 3, [0, 1, 2])
    for number in range(2):
        searcher.suggest(f"tune-{number}")
        log.fail(number, "no such backbone")
    suggested = searcher.suggest("tune-2")
    assert suggested is not None
    assert suggested["hyper"] == draw_trials(settings)[2].model_dump(mode="json")


@pytest.mark.slow
def test_a_real_search_launches_what_tpe_proposes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: object
) -> None:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    draw_dataset(tmp_path / "images", images_per_class=12)
    prepare(str(tmp_path / "images"), out=str(tmp_path / "manifest.parquet"))
    small = {"input_size": 32, "stages": 2, "width": 8, "batch_images": 16}
    settings = parse_settings(
        TuneSettings,
        {
            "search": {"searcher": "tpe", "trials": 8, "epochs": 1, "cpus_per_trial": 1},
            "pixels": {"decode_size": 40, "input_size": 32},
            "families": {"cnn": {"default": small, "space": SPACE}},
        },
    )
    run = str(tmp_path / "run")
    outcome = search(str(tmp_path / "manifest.parquet"), run=run, settings=settings)
    assert outcome["by_status"] == {"finished": 8}
    stored = read_search(run)["configurations"]
    drawn = [hyper.model_dump(mode="json") for hyper in draw_trials(settings)]
    # Two at once and one that waits: the last was proposed when at least five had ended.
    assert stored[:FIRST_DRAWN] == drawn[:FIRST_DRAWN]
    assert stored[7] != drawn[7]
    assert sorted(json.loads(hyper)["learning_rate"] for hyper in read_trials(run)["hyper"]) == sorted(
        hyper["learning_rate"] for hyper in stored
    )

"""The space: configuration i is a function of (seed, i), checked before anything is launched."""

from __future__ import annotations

from pathlib import Path

import pytest

from carray.core.errors import SettingsError
from carray.core.settings import load_settings, parse_settings
from carray.trials.draw import draw_trials
from carray.trials.space import TuneSettings

ROOT = Path(__file__).resolve().parents[2]


def settings(**overrides: object) -> TuneSettings:
    return load_settings(
        TuneSettings, overrides=[f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    )


def test_first_of_each_family_is_its_default() -> None:
    drawn = draw_trials(settings(search__trials=8))
    assert [hyper.family for hyper in drawn[:2]] == ["transfer", "cnn"]
    assert drawn[0].model_dump() == type(drawn[0])().model_dump()
    assert drawn[1].input_size == 96


def test_more_trials_leave_the_earlier_ones_as_they_were() -> None:
    assert draw_trials(settings(search__trials=20))[:7] == draw_trials(settings(search__trials=7))


def test_seed_decides_the_draw() -> None:
    assert draw_trials(settings()) == draw_trials(settings())
    assert draw_trials(settings()) != draw_trials(settings(search__seed=1))


def test_shares_are_kept() -> None:
    families = [hyper.family for hyper in draw_trials(settings(search__trials=50))]
    assert families.count("transfer") == 30


def test_draws_stay_in_their_ranges() -> None:
    space = "{learning_rate: {log_uniform: [0.001, 0.01]}, blocks: {integers: [1, 3]}, dropout: {uniform: [0.1, 0.2]}}"
    drawn = draw_trials(settings(search__trials=60, families=f"{{cnn: {{space: {space}}}}}"))[1:]
    assert {hyper.blocks for hyper in drawn} == {1, 2, 3}
    assert all(0.001 <= hyper.learning_rate <= 0.01 and 0.1 <= hyper.dropout <= 0.2 for hyper in drawn)


@pytest.mark.parametrize(
    ("families", "sentence"),
    [
        ("{cnn: {space: {learning_rate: {log_uniform: [0, 1]}}}}", "log_uniform is \\[0, 1\\]; allowed is a <= b"),
        ("{cnn: {space: {dropout: {uniform: [1]}}}}", "allowed are two numbers"),
        ("{cnn: {space: {width: []}}}", "width is an empty list"),
        ("{cnn: {space: {dropout: {normal: [0, 1]}}}}", "allowed is a list, {uniform"),
        ("{cnn: {space: {depth: [1]}}}", "families.cnn.space has depth; allowed are"),
        ("{cnn: {default: {width: 1}}}", "width is 1"),
        ("{cnn: {default: {input_size: 512}}}", "input_size is 512, above pixels.decode_size 184"),
        ("{transfer: {default: {train: everything}}}", "train is 'everything'"),
        ("{}", "families is empty"),
    ],
)
def test_impossible_space_is_a_sentence(families: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        draw_trials(settings(families=families))


def test_unknown_setting_gets_a_suggestion() -> None:
    with pytest.raises(SettingsError, match="search.trails is not a setting; did you mean search.trials?"):
        parse_settings(TuneSettings, {"search": {"trails": 3}})


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        parse_settings(TuneSettings, {"search": {"trials": 0, "epochs": "many"}})
    assert len(caught.value.problems) == 2
    assert "'many'" in str(caught.value)


def test_grace_above_epochs_is_refused() -> None:
    with pytest.raises(SettingsError, match="grace_epochs is 9, above epochs 6"):
        settings(search__grace_epochs=9)


@pytest.mark.parametrize(
    "config", [*sorted((ROOT / "jobs" / "configs").glob("cars*.yaml")), ROOT / "carray" / "demo.yaml"]
)
def test_shipped_configurations_can_be_drawn(config: Path) -> None:
    chosen = load_settings(TuneSettings, config=str(config))
    assert len(draw_trials(chosen)) == chosen.search.trials


def test_a_single_override_keeps_the_other_defaults() -> None:
    assert set(settings(families__transfer__share=0.9).families) == {"cnn", "transfer"}

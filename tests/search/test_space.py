"""What a search is told: typed, with every problem said at once."""

from __future__ import annotations

import pytest

from carray.core.errors import SettingsError
from carray.core.settings import load_settings, parse_settings
from carray.search.space import TuneSettings


def settings(**overrides: object) -> TuneSettings:
    return load_settings(
        TuneSettings, overrides=[f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
    )


@pytest.mark.parametrize(
    ("families", "sentence"),
    [
        ("{cnn: {space: {depth: [1]}}}", "families.cnn.space has depth; allowed are"),
        ("{cnn: {default: {depth: 1}}}", "families.cnn.default has depth; allowed are"),
        ("{}", "families is empty"),
    ],
)
def test_a_family_takes_only_what_it_has(families: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        settings(families=families)


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


def test_a_single_override_keeps_the_other_defaults() -> None:
    assert set(settings(families__transfer__share=0.9).families) == {"cnn", "transfer"}


@pytest.mark.parametrize(("written", "rung0"), [("off", "off"), ("on", "on"), ("auto", "auto"), ("'off'", "off")])
def test_a_switch_may_be_written_as_yaml_writes_it(written: str, rung0: str) -> None:
    """YAML takes a bare off for False."""
    assert settings(search__rung0=written).search.rung0 == rung0

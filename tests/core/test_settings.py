"""Settings: every problem at once, each with the value seen and what to do."""

from __future__ import annotations

import pytest
from pydantic import Field

from carray.core.errors import SettingsError, StorageError
from carray.core.settings import Settings, dump_yaml, load_settings, parse_settings


class Search(Settings):
    trials: int = Field(default=8, ge=1)
    rate: float = 0.1
    name: str | None = None


class Tune(Settings):
    search: Search = Search()
    manifest: str


def test_file_and_overrides(tmp_path):
    (tmp_path / "tune.yaml").write_text("manifest: m.parquet\nsearch: {trials: 3}\n")
    settings = load_settings(
        Tune, config=str(tmp_path / "tune.yaml"), overrides=["search.rate=1e-3", "search.name='no'", "search.trials=4"]
    )
    assert settings == Tune(manifest="m.parquet", search=Search(trials=4, rate=0.001, name="no"))


def test_yaml_round_trip(tmp_path):
    settings = Tune(manifest="m: #1", search=Search(trials=2))
    (tmp_path / "tune.yaml").write_text(dump_yaml(settings))
    assert load_settings(Tune, config=str(tmp_path / "tune.yaml")) == settings


def test_all_problems_at_once():
    with pytest.raises(SettingsError) as caught:
        parse_settings(Tune, {"search": {"trails": 1, "trials": 0, "rate": "fast"}})
    assert len(caught.value.problems) == 4
    text = str(caught.value)
    assert "search.trails is not a setting; did you mean search.trials?" in text
    assert "search.trials is 0" in text
    assert "search.rate is 'fast'" in text
    assert "manifest is missing" in text


def test_an_unknown_key_that_resembles_nothing_lists_what_there_is():
    with pytest.raises(SettingsError, match=r"zzz is not a setting; allowed are search, search\.trials"):
        parse_settings(Tune, {"manifest": "m", "zzz": 1})


@pytest.mark.parametrize(
    ("override", "reason"),
    [("search.trials", "not key=value"), ("=3", "not key=value"), ("manifest.sub=1", "manifest is a single value")],
)
def test_bad_overrides(tmp_path, override, reason):
    (tmp_path / "tune.yaml").write_text("manifest: m.parquet\n")
    with pytest.raises(SettingsError, match=reason):
        load_settings(Tune, config=str(tmp_path / "tune.yaml"), overrides=[override])


@pytest.mark.parametrize(("text", "reason"), [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "holds a list")])
def test_bad_files(tmp_path, text, reason):
    (tmp_path / "tune.yaml").write_text(text)
    with pytest.raises(SettingsError, match=reason):
        load_settings(Tune, config=str(tmp_path / "tune.yaml"))


def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path):
    (tmp_path / "tune.yaml").write_text("manifest: m\nsearch:\n  trials: 3\n  rate: 1\n  trials: 4\nsearch: {}\n")
    with pytest.raises(SettingsError) as caught:
        load_settings(Tune, config=str(tmp_path / "tune.yaml"))
    assert [problem.partition(": ")[2] for problem in caught.value.problems] == [
        "search.trials is given twice (lines 3 and 5), and only one of the two would count; merge them.",
        "search is given twice (lines 2 and 6), and only one of the two would count; merge them.",
    ]
    # What an alias is merged with may be overridden: that is what it is for.
    (tmp_path / "tune.yaml").write_text("manifest: m\nsearch: {<<: {trials: 3, rate: 2}, trials: 5}\n")
    assert load_settings(Tune, config=str(tmp_path / "tune.yaml")).search == Search(trials=5, rate=2)
    with pytest.raises(SettingsError, match=r"--set 'search=\{trials: 1, trials: 2\}': trials is given twice"):
        load_settings(Tune, overrides=["search={trials: 1, trials: 2}"])
    with pytest.raises(SettingsError, match=r"search\.trials is set twice, by 'search\.trials=1' and"):
        load_settings(Tune, overrides=["search.trials=1", "search.trials=2"])


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "1e999"])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(SettingsError, match=r"search\.rate is .*finite"):
        load_settings(Tune, overrides=["manifest=m", f"search.rate={value}"])


def test_absent_file(tmp_path):
    with pytest.raises(StorageError, match=r"absent\.yaml does not exist"):
        load_settings(Tune, config=str(tmp_path / "absent.yaml"))


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        Search().trials = 3

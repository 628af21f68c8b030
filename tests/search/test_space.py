"""The settings of a search, every problem said at once, and the configurations that it draws from them."""

from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from carray.core.errors import SettingsError
from carray.core.settings import load_settings, parse_settings
from carray.search.space import TuneSettings, candidates, draw_trials, grid_size, read_domain
from carray.search.train.hyperparameters import CnnHyper, read_hyper

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
    ("families", "pixels", "decode_size"),
    [
        ("{cnn: {default: {input_size: 64}}}", "{}", 71),
        ("{cnn: {default: {input_size: 64}, space: {input_size: [32, 96]}}}", "{}", 107),
        ("{cnn: {default: {input_size: 64}, space: {eval_size: {integers: [64, 80]}}}}", "{view_crop: 1.0}", 80),
        ("{cnn: {default: {input_size: 64}}, transfer: {}}", "{}", 178),
        ("{cnn: {default: {input_size: 64}}}", "{decode_size: 100, input_size: 64}", 100),
    ],
)
def test_images_are_decoded_for_the_largest_trial(families: str, pixels: str, decode_size: int) -> None:
    given = settings(families=families, pixels=pixels)
    assert given.pixels.decode_size == decode_size
    assert TuneSettings.model_validate(given.model_dump(mode="json")).pixels == given.pixels


@pytest.mark.parametrize(
    ("families", "sentence"),
    [
        ("{cnn: {space: {learning_rate: {log_uniform: [0, 1]}}}}", "log_uniform is \\[0, 1\\]; allowed is a <= b"),
        ("{cnn: {space: {dropout: {uniform: [1]}}}}", "allowed are two numbers"),
        ("{cnn: {space: {width: []}}}", "width is an empty list"),
        ("{cnn: {space: {dropout: {normal: [0, 1]}}}}", "allowed is a list, {uniform"),
        ("{cnn: {default: {width: 1}}}", "width is 1"),
        ("{cnn: {default: {input_size: 4096}}}", "input_size is 4096, above pixels.decode_size 2048"),
        ("{transfer: {default: {train: everything}}}", "train is 'everything'"),
        ("{cnn: {space: {blocks: {integers: [1.2, 1.8]}}}}", "allowed are two whole numbers"),
        ("{cnn: {space: {blocks: {integers: [3, 1]}}}}", "integers is \\[3, 1\\]; allowed is a <= b"),
        ("{cnn: {space: {dropout: {uniform: [0, .inf]}}}}", "allowed is a <= b"),
    ],
)
def test_impossible_space_is_a_sentence(families: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        draw_trials(settings(families=families))


def test_a_choice_that_no_network_takes_is_refused_though_it_is_not_drawn() -> None:
    """The first trial is the default, so the space is not drawn from at all."""
    families = "{cnn: {space: {width: [16, 2], input_size: [64, 4096], dropout: {uniform: [0.5, 1.5]}}}}"
    with pytest.raises(SettingsError) as caught:
        draw_trials(settings(search__trials=1, families=families))
    assert caught.value.problems == [
        "families.cnn: dropout is 1.5: input should be less than 1.",
        "families.cnn: input_size is 4096, above pixels.decode_size 2048; lower it or raise pixels.decode_size.",
        "families.cnn: width is 2: input should be greater than or equal to 4.",
    ]


def test_two_values_that_do_not_go_together_are_a_sentence() -> None:
    families = "{cnn: {default: {batch_images: 16}, space: {micro_batch_images: [64]}}}"
    with pytest.raises(SettingsError, match="families.cnn: micro_batch_images is 64, above batch_images 16; lower it"):
        draw_trials(settings(families=families))


def test_draws_are_those_of_earlier_versions() -> None:
    """Recorded from the first version: a search that it began must go on with what it began with."""
    cnn = (
        "{share: 0.4, space: {width: [16, 32], learning_rate: {log_uniform: [0.0005, 0.005]}, "
        "blocks: {integers: [1, 4]}, dropout: {uniform: [0.0, 0.4]}}}"
    )
    families = f"{{cnn: {cnn}, transfer: {{share: 0.6, space: {{train: [head, all]}}}}}}"
    drawn = draw_trials(settings(search__trials=7, search__seed=3, families=families))
    assert [(h.width, h.learning_rate, h.blocks, h.dropout) if isinstance(h, CnnHyper) else h.train for h in drawn] == [
        "last_stages",
        (32, 0.001, 1, 0.1),
        "all",
        (16, 0.004989, 2, 0.128),
        "head",
        "head",
        (16, 0.00101, 2, 0.3331),
    ]


def test_a_number_that_yaml_reads_as_text_is_drawn_as_a_number() -> None:
    drawn = draw_trials(settings(families="{cnn: {space: {learning_rate: [1e-3]}}}", search__searcher="grid"))
    assert [hyper.learning_rate for hyper in drawn] == [0.001]


GRID = "{cnn: {default: {width: 16}, space: {width: [16, 32], blocks: {integers: [1, 3]}, kernel: [3, 5, 3]}}}"


def test_a_grid_holds_the_default_first_and_every_combination_once() -> None:
    drawn = draw_trials(settings(search__searcher="grid", search__trials=100, families=GRID))
    assert (drawn[0].width, drawn[0].blocks, drawn[0].kernel) == (16, 1, 3)
    combinations = [(hyper.width, hyper.blocks, hyper.kernel) for hyper in drawn]
    assert sorted(combinations) == sorted(product([16, 32], [1, 2, 3], [3, 5]))


def test_a_default_outside_of_the_grid_is_tried_as_well() -> None:
    families = "{cnn: {default: {width: 24}, space: {width: [16, 32]}}}"
    drawn = draw_trials(settings(search__searcher="grid", search__trials=100, families=families))
    assert [hyper.width for hyper in drawn[:1]] == [24]
    assert sorted(hyper.width for hyper in drawn) == [16, 24, 32]


def test_a_short_search_of_a_grid_takes_the_first_of_a_shuffled_order() -> None:
    whole = draw_trials(settings(search__searcher="grid", search__trials=100, families=GRID))
    assert draw_trials(settings(search__searcher="grid", search__trials=5, families=GRID)) == whole[:5]
    other = draw_trials(settings(search__searcher="grid", search__trials=100, search__seed=1, families=GRID))
    assert other != whole
    # Not the odometer's order, in which a short search would see one value of the first list only.
    assert {hyper.blocks for hyper in whole[:6]} == {1, 2, 3}


def test_a_family_whose_grid_is_exhausted_leaves_the_rest_to_the_other() -> None:
    families = "{cnn: {share: 0.9, space: {width: [16, 32]}}, transfer: {share: 0.1, space: {last_stages: [1, 2, 4]}}}"
    drawn = draw_trials(settings(search__searcher="grid", search__trials=100, families=families))
    assert Counter(hyper.family for hyper in drawn) == {"cnn": 2, "transfer": 4}


def test_the_size_of_a_grid_counts_the_default_once() -> None:
    assert grid_size(settings(search__searcher="grid", families=GRID)) == 12
    outside = "{cnn: {default: {width: 24}, space: {width: [16, 32]}}, transfer: {space: {last_stages: [1, 2, 4]}}}"
    assert grid_size(settings(search__searcher="grid", families=outside)) == 3 + 4


def test_a_grid_of_a_continuous_range_is_a_sentence() -> None:
    families = "{cnn: {space: {dropout: {uniform: [0.0, 0.4]}}}}"
    with pytest.raises(SettingsError, match="space.dropout is .*, of which a grid cannot try every value; give a list"):
        draw_trials(settings(search__searcher="grid", families=families))


def test_a_grid_nobody_could_run_is_a_sentence() -> None:
    families = "{cnn: {space: {width: {integers: [4, 512]}, batch_images: {integers: [2, 4096]}}}}"
    with pytest.raises(SettingsError, match="2,084,355 combinations; a grid may have 1,000,000"):
        draw_trials(settings(search__searcher="grid", families=families))


def test_candidates_name_every_backbone_with_every_weights_and_size() -> None:
    space = "backbone: [a, b], weights: [none, auto], last_stages: [1, 2], input_size: {integers: [64, 96]}"
    families = "{transfer: {space: {" + space + "}}, cnn: {}}"
    found = [h for h in candidates(settings(families=families)) if h.family == "transfer"]
    pairs = [("a", "none"), ("a", "auto"), ("b", "none"), ("b", "auto")]
    assert [(h.backbone, h.weights, h.input_size) for h in found] == [(*p, size) for p in pairs for size in (64, 96)]
    assert {h.last_stages for h in found} == {2}


def test_a_fixed_value_draws_nothing() -> None:
    """So a value that is fixed later leaves the other draws as they were."""
    used, fresh = np.random.default_rng(0), np.random.default_rng(0)
    assert read_domain("x", 3).draw(used) == 3
    assert used.random() == fresh.random()


@pytest.mark.parametrize(
    "config",
    [
        *sorted(path for path in (ROOT / "jobs" / "configs").glob("*.yaml") if path.stem != "classify"),
        ROOT / "carray" / "demo.yaml",
    ],
    ids=lambda path: path.stem,
)
def test_shipped_configurations_can_be_drawn(config: Path) -> None:
    chosen = load_settings(TuneSettings, config=str(config))
    assert len(draw_trials(chosen)) == chosen.search.trials


def test_a_relative_path_of_weights_means_the_same_in_every_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = {"transfer": {"space": {"weights": ["./a", "none"]}, "default": {"backbone": "local-dir:net"}}}
    drawn = draw_trials(TuneSettings.model_validate({"families": space, "search": {"searcher": "grid", "trials": 9}}))
    assert {hyper.weights for hyper in drawn} == {"auto", "none", str(tmp_path / "a")}
    assert {hyper.backbone for hyper in drawn} == {f"local-dir:{tmp_path}/net"}
    with pytest.raises(ValueError, match="misspelled address of S3"):
        read_hyper({"family": "transfer", "weights": "s3:/b"})


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

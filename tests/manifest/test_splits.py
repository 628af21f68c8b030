"""Splits: stable, by content, duplicates together, given ones untouched, every class trained and validated."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from carray.core.errors import SettingsError
from carray.core.settings import parse_settings
from carray.manifest.splits import SplitSettings, assign_splits, earlier_splits, parse_split

SETTINGS = SplitSettings()


def images(labels: list[str | None], *, start: int = 0, given: list[str | None] | None = None) -> pd.DataFrame:
    """Make rows of different content; row i's bytes are those of number start + i."""
    contents = [hashlib.sha256(str(start + i).encode()).hexdigest() for i in range(len(labels))]
    rows = pd.DataFrame({"sha256": contents, "label": labels, "status": "ok", "split": given or [None] * len(labels)})
    rows["uri"] = [f"/images/{start + i}.jpg" for i in range(len(labels))]
    for name in ("x1", "y1", "x2", "y2"):
        rows[name] = pd.array([None] * len(labels), dtype="Int32")
    return rows.astype({"label": "string", "split": "string"})


def alone(rows: pd.DataFrame) -> list[int]:
    return list(range(len(rows)))


def classes(count: int, of_each: int) -> list[str | None]:
    return [f"class {i % count}" for i in range(count * of_each)]


def test_shares_are_as_asked():
    splits = Counter(assign_splits(rows := images(classes(4, 1000)), alone(rows), SETTINGS))
    assert splits["train"] == pytest.approx(2800, abs=120)
    assert splits["val"] == pytest.approx(600, abs=100)
    assert splits["test"] == pytest.approx(600, abs=100)


def test_path_and_order_do_not_matter():
    rows = images(classes(5, 20))
    splits = dict(zip(rows["sha256"], assign_splits(rows, alone(rows), SETTINGS), strict=True))
    other = rows.sample(frac=1, random_state=1).assign(uri="elsewhere")
    assert dict(zip(other["sha256"], assign_splits(other, alone(other), SETTINGS), strict=True)) == splits


def test_salt_gives_another_division():
    rows = images(classes(5, 40))
    one, other = (assign_splits(rows, alone(rows), SplitSettings(salt=salt)) for salt in ("", "b"))
    assert sum(a != b for a, b in zip(one, other, strict=True)) > 50


@pytest.mark.parametrize("seed", range(20))
def test_adding_images_moves_none_but_the_one_that_filled_an_empty_val(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, 60))
    labels: list[str | None] = [f"class {i}" for i in rng.integers(0, 8, count + 40)]
    small = images(labels[:count], start=1000 * seed)
    large = images(labels, start=1000 * seed)
    before = assign_splits(small, alone(small), SETTINGS)
    after = assign_splits(large, alone(large), SETTINGS)[:count]
    moved = [labels[i] for i in range(count) if before[i] != after[i]]
    assert max(Counter(moved).values(), default=0) <= 1
    for label in set(moved):
        own = [i for i in range(count) if labels[i] == label]
        assert sum(before[i] == "val" for i in own) <= 1 or sum(before[i] == "train" for i in own) == 1


@pytest.mark.parametrize("seed", range(20))
def test_extending_moves_nothing_at_all(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 40))
    labels: list[str | None] = [f"class {i}" for i in rng.integers(0, 8, count + 40)]
    old = images(labels[:count], start=1000 * seed)
    old["split"] = assign_splits(old, alone(old), SETTINGS)
    new = images(labels, start=1000 * seed).sample(frac=1, random_state=seed).reset_index(drop=True)
    earlier, absent = earlier_splits(new, old)
    assert absent.empty
    assigned = dict(zip(new["sha256"], assign_splits(new, alone(new), SETTINGS, earlier=earlier), strict=True))
    assert [assigned[sha256] for sha256 in old["sha256"]] == old["split"].tolist()
    assert all(assigned.values())


@pytest.mark.parametrize("size", range(1, 9))
def test_small_classes_are_trained_and_from_three_on_validated(size):
    for start in range(0, 3000, 100):
        rows = images(["a"] * size, start=start)
        splits = Counter(assign_splits(rows, alone(rows), SETTINGS))
        assert splits["train"] >= 1
        assert size < 3 or splits["val"] >= 1


def test_single_image_of_a_class_trains():
    rows = images([f"class {i}" for i in range(200)])
    assert set(assign_splits(rows, alone(rows), SETTINGS)) == {"train"}


def test_duplicates_stay_together_and_follow_the_lowest_content():
    rows = images(classes(4, 100))
    groups = [i // 4 for i in range(400)]
    splits = assign_splits(rows, groups, SETTINGS)
    assert all(len({splits[i] for i in range(400) if groups[i] == group}) == 1 for group in set(groups))
    lowest = rows.assign(group=groups).sort_values("sha256").groupby("group").head(1)
    singly = assign_splits(lowest, lowest["group"].tolist(), SETTINGS)
    assert singly == [splits[i] for i in lowest.index]


def test_class_of_one_picture_trains_whole():
    rows = images(["a"] * 6 + ["b"] * 30)
    splits = assign_splits(rows, [0] * 6 + list(range(1, 31)), SETTINGS)
    assert set(splits[:6]) == {"train"}


def test_given_test_split_is_kept_and_val_comes_from_train():
    given = ["test" if i % 3 == 0 else "train" for i in range(900)]
    rows = images(classes(6, 150), given=given)
    groups = [i // 2 for i in range(900)]
    splits = assign_splits(rows, groups, SETTINGS)
    assert [split == "test" for split in splits] == [split == "test" for split in given]
    assert splits.count("val") == pytest.approx(90, abs=35)


def test_given_val_split_is_kept_and_test_comes_from_train():
    given = ["val" if i % 4 == 0 else "train" for i in range(800)]
    rows = images(classes(4, 200), given=given)
    splits = assign_splits(rows, alone(rows), SETTINGS)
    assert [split == "val" for split in splits] == [split == "val" for split in given]
    assert splits.count("test") == pytest.approx(90, abs=35)


def test_unlabelled_and_unreadable_images_have_no_split():
    rows = images(["a", None, "a", "b"])
    rows.loc[2, "status"] = "decode_error"
    splits = assign_splits(rows, alone(rows), SETTINGS)
    assert [split is None for split in splits] == [False, True, True, False]


def test_new_image_joins_the_split_of_its_old_duplicate_even_of_an_absent_one():
    old = images(["a"] * 60)
    old["split"] = assign_splits(old, alone(old), SETTINGS)
    new = images(["a"] * 60, start=500)
    earlier, absent = earlier_splits(new, old)
    assert len(absent) == 60
    assert earlier == [None] * 60
    groups = [*range(60), *range(60)]
    splits = assign_splits(new, groups, SETTINGS, earlier=[*earlier, *absent["split"]])
    assert splits == old["split"].tolist()


def test_new_image_does_not_join_a_given_test_split():
    old = images(["a"] * 10, given=["test"] * 10)
    new = pd.concat([old, images(["a"] * 10, start=50, given=["train"] * 10)], ignore_index=True)
    earlier, absent = earlier_splits(new, old)
    splits = assign_splits(new, [*range(10), *range(10)], SETTINGS, earlier=[*earlier, *absent["split"]])
    assert splits[:10] == ["test"] * 10
    assert "test" not in splits[10:]


def test_moved_file_and_another_box_are_told_apart():
    old = images(["a", "a"]).assign(x1=pd.array([None, 5], dtype="Int32"), split=["val", "test"])
    new = old.assign(uri=["/moved/0.jpg", "/moved/1.jpg"], x1=pd.array([None, 6], dtype="Int32"))
    earlier, absent = earlier_splits(new, old)
    assert earlier == ["val", None]
    assert absent["split"].tolist() == ["test"]


@pytest.mark.parametrize(
    ("text", "fractions"),
    [
        ("70/15/15", (0.7, 0.15, 0.15)),
        ("80/20/0", (0.8, 0.2, 0)),
        ("0/0/100", (0, 0, 1)),
        ("66.6/16.7/16.7", (0.666, 0.167, 0.167)),
    ],
)
def test_split_text_is_read(text, fractions):
    settings = parse_split(text)
    assert (settings.train_fraction, settings.val_fraction, settings.test_fraction) == pytest.approx(fractions)


@pytest.mark.parametrize(
    "text", ["", "70/30", "70/15/15/0", "70/15/16", "110/-5/-5", "a/b/c", "nan/50/50", "inf/0/0", "0.7/0.15/0.15"]
)
def test_wrong_split_text_is_refused_with_its_value(text):
    with pytest.raises(SettingsError, match=r"split is '.*'; it must be train/val/test, three numbers") as caught:
        parse_split(text)
    assert repr(text) in str(caught.value)


def test_everything_may_be_test():
    rows = images(classes(3, 5))
    assert set(assign_splits(rows, alone(rows), parse_split("0/0/100"))) == {"test"}


def test_fractions_above_one_are_refused():
    with pytest.raises(SettingsError, match=r"val_fraction 0.6 and test_fraction 0.5 sum to over 1"):
        parse_settings(SplitSettings, {"val_fraction": 0.6, "test_fraction": 0.5})

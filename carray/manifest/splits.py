"""Assigns images to train, val and test by content, and caps the training images of a class.

- hash(salt, sha256) is an image's position in 0..1: the first `test_fraction` is test, the next `val_fraction` val, the
  rest train. It never depends on a path.
- Images of one duplicate group share the position of their lowest sha256, so copies never cross splits.
- A given test or val split is earlier whole, and the hash adds nothing to it; what it would have put there trains.
- A class keeps an image in train, and has one in val where it has three images (in two groups at least) outside a
  given test split; the images nearest to the thresholds are moved for it.
- With an older manifest (`prepare --extend`) assigned splits stay, a new image joins its duplicates, and only then the
  hash decides.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from carray.core.errors import SettingsError
from carray.core.settings import Settings
from carray.core.uri_tables import BOX
from carray.manifest.labels import normalise_labels
from carray.manifest.manifest_file import SPLITS

__all__ = [
    "SET_ASIDE",
    "SplitSettings",
    "assign_splits",
    "cap_classes",
    "changed_labels",
    "earlier_splits",
    "parse_split",
]

_BOX = list(BOX)

SET_ASIDE = "set_aside"
"""The error_code of a readable, labelled image above the limit for its class."""


class SplitSettings(Settings):
    """How images without a given split are divided."""

    val_fraction: float = Field(default=0.15, ge=0.0, le=1.0)
    """Share of images for choosing among trials; of the train part where a test split is given."""
    test_fraction: float = Field(default=0.15, ge=0.0, le=1.0)
    """Share of images for the final evaluation; unused where a test split is given."""
    salt: str = ""
    """Another text gives another, equally stable division."""

    @model_validator(mode="after")
    def _check_sum(self) -> SplitSettings:
        if self.val_fraction + self.test_fraction > 1 + 1e-9:
            raise ValueError(
                f"val_fraction {self.val_fraction:g} and test_fraction {self.test_fraction:g} sum to over 1; lower one"
            )
        return self

    @property
    def train_fraction(self) -> float:
        """The share of training images."""
        rest = 1 - self.val_fraction - self.test_fraction
        return rest if rest > 1e-9 else 0.0

    def split_at(self, position: float, whole: Collection[str]) -> str:
        """Determine the split of an image at a position in 0..1; train instead of one that the source gives whole."""
        split = "train"
        if position < self.test_fraction:
            split = "test"
        elif position < self.test_fraction + self.val_fraction:
            split = "val"
        return "train" if split in whole else split


def parse_split(text: str, *, salt: str = "") -> SplitSettings:
    """Read `train/val/test` percentages, such as 70/15/15.

    Raises:
        SettingsError: not three numbers of at least 0 that sum to 100.
    """
    try:
        train, val, test = (float(part) for part in text.split("/"))
    except ValueError:
        train = val = test = -1.0
    if not (min(train, val, test) >= 0 and abs(train + val + test - 100) < 1e-6):
        raise SettingsError(
            f"split is {text!r}; it must be train/val/test, three numbers from 0 up, of sum 100, such as 70/15/15."
        )
    return SplitSettings(val_fraction=val / 100, test_fraction=test / 100, salt=salt)


@dataclass
class _Unit:
    """A duplicate group's images whose split is not fixed; they move together."""

    members: list[int]
    labels: Counter[str]
    position: float
    split: str


def assign_splits(
    rows: pd.DataFrame, groups: Sequence[int], settings: SplitSettings, *, earlier: Sequence[str | None] | None = None
) -> list[str | None]:
    """Assign each row to a split; null where it has no label or no readable pixels.

    `rows` needs sha256, label, status and split (as given); `groups` numbers duplicates; `earlier` holds splits of an
    older manifest. Both may be longer than `rows`: images that are not in it still attract their duplicates.
    """
    usable = ((rows["status"] == "ok") & rows["label"].notna()).tolist()
    given = [split if isinstance(split, str) else None for split in rows["split"]]
    whole = {split for split in given if split in ("val", "test")}
    earlier = list(earlier) if earlier is not None else [None] * len(rows)
    attracted = _group_splits(earlier, groups, whole)
    splits: list[str | None] = [None] * len(rows)
    free: dict[int, list[int]] = defaultdict(list)
    labels, sha256 = rows["label"].tolist(), rows["sha256"].tolist()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for i in (i for i in range(len(rows)) if usable[i]):
        group = int(groups[i])
        splits[i] = given[i] if given[i] in whole else earlier[i] or attracted.get(group)
        if splits[i] is None:
            free[group].append(i)
        elif given[i] != "test":
            counts[labels[i]][str(splits[i])] += 1
    units = []
    for members in free.values():
        position = _position(min(sha256[i] for i in members), settings.salt)
        unit = _Unit(members, Counter(labels[i] for i in members), position, settings.split_at(position, whole))
        units.append(unit)
        for label, images in unit.labels.items():
            counts[label][unit.split] += images
    _fill_classes(units, counts, settings, whole)
    for unit in units:
        for i in unit.members:
            splits[i] = unit.split
    return splits


def earlier_splits(rows: pd.DataFrame, old: pd.DataFrame) -> tuple[list[str | None], pd.DataFrame]:
    """Match rows to an older manifest by sha256 and box: each row's old split, and the old rows that matched none."""
    old = old[(old["status"] == "ok") & old["split"].notna()]
    by_uri: dict[tuple[str, ...], str] = {}
    by_content: dict[tuple[str, ...], str] = {}
    old_contents = _contents(old)
    for content, uri, split in zip(old_contents, old["uri"], old["split"], strict=True):
        by_uri[(*content, uri)] = split
        # A copy in two splits counts as train, so that no given split gains an image.
        by_content[content] = min(by_content.get(content, split), split, key=SPLITS.index)
    contents = _contents(rows)
    earlier = [
        by_uri.get((*content, uri)) or by_content.get(content)
        for content, uri in zip(contents, rows["uri"], strict=True)
    ]
    here = set(contents)
    return earlier, old[[content not in here for content in old_contents]]


def cap_classes(
    rows: pd.DataFrame, groups: Sequence[int], *, balance: int, earlier: Sequence[str | None] | None = None
) -> pd.DataFrame:
    """Remove training images above the limit from their split, with the reason in error_code and error.

    Which images stay depends on their content; the first image of a duplicate group stays before the second of any.

    Args:
        rows: columns as MANIFEST_SCHEMA, splits assigned; not changed.
        groups: numbers of duplicate groups; may be longer than `rows`.
        balance: how many training images a class may have.
        earlier: splits of an older manifest, whose training images stay before new ones.
    """
    train = rows.loc[rows["split"] == "train", ["sha256", *_BOX, "label", "uri"]]
    at = train.index.to_numpy()
    was_train = np.array([split == "train" for split in earlier or [None] * len(rows)], dtype=bool)
    train = train.assign(group=np.asarray(groups)[at], is_new=~was_train[at])
    # A hash is as good as a random draw, and independent of the uri, which only orders exact copies.
    train = train.sort_values(["is_new", "sha256", *_BOX, "uri"])
    train["copy"] = train.groupby(["label", "group"]).cumcount()
    train = train.sort_values(["is_new", "copy"], kind="stable")
    over = train[train.groupby("label").cumcount() >= balance]
    counts = train["label"].value_counts()
    reasons = [
        f"{label!r} has {counts[label]:,} images to train on; balance keeps {balance:,}" for label in over["label"]
    ]
    changed = rows.copy()
    changed.loc[over.index, "split"] = pd.NA
    changed.loc[over.index, "error_code"] = SET_ASIDE
    changed.loc[over.index, "error"] = reasons
    return changed


def changed_labels(rows: pd.DataFrame, old: pd.DataFrame) -> list[str]:
    """List the images, by sha256 and box, whose label changed: `uri: old label -> new label`."""
    old, before = old[(old["status"] == "ok") & old["label"].notna()], defaultdict(set)
    for content, label in zip(_contents(old), normalise_labels(old["label"])[0], strict=True):
        before[content].add(label)
    return [
        f"{uri}: {min(before[content])} -> {label}"
        for content, uri, label in zip(_contents(rows), rows["uri"], rows["label"], strict=True)
        if content in before and pd.notna(label) and label not in before[content]
    ]


def _contents(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    # An unreadable image has no sha256 and so matches nothing: no readable one has the empty hash.
    texts = rows[["sha256", *_BOX]].astype("string").fillna("")
    return list(texts.itertuples(index=False, name=None))


def _group_splits(earlier: Sequence[str | None], groups: Sequence[int], whole: set[str]) -> dict[int, str]:
    """Find the split that each group's new images join; never one that the source gives whole."""
    found: dict[int, Counter[str]] = defaultdict(Counter)
    for group, split in zip(groups, earlier, strict=True):
        if split is not None and split not in whole:
            found[int(group)][split] += 1
    return {group: max(SPLITS, key=lambda split: counts[split]) for group, counts in found.items()}


def _position(sha256: str, salt: str) -> float:
    return int(hashlib.sha256(f"{salt}:{sha256}".encode()).hexdigest()[:13], 16) / 16**13


def _fill_classes(
    units: list[_Unit], counts: dict[str, Counter[str]], settings: SplitSettings, whole: set[str]
) -> None:
    """Move single units so that every class can be trained and, from three images on, validated."""
    of_class: dict[str, list[_Unit]] = defaultdict(list)
    for unit in sorted(units, key=lambda unit: unit.position):
        for label in unit.labels:
            of_class[label].append(unit)
    for label in sorted(of_class):
        if settings.train_fraction and not counts[label]["train"]:
            _move(of_class[label][-1], "train", counts)
    if "val" in whole or not settings.val_fraction:
        return
    for label in sorted(of_class):
        if counts[label]["val"] or counts[label].total() < 3:
            continue
        spare = [unit for unit in of_class[label] if unit.split == "train" and _is_spare(unit, counts)]
        spare += [unit for unit in of_class[label] if unit.split == "test"]
        if spare:
            _move(spare[0], "val", counts)


def _is_spare(unit: _Unit, counts: dict[str, Counter[str]]) -> bool:
    return all(counts[label]["train"] > images for label, images in unit.labels.items())


def _move(unit: _Unit, split: str, counts: dict[str, Counter[str]]) -> None:
    for label, images in unit.labels.items():
        counts[label][unit.split] -= images
        counts[label][split] += images
    unit.split = split

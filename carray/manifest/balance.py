"""Caps the training images a class, so that a few common classes do not take most of an epoch.

From: rows with their splits and duplicate groups. To: which rows are set aside, as rows with their reason.
Invariants: validation and test stay as they are; which images stay depends on their content, never on their path or
order; the first image of a duplicate group stays before the second of any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

__all__ = ["SET_ASIDE", "cap_classes"]

SET_ASIDE = "set_aside"
"""The error_code of an image that could be read and has a label, but is over the cap."""

_CONTENT = ["sha256", "x1", "y1", "x2", "y2"]


def cap_classes(
    rows: pd.DataFrame, groups: Sequence[int], *, balance: int, kept: Sequence[str | None] | None = None
) -> pd.DataFrame:
    """Take the split from training images over the cap and say so in error_code and error; gives changed rows.

    Args:
        rows: columns as MANIFEST_SCHEMA, splits assigned; not changed.
        groups: numbers duplicates; may go on beyond `rows`.
        balance: how many training images a class may have.
        kept: splits of an older manifest, whose training images stay before new ones.
    """
    train = rows.loc[rows["split"] == "train", [*_CONTENT, "label", "uri"]]
    at = train.index.to_numpy()
    was_train = np.array([split == "train" for split in kept or [None] * len(rows)], dtype=bool)
    train = train.assign(group=np.asarray(groups)[at], is_new=~was_train[at])
    # A hash is as good as a draw, and the same wherever the image lies; uri only tells exact copies apart.
    train = train.sort_values(["is_new", *_CONTENT, "uri"])
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

"""Normalises labels from any source, and finds those that look like mistakes.

A null, NaN or blank label is none; white space is collapsed and stripped; Unicode is composed (NFC). Labels that may
mean the same are reported, not merged.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable

import pandas as pd

__all__ = ["normalise_labels", "similar_labels", "unsure_labels", "whole_number_labels"]

_UNSEEN = str.maketrans("", "", "\u200b\u2060\ufeff")
"""Spaces without width: a break, a joiner, a byte order mark."""
_NO_LABELS = {
    *("none", "null", "nil", "nan", "-nan", "nat", "na", "n/a", "n.a.", "<na>", "#n/a", "#na", "\\n"),
    *("?", "-", "--", ".", "undefined", "missing", "unlabelled", "unlabeled"),
}
"""Spellings of a missing label, in lower case."""


def normalise_labels(labels: pd.Series) -> tuple[pd.Series, dict[str, int]]:
    """Normalise labels, null where there is none, and count the changed ones by what changed.

    The counts' keys are `blank` (no label at all), `blanks` and `unicode form`; zeros are left out.
    """
    normalised: dict[str, str | None] = {}
    changed: dict[str, int] = defaultdict(int)
    for label, images in labels.value_counts().items():
        composed = unicodedata.normalize("NFC", str(label))
        normalised[str(label)] = " ".join(composed.translate(_UNSEEN).split()) or None
        if normalised[str(label)] is None:
            changed["blank"] += int(images)
        else:
            changed["blanks"] += int(images) * (normalised[str(label)] != composed)
            changed["unicode form"] += int(images) * (composed != str(label))
    return labels.map(normalised, na_action="ignore").astype("string"), {what: n for what, n in changed.items() if n}


def whole_number_labels(labels: pd.Series) -> pd.Series:
    """Convert `1.0` to `1` where all labels are so: pandas writes integers so in a column with a null."""
    texts = labels.dropna().drop_duplicates()
    if labels.isna().any() and len(texts) and texts.str.fullmatch(r"-?\d+\.0").all():
        return labels.str.removesuffix(".0")
    return labels


def similar_labels(labels: Iterable[str]) -> list[list[str]]:
    """Group labels that differ only by case, by compatible letters, or by how one number is written."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[_comparison_key(label)].append(label)
    return [group for group in groups.values() if len(group) > 1]


def unsure_labels(labels: Iterable[str]) -> list[str]:
    """Find the labels that look like a missing one, such as None, NULL or nan."""
    return [label for label in labels if label.casefold() in _NO_LABELS]


def _comparison_key(label: str) -> str:
    folded = unicodedata.normalize("NFKC", label).casefold()
    try:
        return f"{float(folded):g}"
    except ValueError:
        return folded

"""Compares a search that was killed and went on with one that nobody disturbed.

From: two logs and two outcomes. To: complaints in words, none where they are the same.
Invariants: seconds and clocks may differ, nothing else; figures are compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FIGURES", "changed", "differences", "other_winner"]

FIGURES = ("family", "train_loss", "val_loss", "val_top1", "val_top5", "learning_rate")


def differences(reference: Sequence[Mapping[str, Any]], drilled: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare two logs, each in the order of its sequence numbers: epochs, decisions, order and figures."""
    found = []
    pairs = [(entry["number"], entry["epoch"]) for entry in drilled]
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    found += [f"trial {number} logged epoch {epoch} twice" for number, epoch in twice]
    expected = [(entry["number"], entry["epoch"]) for entry in reference]
    if sorted(set(pairs)) != sorted(expected):
        found.append(
            f"epochs missing: {sorted(set(expected) - set(pairs))}, too many: {sorted(set(pairs) - set(expected))}"
        )
    elif pairs != expected and not twice:
        place = next(i for i, (ours, theirs) in enumerate(zip(pairs, expected, strict=True)) if ours != theirs)
        found.append(f"another order: entry {place + 1} is of (trial, epoch) {pairs[place]}, not {expected[place]}")
    sequences = [entry["sequence"] for entry in drilled]
    if sequences != sorted(set(sequences)):
        found.append("sequence numbers do not grow")
    known = {(entry["number"], entry["epoch"]): entry for entry in reference}
    for entry in drilled:
        other = known.get((entry["number"], entry["epoch"]), entry)
        found += [
            f"trial {entry['number']} epoch {entry['epoch']}: {name} is {entry[name]}, not {other[name]}"
            for name in ("decision", *FIGURES)
            if entry[name] != other[name]
        ]
    return found


def changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """Give the entries of an earlier log that are gone from a later one, or written anew."""
    later = {entry["sequence"]: entry for entry in after}
    return [
        f"entry {entry['sequence']} (trial {entry['number']}, epoch {entry['epoch']}) was written anew or is gone"
        for entry in before
        if later.get(entry["sequence"]) != entry
    ]


def other_winner(reference: Mapping[str, Any], drilled: Mapping[str, Any]) -> list[str]:
    """Compare two outcomes: the winner, and how many trials ended how."""
    names = ("best_trial", "best_val_top1", "trials", "by_status")
    return [
        f"{name} is {drilled.get(name)}, not {reference.get(name)}"
        for name in names
        if drilled.get(name) != reference.get(name)
    ]

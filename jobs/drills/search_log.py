"""Compares the log of a search that was disturbed and resumed with an undisturbed one; returns complaints in words.

Seconds and clocks may differ; figures are compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Entries = Sequence[Mapping[str, Any]]

FIGURES = ("family", "train_loss", "val_loss", "val_top1", "val_top5", "learning_rate")


@dataclass(frozen=True)
class Reference:
    """What drills are compared with."""

    entries: Entries
    """The log of an undisturbed search."""
    unpruned: Entries
    """The log of the same trials, each trained to its last epoch."""
    done: Mapping[str, Any]
    """The undisturbed search's outcome."""


def disagreements(reference: Reference, drilled: Entries, done: Mapping[str, Any]) -> list[str]:
    """Check a log whose order may differ: every epoch once and with its figures, every trial ended, the right best."""
    found = _doubled(drilled)
    known = {(entry["number"], entry["epoch"]): entry for entry in reference.unpruned}
    for entry in drilled:
        if (entry["number"], entry["epoch"]) not in known:
            found.append(f"trial {entry['number']} has no epoch {entry['epoch']}")
        found += _other_figures(entry, known.get((entry["number"], entry["epoch"]), entry), FIGURES)
    last = {entry["number"]: entry["decision"] for entry in drilled}
    found += [f"trial {number} is without an end" for number in last if last[number] == "continue"]
    if len(last) != reference.done["trials"] or done["trials"] != reference.done["trials"]:
        found.append(f"{len(last)} trials are logged and {done['trials']} told of, not {reference.done['trials']}")
    best = max(entry["val_top1"] for entry in drilled)
    if done["best_val_top1"] != best:
        found.append(f"best_val_top1 is {done['best_val_top1']}, and the log's best {best}")
    return found


def differences(reference: Sequence[Mapping[str, Any]], drilled: Sequence[Mapping[str, Any]]) -> list[str]:
    """Compare two logs in the order of their sequence numbers: epochs, decisions, order and figures."""
    found = _doubled(drilled)
    pairs = [(entry["number"], entry["epoch"]) for entry in drilled]
    expected = [(entry["number"], entry["epoch"]) for entry in reference]
    if sorted(set(pairs)) != sorted(expected):
        found.append(
            f"epochs missing: {sorted(set(expected) - set(pairs))}, too many: {sorted(set(pairs) - set(expected))}"
        )
    elif pairs != expected and not found:
        i = next(i for i, (ours, theirs) in enumerate(zip(pairs, expected, strict=True)) if ours != theirs)
        found.append(f"another order: entry {i + 1} is of (trial, epoch) {pairs[i]}, not {expected[i]}")
    known = {(entry["number"], entry["epoch"]): entry for entry in reference}
    for entry in drilled:
        found += _other_figures(entry, known.get((entry["number"], entry["epoch"]), entry), ("decision", *FIGURES))
    return found


def _doubled(drilled: Entries) -> list[str]:
    pairs = [(entry["number"], entry["epoch"]) for entry in drilled]
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    found = [f"trial {number} logged epoch {epoch} twice" for number, epoch in twice]
    sequences = [entry["sequence"] for entry in drilled]
    if sequences != sorted(set(sequences)):
        found.append("sequence numbers do not grow")
    return found


def _other_figures(entry: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    epoch = f"trial {entry['number']} epoch {entry['epoch']}"
    return [f"{epoch}: {name} is {entry[name]}, not {other[name]}" for name in names if entry[name] != other[name]]


def changed(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[str]:
    """List the entries of an earlier log that are missing or changed in a later one."""
    later = {entry["sequence"]: entry for entry in after}
    return [
        f"entry {entry['sequence']} (trial {entry['number']}, epoch {entry['epoch']}) was written anew or is gone"
        for entry in before
        if later.get(entry["sequence"]) != entry
    ]


def other_winner(reference: Mapping[str, Any], drilled: Mapping[str, Any]) -> list[str]:
    """Compare two outcomes: the winner, and the trials by status."""
    names = ("best_trial", "best_val_top1", "trials", "by_status")
    return [
        f"{name} is {drilled.get(name)}, not {reference.get(name)}"
        for name in names
        if drilled.get(name) != reference.get(name)
    ]

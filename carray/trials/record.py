"""Opens a run folder and keeps its log: one entry a (trial, epoch), with the decision, before anybody acts on it.

From: settings and a manifest; then epoch after epoch. To: RUN/search.json, RUN/log, RUN/trials/ID/trial.json
(trials.format).
Invariants: one process writes the log; sequence numbers grow over every start of the search.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.storage import exists, join, read_json, write_json
from carray.manifest.format import Manifest
from carray.trials import format as runs
from carray.trials.hyper import CnnHyper, TransferHyper
from carray.trials.nets import check_backbone
from carray.trials.space import SearchSettings, TuneSettings
from carray.trials.weights import check_weights

__all__ = ["METRIC", "SearchLog", "check_search", "open_run"]

METRIC = "best_val_top1"
"""What schedulers compare: the best epoch so far, so that one bad last epoch stops nobody."""

_STATUS = {"stop": "stopped", "finish": "finished", "non_finite": "non_finite"}


def check_search(manifest: Manifest, configurations: list[CnnHyper | TransferHyper]) -> None:
    """Check, before anything is launched, that the data, the backbones and their weights are there.

    Raises:
        SchemaError: no usable training or validation image.
        SettingsError: fewer than two classes, an unknown backbone, or weights that are not to be had.
    """
    for split in ("train", "val"):
        manifest.of_split(split)
    if len(manifest.classes) < 2:
        raise SettingsError(f"{manifest.uri} has {len(manifest.classes)} class; a classifier needs at least two.")
    for backbone, weights in sorted({(h.backbone, h.weights) for h in configurations if isinstance(h, TransferHyper)}):
        check_backbone(backbone)
        check_weights(backbone, weights)


def open_run(
    run: str, manifest: Manifest, settings: TuneSettings, configurations: list[CnnHyper | TransferHyper]
) -> None:
    """Write search.json, or check that the one there is of this very search.

    Raises:
        SettingsError: the folder holds another search.
    """
    wanted = {
        "version": runs.VERSION,
        "manifest": manifest.uri,
        "manifest_fingerprint": manifest.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "configurations": [hyper.model_dump(mode="json") for hyper in configurations],
    }
    place = join(run, runs.SEARCH)
    if not exists(place):
        write_json(place, {**wanted, "created_at": datetime.now(UTC).isoformat(timespec="seconds")})
        return
    there = read_json(place)
    differing = [key for key in wanted if key != "manifest" and there.get(key) != wanted[key]]
    if differing:
        raise SettingsError(
            f"{run} holds another search (its {', '.join(differing)} differ); name another --out, or repeat the "
            "command with the settings of that search to continue it."
        )
    say(f"{run} was started before: what is finished there is kept")


class SearchLog:
    """Keeps one search's log and says each epoch in a line."""

    def __init__(self, run: str, search: SearchSettings, ended: Mapping[int, Mapping[str, Any]]) -> None:
        self._run, self._search, self._ended = run, search, ended
        self._done = len(ended)
        self._best: tuple[float, str] = (-1.0, "none")
        self._started = time.monotonic()
        self._added: set[tuple[int, int]] = set()
        self._earlier = runs.read_log(run)
        self._sequence = max((entry["sequence"] for entry in self._earlier), default=0)

    def replayed(self) -> Iterator[dict[str, Any]]:
        """Give the finite epochs of trials that ended in an earlier start, in the order of the decisions made then."""
        best: dict[int, float] = {}
        for entry in self._earlier:
            number = entry["number"]
            if number in self._ended and runs.is_finite(entry):
                best[number] = max(best.get(number, -1.0), entry["val_top1"])
                self._compare(best[number], runs.trial_id(number))
                yield {**entry, METRIC: best[number]}

    def has(self, entry: Mapping[str, Any]) -> bool:
        """Say whether this start has logged that epoch of that trial."""
        return (entry["number"], entry["epoch"]) in self._added

    def add(self, entry: Mapping[str, Any], decision: str) -> None:
        """Log one epoch and what was decided: continue, stop, finish or non_finite.

        Raises:
            StorageError: storage refused the entry after every try.
        """
        self._added.add((entry["number"], entry["epoch"]))
        self._sequence += 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        trial = runs.trial_id(entry["number"])
        record = {"sequence": self._sequence, "trial_id": trial, **entry, "decision": decision, "logged_at": now}
        runs.write_log_entry(self._run, record)
        if decision != "non_finite":
            self._compare(entry["val_top1"], trial)
        if decision != "continue":
            reason = _reason(entry, decision)
            runs.write_trial_end(self._run, entry["number"], status=_STATUS[decision], reason=reason)
            self._done += 1
        self._say(entry, trial, decision)

    def fail(self, number: int, reason: str) -> None:
        """Note that a trial ended in an error.

        Raises:
            StorageError: storage refused the note after every try.
        """
        runs.write_trial_end(self._run, number, status="failed", reason=reason)
        self._done += 1
        say(f"tune: {runs.trial_id(number)} failed: {reason}  trials {self._done}/{self._search.trials}")

    def _compare(self, val_top1: float, trial: str) -> None:
        if val_top1 > self._best[0]:
            self._best = (val_top1, trial)

    def _say(self, entry: Mapping[str, Any], trial: str, decision: str) -> None:
        minutes = (time.monotonic() - self._started) / 60
        loss = "not finite" if entry["train_loss"] is None else f"{entry['train_loss']:.3f}"
        say(
            f"tune {minutes:5.1f} min  {trial} {entry['family']:<8} epoch {entry['epoch']}/{self._search.epochs}  "
            f"loss {loss}  val top-1 {entry['val_top1']:.1%}  {decision:<8}  best {self._best[0]:.1%} ({self._best[1]})"
            f"  trials {self._done}/{self._search.trials}"
        )


def _reason(entry: Mapping[str, Any], decision: str) -> str | None:
    if decision == "finish":
        return None
    if decision == "stop":
        return f"stopped by ASHA after epoch {entry['epoch']} with {entry['val_top1']:.1%} validation top-1"
    return f"the loss was not finite in epoch {entry['epoch']}"

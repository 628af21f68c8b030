"""Opens a run folder and writes its log: one entry per (trial, epoch) with the decision, before it takes effect.

An epoch is logged once and its first decision stands; it follows from the entries before it (search.judge). Sequence
numbers grow over all starts of a search.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from carray.core.errors import SchemaError, SettingsError
from carray.core.progress import say
from carray.core.settings import parse_settings
from carray.core.store.files import delete, exists, join, read_json, write_json
from carray.manifest.manifest_file import Manifest
from carray.search import run_folder
from carray.search.judge import Judge, budget_reached, is_finite, replay, spent
from carray.search.loggers import EpochListener
from carray.search.space import SearchSettings, TuneSettings
from carray.search.train.export import check_backbones
from carray.search.train.hyperparameters import CnnHyper, TransferHyper, read_hyper
from carray.search.train.weights import check_backbone, check_weights

__all__ = ["STOPPED", "SearchLog", "check_decisions", "check_search", "open_run"]

CHANGEABLE = {
    *("search.trials", "search.time_budget_minutes", "search.device_hours_budget", "search.money_budget"),
    *("search.price_per_device_hour", "search.cpus_per_trial", "search.gpus_per_trial", "search.rung0_margin"),
    *("search.refit", "search.refit_epochs", "search.loggers"),
}
"""Length, budgets and resources of a search, which a later start may change; all else decides its figures."""

STOPPED = "every logged epoch stays; run the same command again to resume."
_STATUS = {"stop": "stopped", "finish": "finished", "non_finite": "non_finite"}
_WITH_RESULT = {"stopped", "finished"}
_SCHEDULERS = {"asha": "ASHA", "median": "the median rule"}

Configuration = CnnHyper | TransferHyper | None
"""None: the searcher proposes it before its launch."""


def check_search(manifest: Manifest, configurations: Sequence[Configuration]) -> None:
    """Check, before anything is launched, that the data, the backbones and their weights are there.

    Raises:
        SchemaError: no usable training or validation image.
        SettingsError: fewer than two classes, an unknown backbone, weights that are not to be had, or a backbone that
            cannot be built, trained or exported at its sizes.
    """
    counts = manifest.split_counts()
    empty = [split for split in ("train", "val") if not counts[split]]
    if empty:
        there = ", ".join(f"{count} in {split}" for split, count in counts.items())
        raise SchemaError(
            f"{manifest.uri} has no usable image in split {empty[0]!r} ({there}); a search trains on train and chooses "
            "on val, so prepare more labelled images, or other shares."
        )
    if len(manifest.classes) < 2:
        raise SettingsError(f"{manifest.uri} has {len(manifest.classes)} class; a classifier needs at least two.")
    for backbone, weights in sorted({(h.backbone, h.weights) for h in configurations if isinstance(h, TransferHyper)}):
        check_backbone(backbone)
        check_weights(backbone, weights)
    check_backbones(configurations)


def open_run(run: str, manifest: Manifest, settings: TuneSettings, configurations: Sequence[Configuration]) -> None:
    """Record a search in search.json, or extend the one there, whose configurations stay.

    Raises:
        SettingsError: the folder holds another search, one with more trials, or one of another version of carray.
    """
    wanted: dict[str, Any] = {
        "version": run_folder.VERSION,
        "manifest": manifest.uri,
        "manifest_fingerprint": manifest.fingerprint,
        "settings": settings.model_dump(mode="json"),
        "configurations": [hyper and hyper.model_dump(mode="json") for hyper in configurations],
    }
    if not exists(join(run, run_folder.SEARCH)):
        wanted["created_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    else:
        there = run_folder.read_search(run)
        _check_same(run, there, wanted)
        wanted = {**there, **wanted, "configurations": _continued(run, there["configurations"], wanted)}
        if there["settings"]["search"]["rung0_margin"] != settings.search.rung0_margin:
            for number, end in run_folder.read_trial_ends(run, len(there["configurations"])).items():
                if end["status"] == "dropped":
                    delete(join(run_folder.trial_folder(run, number), "trial.json"))
        say(f"{run} was started before: what is finished there is kept")
        if wanted == there:
            return
    write_json(join(run, run_folder.SEARCH), wanted)


def _check_same(run: str, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse settings that would change the meaning of the run's figures; names the first difference."""
    # Parsed and written again, so that settings of later versions have their defaults.
    settings = parse_settings(TuneSettings, there["settings"]).model_dump(mode="json")
    old = {"manifest_fingerprint": there["manifest_fingerprint"], **_dotted(settings)}
    new = {"manifest_fingerprint": wanted["manifest_fingerprint"], **_dotted(wanted["settings"])}
    differing = [key for key in {**old, **new} if key not in CHANGEABLE and old.get(key) != new.get(key)]
    if differing:
        key, others = differing[0], len(differing) - 1
        more = f" (and {others} more differ)" if others else ""
        raise SettingsError(
            f"{run} holds another search: its {key} is {old.get(key)!r}, not {new.get(key)!r}{more}; name another "
            "--out, or repeat the command with the settings and images of that search to resume it."
        )
    if new["search.trials"] < old["search.trials"]:
        raise SettingsError(
            f"{run} holds a search of {old['search.trials']} trials, and search.trials is {new['search.trials']}; "
            "a search can only grow, so ask for as many or more, or name another --out."
        )


def _continued(run: str, there: Sequence[Any], wanted: Mapping[str, Any]) -> list[Any]:
    """Join the stored configurations and the further ones of a larger search, which must begin with the stored ones."""
    drawn = wanted["configurations"]
    tpe = wanted["settings"]["search"]["searcher"] == "tpe"  # what a searcher proposed cannot be drawn again
    for number, (old, new) in enumerate(zip(there, drawn, strict=False)):
        if not tpe and read_hyper(old) != read_hyper(new):
            raise SettingsError(
                f"{run} holds another search: its configuration {number} is not the one that these settings draw, so "
                "another version of carray began it; use that one, or name another --out."
            )
    return [*there, *drawn[len(there) :]]


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: {'search.seed': 0, ...}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return flat


def check_decisions(run: str) -> list[str]:
    """Decide about a run's logged epochs once more; give a sentence for each that comes out otherwise.

    Raises:
        SettingsError: no search was ever started there.
        StorageError: the log cannot be read.
    """
    settings = parse_settings(TuneSettings, run_folder.read_search(run)["settings"])
    return replay(settings.search, run_folder.read_log(run))


class SearchLog:
    """The log of one search, open for writing; prints a line for each epoch."""

    def __init__(
        self,
        run: str,
        search: SearchSettings,
        *,
        count: int | None = None,
        devices: float = 1.0,
        check: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Resume the log of earlier starts; a trial whose last decision was logged is ended now.

        Args:
            run: The run's folder.
            search: Settings of the search.
            count: Number of configurations; None is search.trials.
            devices: GPUs of a trial, or its CPUs where it has none.
            check: Raises where another process has taken the run over, whose entries must not be overwritten.
            clock: Monotonic seconds.

        Raises:
            StorageError: the log cannot be read, or the end of a trial not be written.
        """
        self.devices = devices
        self.listeners: list[EpochListener] = []
        """Receive each epoch and end after it is logged."""
        self._run, self._search, self._check = run, search, check
        self._trials = search.trials if count is None else count
        entries = run_folder.read_log(run)
        self._judge = Judge(search, entries)
        self._decisions = {(entry["number"], entry["epoch"]): entry["decision"] for entry in entries}
        self._epochs = {entry["number"]: entry["epoch"] for entry in entries}
        """Logged epochs of each trial, in the order in which they began."""
        self._sequence = max((entry["sequence"] for entry in entries), default=0)
        self.ended = {number: end["status"] for number, end in run_folder.read_trial_ends(run, self._trials).items()}
        """Status of each ended trial, by number."""
        self._remarks: dict[int, str] = {}
        self.best: tuple[float, str] = (0.0, "none")
        """The best validation top-1 so far, and its trial's id."""
        done = read_json(join(run, run_folder.DONE)) if exists(join(run, run_folder.DONE)) else {}
        self._clock, self._started = clock, clock()
        # Epochs that the end of a budget cut off have no entry; done.json has their time.
        self._earlier_seconds = 60 * float(done.get("spent", {}).get("minutes", 0.0))
        self._device_seconds = 0.0
        for entry in entries:
            self._earlier_seconds = max(self._earlier_seconds, entry["clock_seconds"])
            self._count_in(entry)
            # Killed between the decision and the note of it.
            if entry["decision"] != "continue" and entry["number"] not in self.ended:
                self._end(entry["number"], _STATUS[entry["decision"]], self._reason(entry))

    @property
    def missing(self) -> list[int]:
        """Give the trials that have not ended: those that ran before first, in the order they began, then by number."""
        numbers = dict.fromkeys([*self._epochs, *range(self._trials)])
        return [number for number in numbers if number not in self.ended]

    @property
    def running(self) -> list[int]:
        """Give the trials that have logged an epoch and not ended, in the order they began."""
        return [number for number in self.missing if number in self._epochs]

    def results(self) -> dict[int, tuple[int, float | None]]:
        """Give the epochs and the best validation top-1 of each ended trial; (0, None) where it has no such result."""
        return {
            number: (self._epochs.get(number, 0), self._judge.score_of(number)) if status in _WITH_RESULT else (0, None)
            for number, status in self.ended.items()
        }

    @property
    def advice(self) -> str:
        """Say how to resume, should the search end now."""
        ended = f"{len(self.ended)} of {self._trials} trials have ended and stay"
        return f"{ended}; to go on, run the same command again; OUT={self._run}"

    def spent(self) -> dict[str, float]:
        """Give what the search has spent over all its starts; see `judge.spent`."""
        seconds = self._earlier_seconds + self._clock() - self._started
        return spent(self._search, clock_seconds=seconds, device_seconds=self._device_seconds)

    def budget_reached(self) -> str | None:
        """Name the first budget that is used up, in words; None while none is."""
        return budget_reached(self._search, self.spent())

    def is_logged(self, entry: Mapping[str, Any]) -> bool:
        """Say whether that epoch of that trial was logged before."""
        return (entry["number"], entry["epoch"]) in self._decisions

    def decide(self, entry: Mapping[str, Any]) -> str:
        """Give the decision on an epoch: the logged one, or the judge's."""
        return self._decisions.get((entry["number"], entry["epoch"])) or self._judge.decide(entry)

    def add(self, entry: Mapping[str, Any]) -> str:
        """Log one epoch with the decision on it, unless it is there already; gives the decision.

        Raises:
            StorageError: storage refused the entry after every try.
            BudgetError: another process has taken the run over.
        """
        number, decision = entry["number"], self.decide(entry)
        if self.is_logged(entry):
            return decision
        notes = [note for note in (self._remarks.pop(number, None), entry.get("note")) if note]
        logged = {
            "sequence": self._sequence + 1,
            "trial_id": run_folder.trial_id(number),
            **entry,
            "note": "; ".join(notes) or None,
            "decision": decision,
            "clock_seconds": round(60 * self.spent()["minutes"], 3),
            "devices": self.devices,
            "logged_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        run_folder.write_log_entry(self._run, logged, check=self._check)
        self._sequence += 1
        self._epochs[number] = entry["epoch"]
        self._decisions[number, entry["epoch"]] = decision
        self._judge.add(logged)
        self._count_in(logged)
        for listener in self.listeners:
            listener.add(logged)
        if decision != "continue":
            self._end(number, _STATUS[decision], self._reason(logged))
        self._say(logged)
        return decision

    def remark(self, number: int, text: str) -> None:
        """Print a remark about a trial, and add it to its next logged epoch."""
        self._remarks[number] = text
        say(f"tune: {run_folder.trial_id(number)}: {text}")

    def fail(self, number: int, reason: str) -> None:
        """Note that a trial ended in an error.

        Raises:
            StorageError: storage refused the note after every try.
        """
        self._end(number, "failed", reason)
        say(f"tune: {run_folder.trial_id(number)} failed: {reason}  trials {self._count()}")

    def drop(self, number: int, reason: str) -> None:
        """Note that a trial is not to be run.

        Raises:
            StorageError: storage refused the note after every try.
        """
        self._end(number, "dropped", reason)
        say(f"tune: {run_folder.trial_id(number)} is not run: {reason}")

    def _end(self, number: int, status: str, reason: str | None) -> None:
        # In this order, the next start repairs a kill in between.
        delete(run_folder.trial_holder(self._run, number))  # from now on no process may write for the trial
        delete(run_folder.last_checkpoint(self._run, number))
        run_folder.write_trial_end(self._run, number, status=status, reason=reason)
        self.ended[number] = status
        for listener in self.listeners:
            listener.end(number, status)

    def _reason(self, entry: Mapping[str, Any]) -> str | None:
        if entry["decision"] == "finish":
            return None
        if entry["decision"] == "non_finite":
            return f"the loss was not finite in epoch {entry['epoch']}"
        who = _SCHEDULERS.get(self._search.scheduler, self._search.scheduler)
        return f"stopped by {who} after epoch {entry['epoch']} with {entry['val_top1']:.1%} validation top-1"

    def _count(self) -> str:
        return f"{len(self.ended)}/{self._trials}"

    def _count_in(self, entry: Mapping[str, Any]) -> None:
        self._device_seconds += entry["seconds"] * entry["devices"]
        if is_finite(entry) and entry["val_top1"] > self.best[0]:
            self.best = (entry["val_top1"], entry["trial_id"])

    def _say(self, entry: Mapping[str, Any]) -> None:
        loss = "not finite" if entry["train_loss"] is None else f"{entry['train_loss']:.3f}"
        note = f"  ({entry['note']})" if entry["note"] else ""
        say(
            f"tune {entry['clock_seconds'] / 60:5.1f} min  {entry['trial_id']} {entry['family']:<8} epoch "
            f"{entry['epoch']}/{self._search.epochs}  loss {loss}  val top-1 {entry['val_top1'] or 0.0:.1%}  "
            f"{entry['decision']:<8}  best {self.best[0]:.1%} ({self.best[1]})  trials {self._count()}{note}"
        )

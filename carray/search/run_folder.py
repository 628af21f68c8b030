"""Names and reads the files of a run, and derives its tables from the log.

    RUN/driver.json            the process that works here now (core.store.lease)
    RUN/search.json            settings, manifest and every configuration, each written before it is launched
    RUN/log/NUMBER.json        one object per (trial, epoch): its figures and the decision
    RUN/probes.json            rung 0: one entry per candidate backbone
    RUN/trials/ID/best.safetensors   weights of the trial's best epoch, which its metadata name
    RUN/trials/ID/last.safetensors   checkpoint of a running trial
    RUN/trials/ID/holder.json  number of the last process that claimed a running trial
    RUN/trials/ID/trial.json   how the trial ended
    RUN/trials.parquet         one row per trial, best first;  RUN/epochs.parquet  one row per (trial, epoch)
    RUN/curves.png, RUN/leaderboard.html   pictures of both
    RUN/done.json              the outcome and what ended the search, written last
    RUN/bundle/                the winner, packed (bundle.bundle_folder)
    RUN/training.json          of carray train, whose run is like that of one trial: its images, and the refitted trial
    RUN/refit/ID-EPOCHS/       such a run: the winner's, on train and val

S3 cannot append, hence one object per entry. A trial's result is its best epoch's validation top-1. A search that is
resumed deletes the tables first, so tables that exist are of the whole log.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
from pydantic import ConfigDict, Field

from carray.core.at_once import at_once
from carray.core.errors import SearchError, SettingsError, StorageError
from carray.core.settings import Settings, read_record
from carray.core.store.files import delete, exists, is_folder, join, list_files, read_json, write_json
from carray.core.tables import read_table, table_from_rows, write_table
from carray.search.judge import is_finite

__all__ = [
    "EPOCHS_SCHEMA",
    "TRIALS_SCHEMA",
    "best_weights",
    "delete_tables",
    "last_checkpoint",
    "read_epochs",
    "read_log",
    "read_search",
    "read_trials",
    "safetensors_metadata",
    "store_configuration",
    "trial_id",
    "weights_epoch",
    "write_tables",
]

VERSION = 2
SEARCH, PROBES, DONE, TRIALS, EPOCHS = "search.json", "probes.json", "done.json", "trials.parquet", "epochs.parquet"

TRIALS_SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),  # t00000 and so on
        ("number", pa.int32()),  # the i of (seed, i)
        ("family", pa.string()),  # null where the searcher has proposed nothing yet
        # finished: ran every epoch; stopped: by the scheduler; non_finite: its loss; failed: an error, or its process
        # was lost too often; dropped: by rung 0, before it ran; out_of_time: a budget ended the search while it ran;
        # not_started: a budget ended the search before; unfinished: it ran, and the search has not ended, though it may
        # have been killed. The last three are resumed with the search.
        ("status", pa.string()),
        ("reason", pa.string()),  # one line; null for a finished trial
        ("val_top1", pa.float64()),  # of the best epoch, fraction; null without a finite epoch
        ("val_top5", pa.float64()),  # of that epoch
        ("val_loss", pa.float64()),  # of that epoch
        ("best_epoch", pa.int32()),  # counted from 1
        ("epochs", pa.int32()),  # epochs run
        ("seconds", pa.float64()),  # of all its epochs
        ("images_per_second", pa.float64()),  # trained, median over its epochs
        ("devices", pa.float64()),  # GPUs it had, or CPUs where it had none; of its last epoch
        ("device_hours", pa.float64()),  # seconds times devices, over its epochs
        ("note", pa.string()),  # what its epochs noted, such as a halved micro-batch
        ("hyper", pa.string()),  # the configuration, JSON
    ]
)
EPOCHS_SCHEMA = pa.schema(
    [
        ("sequence", pa.int32()),  # number of the log entry
        ("trial_id", pa.string()),  # t00000 and so on
        ("number", pa.int32()),  # the i of (seed, i)
        ("family", pa.string()),  # cnn or transfer
        ("epoch", pa.int32()),  # counted from 1
        ("train_loss", pa.float64()),  # mean over the epoch; null where it is no finite number
        ("val_loss", pa.float64()),  # likewise, on validation images
        ("val_top1", pa.float64()),  # fraction
        ("val_top5", pa.float64()),  # fraction
        ("learning_rate", pa.float64()),  # the largest of all layers', at the end of the epoch
        ("seconds", pa.float64()),  # of the epoch
        ("images_per_second", pa.float64()),  # trained
        ("note", pa.string()),  # such as a halved micro-batch; null for most
        ("decision", pa.string()),  # continue, stop (the scheduler), finish (last epoch) or non_finite
        ("clock_seconds", pa.float64()),  # of the search, summed over its starts
        ("devices", pa.float64()),  # GPUs of the trial, or its CPUs where it has none
        ("logged_at", pa.string()),  # ISO 8601, UTC
    ]
)


class _Checked(Settings):
    """A document that is checked when it is read, since it may come from any bucket."""

    model_config = ConfigDict(extra="allow")  # later versions add some


class _SearchDocument(_Checked):
    """What search.json holds."""

    version: int
    manifest: str = ""
    manifest_fingerprint: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)
    configurations: list[dict[str, Any] | None]


class _LogEntry(_Checked):
    """One (trial, epoch) of the log, whose figures are null where they were not finite."""

    sequence: int
    number: int
    family: str
    epoch: int
    train_loss: float | None
    val_loss: float | None
    val_top1: float | None
    val_top5: float | None
    seconds: float
    images_per_second: float
    note: str | None
    decision: str
    clock_seconds: float
    devices: float


class _TrialEnd(_Checked):
    """What trial.json holds."""

    number: int
    status: str
    reason: str | None


def trial_id(number: int) -> str:
    """Name trial number i; the name sorts as the number does."""
    return f"t{number:05d}"


def trial_folder(run: str, number: int) -> str:
    """Give the URI of a trial's folder."""
    return join(run, "trials", trial_id(number))


def best_weights(run: str, trial: str) -> str:
    """Give the URI of a trial's best weights."""
    return join(run, "trials", trial, "best.safetensors")


def weights_epoch(data: bytes) -> int:
    """Give the epoch that a file of best weights is of.

    Raises:
        StorageError: the file is damaged, or was written by another program.
    """
    try:
        return int(safetensors_metadata(data)["epoch"])
    except (ValueError, KeyError):
        raise StorageError("weights that name no epoch: the file is damaged, or of another program.") from None


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Read the metadata of a safetensors file: 8 bytes of length, little-endian, then that much JSON.

    Raises:
        ValueError: the bytes hold no such header.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        return {str(key): str(value) for key, value in json.loads(data[8 : 8 + length])["__metadata__"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"no header of safetensors with notes ({type(err).__name__})") from None


def last_checkpoint(run: str, number: int) -> str:
    """Give the URI of a running trial's checkpoint."""
    return join(trial_folder(run, number), "last.safetensors")


def trial_holder(run: str, number: int) -> str:
    """Give the URI of the note of which process trains a running trial."""
    return join(trial_folder(run, number), "holder.json")


def read_search(run: str) -> dict[str, Any]:
    """Read what a run was started with.

    Raises:
        SettingsError: no search was ever started there, or by another version of carray.
        StorageError: its document cannot be read, or is none.
    """
    if not exists(join(run, SEARCH)):
        raise SettingsError(
            f"{run} holds no {SEARCH}, so it is not a run of carray tune; give the folder that --out named."
        )
    found = read_json(join(run, SEARCH))
    version = (found.get("version") or 0) if isinstance(found, dict) else VERSION  # there was a time without
    if isinstance(version, int) and version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise SettingsError(
            f"{run} was written by {age} carray (run version {version}, this one reads {VERSION}); "
            "use that carray for it, or name another --out."
        )
    return read_record(_SearchDocument, join(run, SEARCH), found=found).model_dump()


def store_configuration(run: str, number: int, hyper: Mapping[str, Any]) -> None:
    """Write a configuration that a searcher proposed into search.json, before it is launched.

    Raises:
        StorageError: storage refused it.
    """
    search = read_search(run)
    search["configurations"][number] = dict(hyper)
    write_json(join(run, SEARCH), search)


def read_log(run: str) -> list[dict[str, Any]]:
    """Read every (trial, epoch) entry, in the order of decisions.

    A killed writer may leave a file of another name beside the entries; it is passed over.

    Raises:
        StorageError: an entry cannot be read, or is none.
    """
    entries = [uri for uri in list_files(join(run, "log")) if re.fullmatch(r"\d{8}\.json", uri.rsplit("/", 1)[-1])]
    read = at_once(lambda uri: read_record(_LogEntry, uri).model_dump(), entries)
    return sorted(read, key=lambda entry: entry["sequence"])


def write_log_entry(run: str, entry: Mapping[str, Any], *, check: Callable[[], None] | None = None) -> None:
    """Write one (trial, epoch) entry; its sequence number names it. `check` is that of core.store.files.write_bytes."""
    write_json(join(run, "log", f"{entry['sequence']:08d}.json"), dict(entry), check=check)


def write_trial_end(run: str, number: int, *, status: str, reason: str | None) -> None:
    """Note how a trial ended."""
    write_json(join(trial_folder(run, number), "trial.json"), {"number": number, "status": status, "reason": reason})


def read_trial_ends(run: str, count: int) -> dict[int, dict[str, Any]]:
    """Read how trials ended, by number; a trial that is not there has not ended.

    Raises:
        StorageError: a note of an end cannot be read, or is none.
    """

    def read_end(number: int) -> dict[str, Any] | None:
        uri = join(trial_folder(run, number), "trial.json")
        return read_record(_TrialEnd, uri).model_dump() if exists(uri) else None

    ends = at_once(read_end, range(count)) if is_folder(join(run, "trials")) else []
    return {number: end for number, end in enumerate(ends) if end is not None}


def write_tables(run: str, *, ended_by: str | None = None) -> pd.DataFrame:
    """Derive trials.parquet and epochs.parquet from the log, and give the trials, best first.

    `ended_by` says in words what ended the search early.

    Raises:
        StorageError: storage refused a table.
    """
    search = read_search(run)
    cut_off = f"the search ended before this trial did{f': {ended_by}' if ended_by else ''}"
    tables = _derive_tables(run, search, cut_off, unended="out_of_time")
    provenance = {"manifest": search["manifest_fingerprint"], "seed": search["settings"]["search"]["seed"]}
    for kind in ("epochs", "trials"):  # in this order: where the second is, the first is, too
        write_table(tables[kind], join(run, f"{kind}.parquet"), kind=kind, version=VERSION, provenance=provenance)
    return tables["trials"].to_pandas()


def delete_tables(run: str) -> None:
    """Delete the tables, before the log grows beyond them.

    Raises:
        StorageError: storage refused.
    """
    for name in (TRIALS, EPOCHS):  # in this order: where the first is, the second is, too
        delete(join(run, name))


def read_trials(run: str) -> pd.DataFrame:
    """Read a run's trials, best first; those of a search that has not ended are derived from what its log holds.

    Raises:
        SettingsError: no search was ever started there.
        StorageError: the table or the log cannot be read.
    """
    return _read(run, "trials", TRIALS_SCHEMA)


def read_epochs(run: str) -> pd.DataFrame:
    """Read every (trial, epoch) of a run, in the order of decisions; see `read_trials`."""
    return _read(run, "epochs", EPOCHS_SCHEMA)


def _read(run: str, kind: str, schema: pa.Schema) -> pd.DataFrame:
    search = read_search(run)
    if exists(join(run, TRIALS)):
        return read_table(join(run, f"{kind}.parquet"), kind=kind, required=schema.names).to_pandas()
    cut_off = "the search has not ended; to resume one that does not run, repeat carray tune"
    return _derive_tables(run, search, cut_off, unended="unfinished")[kind].to_pandas()


def _derive_tables(run: str, search: Mapping[str, Any], cut_off: str, *, unended: str) -> dict[str, pa.Table]:
    """Derive the tables trials and epochs; a trial that ran and has not ended has the status `unended`."""
    log = read_log(run)
    ends = read_trial_ends(run, len(search["configurations"]))
    of_trial = defaultdict(list)
    for entry in log:
        of_trial[entry["number"]].append(entry)
    rows = [
        _trial_row(number, hyper, of_trial[number], ends.get(number), unended, cut_off)
        for number, hyper in enumerate(search["configurations"])
    ]
    rows.sort(key=lambda row: (-(row["val_top1"] if row["val_top1"] is not None else -1.0), row["number"]))
    return {"trials": table_from_rows(rows, TRIALS_SCHEMA), "epochs": table_from_rows(log, EPOCHS_SCHEMA)}


def best_trial(trials: pd.DataFrame) -> dict[str, Any]:
    """Give the winner's row.

    Raises:
        SearchError: no trial has a finite result; names the first one's reason.
    """
    usable = trials[trials["val_top1"].notna()]
    if usable.empty:
        first = trials.sort_values("number").iloc[0]
        raise SearchError(
            f"none of the {len(trials)} trials came to a result; the first, {first['trial_id']}, {first['status']}: "
            f"{first['reason'] or 'no reason known'}."
        )
    return {str(key): value for key, value in usable.iloc[0].items()}


def _trial_row(
    number: int,
    hyper: Mapping[str, Any] | None,
    entries: Sequence[Mapping[str, Any]],
    end: Mapping[str, Any] | None,
    unended: str,
    cut_off: str,
) -> dict[str, Any]:
    finite = [entry for entry in entries if is_finite(entry)]
    best = max(finite, key=lambda entry: (entry["val_top1"], -entry["epoch"]), default=None)
    figures = {name: best[name] if best else None for name in ("val_top1", "val_top5", "val_loss")}
    return {
        "trial_id": trial_id(number),
        "number": number,
        "family": hyper["family"] if hyper else None,
        "status": end["status"] if end else (unended if entries else "not_started"),
        "reason": end["reason"] if end else cut_off,
        **figures,
        "best_epoch": best["epoch"] if best else None,
        "epochs": len(entries),
        "seconds": sum(entry["seconds"] for entry in entries),
        "images_per_second": pd.Series([e["images_per_second"] for e in entries]).median() if entries else None,
        "devices": entries[-1]["devices"] if entries else None,
        "device_hours": sum(entry["seconds"] * entry["devices"] for entry in entries) / 3600,
        "note": "; ".join(dict.fromkeys(entry["note"] for entry in entries if entry["note"])) or None,
        "hyper": json.dumps(hyper),
    }

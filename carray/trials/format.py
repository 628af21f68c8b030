"""Says what a search leaves behind, and derives its tables from the log.

    RUN/search.json            settings, manifest and every configuration, written before anything is launched
    RUN/log/NUMBER.json        one object per (trial, epoch): the figures and the scheduler's decision
    RUN/trials/ID/best.safetensors   weights of the trial's best epoch
    RUN/trials/ID/trial.json   how the trial ended, written when it ended
    RUN/trials.parquet         one row a trial, best first;  RUN/epochs.parquet  one row a (trial, epoch)
    RUN/curves.png             learning curves
    RUN/done.json              the marker, written last
    RUN/bundle/                the winner, packed (bundle.format)

Invariants: S3 cannot append, hence one object an entry; sequence numbers grow in the order of decisions; "best" is the
best epoch's validation top-1, never the last epoch's, and never of a trial with a non-finite loss. Version 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa

from carray.core.errors import SearchError, SettingsError
from carray.core.storage import exists, is_folder, join, list_files, read_json, write_json
from carray.core.tables import read_table, table_from_rows, write_table

__all__ = [
    "EPOCHS_SCHEMA",
    "TRIALS_SCHEMA",
    "best_weights",
    "read_log",
    "read_search",
    "read_trials",
    "trial_id",
    "write_tables",
]

VERSION = 1
SEARCH, DONE, TRIALS, EPOCHS = "search.json", "done.json", "trials.parquet", "epochs.parquet"

TRIALS_SCHEMA = pa.schema(
    [
        ("trial_id", pa.string()),
        ("number", pa.int32()),  # the i of (seed, i)
        ("family", pa.string()),
        ("status", pa.string()),  # finished, stopped, failed, non_finite, out_of_time or not_started
        ("reason", pa.string()),  # one line; null for a finished trial
        ("val_top1", pa.float64()),  # of the best epoch, fraction; null without a finite epoch
        ("val_top5", pa.float64()),  # of that epoch
        ("val_loss", pa.float64()),
        ("best_epoch", pa.int32()),
        ("epochs", pa.int32()),  # epochs run
        ("seconds", pa.float64()),  # of all its epochs
        ("images_per_second", pa.float64()),  # trained, median over its epochs
        ("hyper", pa.string()),  # the configuration, JSON
    ]
)
EPOCHS_SCHEMA = pa.schema(
    [
        ("sequence", pa.int32()),
        ("trial_id", pa.string()),
        ("number", pa.int32()),
        ("family", pa.string()),
        ("epoch", pa.int32()),  # counted from 1
        ("train_loss", pa.float64()),
        ("val_loss", pa.float64()),
        ("val_top1", pa.float64()),
        ("val_top5", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
        ("images_per_second", pa.float64()),
        ("decision", pa.string()),  # continue, stop (ASHA), finish (last epoch) or non_finite
        ("logged_at", pa.string()),  # ISO 8601, UTC
    ]
)


def trial_id(number: int) -> str:
    """Name trial number i; the name sorts as the number does."""
    return f"t{number:05d}"


def best_weights(run: str, trial: str) -> str:
    """Give the URI of a trial's best weights."""
    return join(run, "trials", trial, "best.safetensors")


def read_search(run: str) -> dict[str, Any]:
    """Read what a run was started with.

    Raises:
        SettingsError: no search was ever started there.
    """
    if not exists(join(run, SEARCH)):
        raise SettingsError(
            f"{run} holds no {SEARCH}, so it is not a run of carray tune; give the folder that --out named."
        )
    return dict(read_json(join(run, SEARCH)))


def read_log(run: str) -> list[dict[str, Any]]:
    """Read every (trial, epoch) entry, in the order of decisions; of a trial begun twice, its last attempt's only.

    The weights that lie there are the last attempt's, so an epoch that only an earlier one reached must not be best.
    """
    entries = sorted((read_json(uri) for uri in list_files(join(run, "log"))), key=lambda entry: entry["sequence"])
    begun = {entry["number"]: entry["sequence"] for entry in entries if entry["epoch"] == 1}
    return [entry for entry in entries if entry["sequence"] >= begun.get(entry["number"], 0)]


def write_log_entry(run: str, entry: Mapping[str, Any]) -> None:
    """Write one (trial, epoch) entry; its sequence number names it."""
    write_json(join(run, "log", f"{entry['sequence']:08d}.json"), dict(entry))


def write_trial_end(run: str, number: int, *, status: str, reason: str | None) -> None:
    """Note how a trial ended."""
    write_json(
        join(run, "trials", trial_id(number), "trial.json"), {"number": number, "status": status, "reason": reason}
    )


def read_trial_ends(run: str, count: int) -> dict[int, dict[str, Any]]:
    """Read how trials ended, by number; a trial that is not there has not ended."""
    if not is_folder(join(run, "trials")):
        return {}
    ends = {}
    for number in range(count):
        place = join(run, "trials", trial_id(number), "trial.json")
        if exists(place):
            ends[number] = dict(read_json(place))
    return ends


def write_tables(run: str) -> pd.DataFrame:
    """Derive trials.parquet and epochs.parquet from the log, and give the trials, best first.

    Raises:
        StorageError: storage refused a table.
    """
    search = read_search(run)
    log = read_log(run)
    ends = read_trial_ends(run, len(search["configurations"]))
    rows = [_trial_row(i, hyper, log, ends.get(i)) for i, hyper in enumerate(search["configurations"])]
    rows.sort(key=lambda row: (-(row["val_top1"] if row["val_top1"] is not None else -1.0), row["number"]))
    provenance = {"manifest": search["manifest_fingerprint"], "seed": search["settings"]["search"]["seed"]}
    epochs = table_from_rows(log, EPOCHS_SCHEMA)
    write_table(epochs, join(run, EPOCHS), kind="epochs", version=VERSION, provenance=provenance)
    trials = table_from_rows(rows, TRIALS_SCHEMA)
    write_table(trials, join(run, TRIALS), kind="trials", version=VERSION, provenance=provenance)
    return trials.to_pandas()


def read_trials(run: str) -> pd.DataFrame:
    """Read a run's trials, best first.

    Raises:
        SettingsError: no search was ever started there, or it has no table yet.
    """
    read_search(run)
    if not exists(join(run, TRIALS)):
        raise SettingsError(f"{run} has no {TRIALS} yet; it is written when the search ends, so run carray tune again.")
    return read_table(join(run, TRIALS), kind="trials", required=TRIALS_SCHEMA.names).to_pandas()


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
    number: int, hyper: Mapping[str, Any], log: list[dict[str, Any]], end: Mapping[str, Any] | None
) -> dict[str, Any]:
    entries = [entry for entry in log if entry["number"] == number]
    finite = [entry for entry in entries if is_finite(entry)]
    best = max(finite, key=lambda entry: (entry["val_top1"], -entry["epoch"]), default=None)
    # A trial that went non-finite is never best, whatever it had reached before.
    diverged = len(finite) < len(entries)
    return {
        "trial_id": trial_id(number),
        "number": number,
        "family": hyper["family"],
        "status": end["status"] if end else ("out_of_time" if entries else "not_started"),
        "reason": end["reason"] if end else "the search ended before this trial did",
        "val_top1": best["val_top1"] if best and not diverged else None,
        "val_top5": best["val_top5"] if best and not diverged else None,
        "val_loss": best["val_loss"] if best and not diverged else None,
        "best_epoch": best["epoch"] if best and not diverged else None,
        "epochs": len(entries),
        "seconds": sum(entry["seconds"] for entry in entries),
        "images_per_second": pd.Series([e["images_per_second"] for e in entries]).median() if entries else None,
        "hyper": json.dumps(hyper),
    }


def is_finite(entry: Mapping[str, Any]) -> bool:
    """Say whether an epoch's losses are both finite numbers; a null stands for one that is not."""
    losses = (entry["train_loss"], entry["val_loss"])
    return all(loss is not None and math.isfinite(loss) for loss in losses)

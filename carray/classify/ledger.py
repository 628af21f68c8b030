"""The records of a run: what it is, which shards are done, whether rows out are images in.

From, to: small JSON files under `OUT/_carray/`.
A shard's Parquet file is created once and carries its ledger entry; the entry is created after it, from it. Whoever
comes second enters the file that is there. A retry replaces the version that it read, and gets an entry of its own.
A shard is done exactly when both exist. One folder holds one run; nothing secret is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from carray.classify.predictions_folder import part_name, record_place
from carray.core.at_once import at_once
from carray.core.errors import SettingsError, StorageError
from carray.core.settings import Settings, parse_settings
from carray.core.store.conditional import create
from carray.core.store.files import delete, exists, join, json_bytes, list_files, read_json, write_json
from carray.core.tables import file_note

__all__ = [
    "LedgerEntry",
    "PlanTotals",
    "RunRecord",
    "check_folder",
    "count_rows",
    "done_shards",
    "enter_shard",
    "entry_of_part",
    "read_run",
    "read_totals",
    "recover_ledger",
    "write_run",
    "write_totals",
]


class RunRecord(Settings):
    """What run.json holds: everything that decides the rows."""

    version: int
    run_id: str
    bundle_id: str
    bundle: str
    source: str
    split: str | None
    column: dict[str, str] = Field(default_factory=dict)
    all_files: bool
    since: str | None = None
    runtime: str
    """Resolved once and kept on resume."""
    chosen_by: str = ""
    """Whose rates chose it where it was `auto`: packed (the bundle's) or measured (by a machine of this run)."""
    images_per_second: dict[str, float] = Field(default_factory=dict)
    """Those rates, of one thread, by runtime."""
    accept_threshold: float | None = None
    """The bundle's when the run was begun; another one may not mix into its column `accept`."""
    columns: list[str]
    created_at: str
    software: dict[str, str]


class PlanTotals(Settings):
    """What listing.json holds: what the listing found. It is complete exactly when this exists."""

    images: int
    shards: int
    repeated: int
    """Rows of a table that repeat another's uri (and box)."""
    skipped_by_suffix: dict[str, int]
    """Keys without an image's suffix."""


class LedgerEntry(Settings):
    """Counts one finished shard."""

    shard: int
    retry: int = 0
    """How often retry_failed had rewritten the shard by then."""
    rows: int
    scored: int
    """Images read for the last writing: all of them, or those that retry_failed read again."""
    ok: int
    fetch_errors: int
    decode_errors: int
    error_codes: dict[str, int]
    examples: dict[str, str] = Field(default_factory=dict)
    """The first uri of each error code."""
    known: int = 0
    """Images that have no row because an earlier run's is still true of them (setting `since`)."""
    seconds: float
    read_bytes: int = 0
    """Of the originals that were read for the last writing."""
    worker_peak_bytes: int = 0
    """Most memory that its worker had held by then, this shard or an earlier one."""


def read_run(out: str) -> RunRecord | None:
    """Read what run a folder holds; None when it holds none.

    Raises:
        StorageError: the record cannot be read.
        SettingsError: it is of another version of carray.
    """
    uri = record_place(out, "run.json")
    return parse_settings(RunRecord, read_json(uri)) if exists(uri) else None


def write_run(out: str, record: RunRecord) -> None:
    """Write what a run is: from now on it can be resumed."""
    write_json(record_place(out, "run.json"), record.model_dump(mode="json"))


def read_totals(out: str) -> PlanTotals | None:
    """Read what a run's listing found; None while it is incomplete.

    Raises:
        StorageError: the record cannot be read.
        SettingsError: it is of another version of carray.
    """
    uri = record_place(out, "listing.json")
    return parse_settings(PlanTotals, read_json(uri)) if exists(uri) else None


def write_totals(out: str, totals: PlanTotals) -> None:
    """Write what the listing found: from now on it is complete."""
    write_json(record_place(out, "listing.json"), totals.model_dump(mode="json"))


def check_folder(out: str, wanted: RunRecord) -> None:
    """Check that a folder is free for a run, or already holds this very run.

    Raises:
        SettingsError: it holds another run, or Parquet files of something else.
    """
    found = read_run(out)
    if found is None:
        others = [uri for uri in list_files(out) if uri.endswith(".parquet")]
        if others:
            raise SettingsError(
                f"{out} already holds {len(others)} Parquet files that are of no run, the first is {others[0]!r}; "
                "give an empty folder."
            )
    elif found.run_id != wanted.run_id:
        decisive = "bundle_id source split column all_files since runtime accept_threshold columns"
        differ = [name for name in decisive.split() if getattr(found, name) != getattr(wanted, name)] or ["pixels"]
        seen = ", ".join(
            f"{name} {getattr(found, name, '?')!r} instead of {getattr(wanted, name, '?')!r}" for name in differ
        )
        raise SettingsError(
            f"{out} holds another run ({seen}); give another folder, or the same settings to resume it."
        )


def done_shards(out: str, shards: int) -> dict[int, LedgerEntry]:
    """Read the newest ledger entries of the shards that are done: those with an entry and a data file.

    Raises:
        StorageError: the folder cannot be listed or an entry cannot be read.
    """
    newest, parts = _newest_entries(out), _names(out)
    done = [shard for shard in range(shards) if shard in newest and part_name(shard) in parts]
    entries = at_once(lambda shard: parse_settings(LedgerEntry, read_json(_entry_uri(out, shard, newest[shard]))), done)
    return {entry.shard: entry for entry in entries}


def recover_ledger(out: str, shards: int) -> dict[int, LedgerEntry]:
    """Read the ledger as a driver does before it starts.

    Files whose worker died before it could enter them are entered; entries of files that were deleted are removed.

    Raises:
        StorageError: the folder cannot be listed, read or written.
    """
    newest, parts = _newest_entries(out), _names(out)  # in this order: a file is there before its entry
    for shard, retry in newest.items():
        if part_name(shard) not in parts:
            for number in range(retry + 1):
                delete(_entry_uri(out, shard, number))
    left = [shard for shard in range(shards) if shard not in newest and part_name(shard) in parts]
    for entry in at_once(lambda shard: entry_of_part(join(out, part_name(shard))), left):
        if entry is not None:
            enter_shard(out, entry)
    return done_shards(out, shards)


def entry_of_part(uri: str) -> LedgerEntry | None:
    """Read the ledger entry that a shard's data file carries; None if an earlier version of carray wrote the file.

    Raises:
        StorageError: the file cannot be read.
        SchemaError: it is no Parquet file.
    """
    return _carried(file_note(uri)[1])


def _carried(note: Mapping[str, Any]) -> LedgerEntry | None:
    return parse_settings(LedgerEntry, note["entry"]) if "entry" in note else None


def enter_shard(out: str, entry: LedgerEntry) -> None:
    """Create a shard's ledger entry, unless it is there: from now on the shard is done."""
    create(_entry_uri(out, entry.shard, entry.retry), json_bytes(entry.model_dump(mode="json")))


def count_rows(out: str, totals: PlanTotals) -> Counter[str]:
    """Count a finished run's rows by its ledger, and check the sum against the plan and against the files themselves.

    Gives the counts images, rows, known, ok, fetch_errors and decode_errors.

    Raises:
        StorageError: rows out are not images in, or the folder holds Parquet files that are not the run's.
    """
    entries = done_shards(out, totals.shards)
    parts = {uri for uri in list_files(out) if uri.endswith(".parquet")}
    expected = {join(out, part_name(i)) for i in range(totals.shards)}
    if parts != expected:
        odd = sorted(parts ^ expected)
        raise StorageError(
            f"{out} should hold {len(expected)} Parquet files, but {len(odd)} are missing or foreign, the first is "
            f"{odd[0]!r}; run the command again, and move foreign files away."
        )
    in_files = 0
    for uri, (rows, note) in zip(sorted(parts), at_once(file_note, sorted(parts)), strict=True):
        in_files += rows
        carried = _carried(note)
        if carried is None:
            continue
        entered = entries.get(carried.shard)
        if entered is None or entered.retry < carried.retry:  # its worker died before it could enter this
            enter_shard(out, carried)
            entries[carried.shard] = carried
        elif entered != carried:
            raise StorageError(
                f"{uri} is not the file of its ledger entry, so it was changed; delete that file and run the command "
                "again."
            )
    counts: Counter[str] = Counter(images=totals.images)
    for entry in entries.values():
        counts.update(entry.model_dump(include={"rows", "known", "ok", "fetch_errors", "decode_errors"}))
    if not counts["rows"] == in_files == totals.images - counts["known"]:
        raise StorageError(
            f"{out} has {in_files:,} rows in its files and {counts['rows']:,} in its ledger for "
            f"{totals.images - counts['known']:,} images; one of its files was changed, so delete that file and run "
            "the command again."
        )
    return counts


_ENTRY_NAME = re.compile(r"(\d+)(?:\.retry-(\d+))?\.json")


def _entry_uri(out: str, shard: int, retry: int) -> str:
    return record_place(out, "ledger", f"{shard:06d}.retry-{retry:03d}.json" if retry else f"{shard:06d}.json")


def _newest_entries(out: str) -> dict[int, int]:
    """Give the number of the newest retry of each shard in the ledger; 0 is its first scoring."""
    newest: dict[int, int] = {}
    for name in _names(record_place(out, "ledger")):
        if found := _ENTRY_NAME.fullmatch(name):
            shard, retry = int(found[1]), int(found[2] or 0)
            newest[shard] = max(retry, newest.get(shard, 0))
    return newest


def _names(folder: str) -> set[str]:
    return {uri.rsplit("/", 1)[-1] for uri in list_files(folder)}

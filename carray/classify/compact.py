"""Merges a finished run's many files into few large ones, in a folder of their own.

    TO/compact-000000.parquet ...   the same rows in the same order, columns and types
    TO/_carray/compact.json         where they came from, and how many (written last)

From: a finished run. To: another folder, local or S3: in the run's own folder a reader would see rows twice, or not at
all, while files are exchanged, and no object store exchanges two at once.
Invariants: rows out are rows in, counted in the files; one file of rows is in memory at a time; the same call again
does nothing once it has finished, and begins anew before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from carray.classify.predictions_folder import KIND, VERSION, record_place
from carray.core.errors import SettingsError, StorageError
from carray.core.progress import Progress, say
from carray.core.store.files import absolute, delete, exists, join, list_files, read_json, write_json
from carray.core.tables import file_note, read_table, write_table

__all__ = ["compact"]


def compact(out: str, *, to: str, rows_per_file: int = 1_000_000) -> dict[str, Any]:
    """Write a finished run's rows into files of `rows_per_file` rows in `to`; gives the counts.

    Raises:
        SettingsError: the run is unfinished, or `to` is not empty, or is the run's own folder.
        SchemaError: a file is damaged.
        StorageError: storage refused, or rows out are not rows in.
    """
    out, to = (absolute(uri).rstrip("/") for uri in (out, to))
    run = _finished_run(out)
    if (before := _check_target(out, to, run)) is not None:
        say(f"compact: nothing to do, {to} holds all {before['rows']:,} rows")
        return before
    parts = [uri for uri in list_files(out) if uri.endswith(".parquet")]
    version = file_note(parts[0])[1].get("version", VERSION)
    files = 0
    with Progress("compact", total=run["rows"], unit="rows") as progress:
        for table in _merged(parts, rows_per_file):
            provenance = {"run_id": run["run_id"], "bundle_id": run["bundle_id"]}
            target = join(to, f"compact-{files:06d}.parquet")
            write_table(table, target, kind=KIND, version=version, provenance=provenance)
            files += 1
            progress.advance(table.num_rows)
    written = sum(file_note(uri)[0] for uri in list_files(to) if uri.endswith(".parquet"))
    if written != run["rows"]:
        raise StorageError(
            f"{to} has {written:,} rows, but the run {out} has {run['rows']:,}; let nothing else write to either "
            "folder, empty the first and run the command again."
        )
    outcome = {"run_id": run["run_id"], "rows": written, "files_before": len(parts), "files": files, "out": to}
    write_json(record_place(to, "compact.json"), {**outcome, "from": out})
    return outcome


def _finished_run(out: str) -> dict[str, Any]:
    note_uri = record_place(out, "done.json")
    if not exists(note_uri):
        raise SettingsError(f"{out} is no finished run of carray classify; give one, or finish it first.")
    return dict(read_json(note_uri))


def _check_target(out: str, to: str, run: dict[str, Any]) -> dict[str, Any] | None:
    """Give what `to` holds if that is this run already; empty it of what an interrupted call left."""
    if f"{to}/".startswith(f"{out}/"):
        raise SettingsError(f"{to} lies in {out}, whose rows would then be there twice; give a folder outside it.")
    note_uri = record_place(to, "compact.json")
    note = dict(read_json(note_uri)) if exists(note_uri) else None
    if note and note["run_id"] == run["run_id"] and note["rows"] == run["rows"]:
        note.pop("from")
        return note
    there = [uri for uri in list_files(to) if uri.endswith(".parquet")]
    foreign = [uri for uri in there if not uri.rsplit("/", 1)[-1].startswith("compact-")]
    if note or foreign:
        raise SettingsError(
            f"{to} already holds something else, as {(foreign or [note_uri])[0]!r}; give an empty folder."
        )
    for uri in there:
        delete(uri)
    return None


def _merged(parts: list[str], rows_per_file: int) -> Iterator[pa.Table]:
    """Give tables of so many rows, and the rest; where there are no rows, one without any: readers want columns."""
    held: list[pa.Table] = []
    files = 0
    for uri in parts:
        held.append(read_table(uri, kind=KIND, required=["uri"]))
        while sum(table.num_rows for table in held) >= rows_per_file:
            together = pa.concat_tables(held)
            yield together.slice(0, rows_per_file)
            files += 1
            held = [together.slice(rows_per_file)]
    rest = pa.concat_tables(held)
    if rest.num_rows or not files:
        yield rest

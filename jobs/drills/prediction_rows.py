"""Compares what a disturbed classification left with what is expected, and returns complaints in words.

A right row depends on the image's bytes alone, so rows are compared by etag, whatever key the bytes have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from carray.core.store.files import join, list_files, read_json

SCORE_TOLERANCE = 1e-5
_EXACT = ("status", "error_code", "label", "size_bytes", "width", "height", "phash")
_MOST_NAMED = 3
"""Rows named in one complaint."""


@dataclass(frozen=True)
class Truth:
    """The outcome of an undisturbed run."""

    etags: Mapping[str, str]
    """The etag of each uri."""
    rows: Mapping[str, Mapping[str, Any]]
    """The row of each etag."""
    shards: int
    deleted: frozenset[str] = frozenset()
    """URIs deleted after the listing: their rows may be not_found."""
    replaced: Mapping[str, str] = field(default_factory=dict)
    """The etag of the bytes that replaced a URI's own."""


def read_truth(out: str) -> Truth:
    """Read an undisturbed run's output."""
    rows = _records(pd.read_parquet(out))
    shards = len(_ledger(out))
    return Truth({row["uri"]: row["etag"] for row in rows}, {row["etag"]: row for row in rows}, shards)


def inspect_output(out: str, truth: Truth) -> list[str]:
    """List all that is wrong with an output folder."""
    fs, path = pafs.FileSystem.from_uri(out)
    try:
        frame = pd.read_parquet(out)
        table = pq.read_table(path, filesystem=fs, partitioning=None)
    except Exception as err:  # whatever a reader raises for a broken file
        return [f"the output cannot be read: {type(err).__name__} {err}"]
    complaints = compare_rows(_records(frame), truth) + _check_files(out)
    if sorted(table["uri"].to_pylist()) != sorted(frame["uri"]):
        complaints.append("pandas and pyarrow read other rows")
    return complaints


def compare_rows(rows: list[dict[str, Any]], truth: Truth) -> list[str]:
    """List lost, doubled and unknown uris, and rows that are not those of their bytes."""
    counts = Counter(row["uri"] for row in rows)
    complaints = _some("lost", sorted(set(truth.etags) - set(counts)))
    complaints += _some("doubled", sorted(uri for uri, count in counts.items() if count > 1))
    complaints += _some("foreign", sorted(set(counts) - set(truth.etags)))
    known = [row for row in rows if row["uri"] in truth.etags]
    return complaints + _some("wrong", [f"{row['uri']} ({reason})" for row in known if (reason := _wrong(row, truth))])


def _wrong(row: Mapping[str, Any], truth: Truth) -> str:
    uri = row["uri"]
    if row["status"] == "fetch_error":
        excused = uri in truth.deleted and row["error_code"] == "not_found"
        return "" if excused else f"fetch_error {row['error_code']}: {row['error']}"
    if row["etag"] not in (truth.etags[uri], truth.replaced.get(uri)):
        return f"etag {row['etag']} of no version"
    due = truth.rows[row["etag"]]
    for name in _EXACT:
        if row[name] != due[name]:
            return f"{name} {row[name]!r}, not {due[name]!r}"
    score = row["score"]
    if row["status"] == "ok" and (score is None or not abs(score - due["score"]) <= SCORE_TOLERANCE):
        return f"score {score}, not {due['score']}"
    return ""


def _check_files(out: str) -> list[str]:
    """Compare each file's rows with its ledger entry, and find files that a reader would take for rows."""
    fs, path = pafs.FileSystem.from_uri(out)
    entries = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    names = {entry.path.removeprefix(f"{path}/") for entry in entries if entry.type == pafs.FileType.File}
    # pandas and pyarrow skip names that begin with . or _, but not every reader does when they end like this.
    visible = {name for name in names if name.endswith(".parquet") or not name.startswith((".", "_"))}
    ledger = _ledger(out)
    parts = {f"part-{shard:06d}.parquet" for shard in ledger}
    complaints = _some("files without a ledger entry, or the reverse", sorted(visible ^ parts))
    for shard, entry in ledger.items():
        if f"part-{shard:06d}.parquet" not in visible:
            continue
        statuses = Counter(row["status"] for row in _records(pd.read_parquet(join(out, f"part-{shard:06d}.parquet"))))
        found = (statuses.total(), statuses["ok"], statuses["fetch_error"], statuses["decode_error"])
        noted = (entry["rows"], entry["ok"], entry["fetch_errors"], entry["decode_errors"])
        if found != noted:
            complaints.append(
                f"shard {shard} has rows, ok, fetch_errors, decode_errors {found}, its entry says {noted}"
            )
    return complaints


def _ledger(out: str) -> dict[int, dict[str, Any]]:
    entries = [read_json(uri) for uri in list_files(join(out, "_carray", "ledger")) if uri.endswith(".json")]
    return {entry["shard"]: entry for entry in entries}  # in their order a retry's comes after the one before


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows with None for every null, so that they compare."""
    return [
        {str(name): None if _is_null(value) else value for name, value in row.items()}
        for row in frame.to_dict("records")
    ]


def _is_null(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _some(what: str, found: list[str]) -> list[str]:
    more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    return [f"{what}: {', '.join(repr(name) for name in found[:_MOST_NAMED])}{more}"] if found else []

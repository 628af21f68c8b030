"""Says where a measurement comes from, and appends rows to the tables in results/.

Invariants: a table keeps the columns it has; a row of others is refused before anything is written.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["ORIGIN", "ROOT", "append_rows", "cores", "origin", "table_text", "write_rows"]

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = ["measured_at", "commit", "machine", "command"]


def origin(command: str, *, accelerator: str = "no accelerator") -> dict[str, str]:
    """Give the columns that every row begins with."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "machine": f"{_processor()}, {cores()} cores, {accelerator}",
        "command": command,
    }


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def append_rows(table: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a table, which is begun with these columns if it is not there."""
    wanted = list(columns)
    if table.exists():
        with table.open(newline="") as file:
            there = next(csv.reader(file))
        if there != wanted:
            raise SystemExit(f"{table} has other columns than this program writes; rename the old table")
    rows = [dict(row) for row in rows]
    unknown = sorted({name for row in rows for name in row} - set(wanted))
    if unknown:
        raise SystemExit(f"{table} has no column {', '.join(unknown)}")
    fresh = not table.exists()
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, wanted, restval="")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def write_rows(table: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table anew; its columns are those of the first row."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Lay rows out for a terminal, leaving out columns that no row fills."""
    used = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    lines = [used, *([_text(row.get(name)) for name in used] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        git = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # a machine without git
        return "unknown"
    return git.stdout.strip() or "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

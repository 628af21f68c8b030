"""What all benchmarks and drills share: command line, origin of a row, tables in results/, running a carray command."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = ["measured_at", "commit", "machine", "command"]
"""The columns that every row begins with."""
CARS = Path(os.environ.get("CARRAY_CARS", ROOT.parent / "shared" / "stanford-cars"))


def origin(command: str, *, accelerator: str = "no accelerator") -> dict[str, str]:
    """Return the values of ORIGIN; `command` is the module with its arguments."""
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": _commit(),
        "machine": f"{_processor()}, {cores()} cores, {accelerator}",
        "command": command,
    }


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


class Program:
    """A benchmark's or drill's command line, and the table of results/ that it appends to.

    The table's columns are those of the committed one.
    """

    def __init__(self, description: str | None, table: str, *, accelerator: str = "no accelerator") -> None:
        self.table, self.accelerator = table, accelerator
        self.parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.option = self.parser.add_argument
        self.option("--results", default=ROOT / "results" / table, type=Path, help="the table to append to")
        self.given = argparse.Namespace()

    def cars_options(self, work: str) -> None:
        """Add the options --data and --work, of a benchmark over Stanford Cars."""
        self.option("--data", default=CARS, type=Path, help="Stanford Cars in its devkit's layout")
        self.option("--work", default=ROOT / "runs" / work, type=Path, help="folder for everything that is made")

    def check_cars(self) -> None:
        """End the program if --data is not Stanford Cars in its devkit's layout."""
        if not (self.given.data / "devkit").is_dir():
            self.parser.error(f"--data is {self.given.data}, which holds no devkit/; give the folder of Stanford Cars")

    def parse(self) -> argparse.Namespace:
        """Parse the command line."""
        self.given = self.parser.parse_args()
        return self.given

    def parts(self, name: str, allowed: Iterable[str]) -> list[str]:
        """Return the parts of a comma-separated option; ends the program if one is not allowed."""
        chosen, names = getattr(self.given, name).split(","), list(allowed)
        if unknown := sorted(set(chosen) - set(names)):
            self.parser.error(f"--{name} has {', '.join(unknown)}; allowed are {', '.join(names)}")
        return chosen

    def command(self) -> str:
        """Return the module and the options that repeat the run, without paths of this machine."""
        spec = sys.modules["__main__"].__spec__
        words = [(spec.name if spec else sys.argv[0]).removesuffix(".__main__")]
        for option in self.parser._actions:
            value = getattr(self.given, option.dest, option.default)
            if value == option.default or option.dest == "results":
                continue
            name = option.option_strings[-1:]
            if isinstance(option, argparse._AppendAction):
                words += [word for one in value for word in (*name, str(one))]
            elif isinstance(value, bool):
                words += name
            elif isinstance(value, list):
                words += [*name, *map(str, value)]
            else:
                words += [*name, option.dest.upper() if isinstance(value, Path) else str(value)]
        return " ".join(words)

    def record(self, rows: Sequence[Mapping[str, Any]], *, hidden: Sequence[str] = ()) -> None:
        """Append rows to the table, and print them without the columns in `hidden`."""
        about = origin(self.command(), accelerator=self.accelerator)
        columns = columns_of(self.table) or [*ORIGIN, *rows[0]]
        append_rows(self.given.results, columns, [about | dict(row) for row in rows])
        print(table_text(rows, [name for name in columns if name not in hidden]), flush=True)


def columns_of(table: str) -> list[str]:
    """Return the columns of a table in results/; none if it is not there."""
    file = ROOT / "results" / table
    return file.read_text().partition("\n")[0].split(",") if file.exists() else []


def run_python(*words: object, **environment: str) -> str:
    """Run this Python in the clone with arguments; returns its standard output, standard error goes to ours."""
    command = [sys.executable, *map(str, words)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def run_carray(*words: object, **environment: str) -> dict[str, Any]:
    """Run a carray command; returns the JSON of its last line, empty if that is none."""
    lines = run_python("-m", "carray", *words, **environment).splitlines()
    return dict(json.loads(lines[-1])) if lines and lines[-1].startswith("{") else {}


def set_words(settings: Iterable[str]) -> list[str]:
    """Return the words of a command line that set each of these settings, KEY=VALUE."""
    return [word for setting in settings for word in ("--set", setting)]


def prepare_cars(data: Path, work: Path) -> Path:
    """Prepare a manifest of all of Stanford Cars in a folder if it is not there; returns the file."""
    manifest = work / "manifest.parquet"
    if not manifest.exists():
        run_carray("prepare", data, "--out", manifest)
    return manifest


def append_rows(table: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a table, and create it with these columns if it is missing; ends the program for other columns."""
    wanted = list(columns)
    if table.exists():
        with table.open(newline="") as file:
            header = next(csv.reader(file))
        if header != wanted:
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
    """Write a new table; its columns are those of the first row."""
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def table_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Format rows for a terminal, without columns that no row fills."""
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

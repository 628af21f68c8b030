"""Processes that a benchmark or a drill starts: found, measured and ended by a mark in their environment.

Ray's processes inherit the mark of the command that started Ray. Only marked processes are ended, each by its id.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.bench.rows import ROOT

_MARK = "CARRAY_DRILL"


def start_marked(
    command: Sequence[str], *, mark: str, log: Path, environment: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """Start a command in its own session and with no Ray to attach to; its output is appended to `log`."""
    variables = marked_environment(mark, environment)
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=file, start_new_session=True)


def marked_environment(mark: str, environment: Mapping[str, str] = {}) -> dict[str, str]:
    """Return the variables of a process that carries a mark, finds carray in the clone, and has no Ray to attach to."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**inherited, "PYTHONPATH": str(ROOT), **environment, _MARK: mark}


def marked_pids(mark: str) -> list[int]:
    """List every process that carries a mark."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill_marked(mark: str, process: subprocess.Popen[Any] | None = None) -> None:
    """Kill every process that carries a mark."""
    for _ in range(100):
        pids = marked_pids(mark)
        for pid in pids:
            kill(pid)
        if process is not None:
            process.poll()
        if not pids:
            return
        time.sleep(0.05)


def kill(pid: int) -> None:
    """Kill one process, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def read_proc(pid: int, name: str) -> str:
    """Read a file of /proc/PID as text; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def title(pid: int) -> str:
    """Return a process's command line, empty if it is gone."""
    return read_proc(pid, "cmdline")


def parent(pid: int) -> int:
    """Return the id of a process's parent, 0 if the process is gone."""
    fields = read_proc(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def times_of(stat: str) -> tuple[int, float]:
    """Parse /proc/PID/stat: (start in clock ticks, processor seconds without those of its children)."""
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold spaces and brackets
    return int(fields[19]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def size_of(text: str, name: str) -> float:
    """Return a size of /proc/PID/status or smaps_rollup in MB (10^6 bytes); 0 if it is missing."""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else 0.0

"""Starts a command with a mark in its environment, and finds or kills all that carries it: Ray's processes inherit it.

Invariants: only processes with the mark are ever killed, each by its id.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from jobs.bench.rows import ROOT

__all__ = ["AGENTS_SECONDS", "kill", "kill_marked", "marked_pids", "start_marked", "title"]

AGENTS_SECONDS = 120
"""Ray's agents, once their raylet was killed, report that to a server that died with it, and end when they give up
(ray/_private/process_watcher.py): half a minute and more."""
_MARK = "CARRAY_DRILL"


def start_marked(
    command: Sequence[str], *, mark: str, log: Path, environment: Mapping[str, str] = {}
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, with what it says appended to `log`; no Ray of ours is attached to."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    wanted = {**inherited, "PYTHONPATH": str(ROOT), **environment, _MARK: mark}
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=wanted, stdout=file, stderr=file, start_new_session=True)


def marked_pids(mark: str) -> list[int]:
    """Give every process that carries a mark."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return found


def kill_marked(mark: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Kill everything that carries a mark, as a machine that loses power would."""
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
    """Kill one process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def title(pid: int) -> str:
    """Give a process's command line, empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

"""Is a host's first process: makes what belongs to the host alone, then buries its dead until it is killed.

    unshare --mount --uts --ipc --pid --fork python first_process.py '{"name": ..., "own": {...}, "keep": [...], ...}'

From: JSON with the host's name, `own` (for each folder that the host has for itself, the folder of this machine that
backs it), `keep` (folders that stay visible, read-only, where one of those covers them) and `names` (its /etc/hosts).
To: a line on standard output once all is made: this process's id as this machine counts.
Invariants: a host can write into its own folders and nowhere else, since all the rest is mounted read-only: a stage
that counted on a shared disk would fail. When this process is killed, the kernel kills all others of the host.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from typing import Any

_BIND, _RECURSIVE, _PRIVATE, _REMOUNT, _READ_ONLY = 4096, 16384, 1 << 18, 32, 1
_SHARED_MEMORY = "size=1g"
_libc = ctypes.CDLL(None, use_errno=True)


def main(wanted: dict[str, Any]) -> None:
    """Make the host, say that it is there, and wait."""
    pid = os.readlink("/proc/self")  # as the machine counts, whose /proc this still is
    socket.sethostname(wanted["name"])
    mount("none", "/", flags=_RECURSIVE | _PRIVATE)
    # Opened before anything is covered, since one may lie in another.
    opened = {place: os.open(place, os.O_PATH) for place in [*wanted["own"].values(), *wanted["keep"], wanted["names"]]}
    for place, source in wanted["own"].items():
        os.makedirs(place, exist_ok=True)
        bind(opened[source], place)
    for place in wanted["keep"]:
        os.makedirs(place, exist_ok=True)
        bind(opened[place], place)
        mount("none", place, flags=_REMOUNT | _BIND | _READ_ONLY)
    bind(opened[wanted["names"]], "/etc/hosts")
    mount("none", "/", flags=_REMOUNT | _BIND | _READ_ONLY)
    mount("tmpfs", "/dev/shm", kind="tmpfs", data=_SHARED_MEMORY)
    mount("proc", "/proc", kind="proc")
    for handle in opened.values():
        os.close(handle)
    os.write(1, f"{pid}\n".encode())
    os.dup2(2, 1)  # whoever waits for more than this line would wait for ever
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel buries them
    while True:
        signal.pause()


def bind(handle: int, place: str) -> None:
    """Let an open folder or file be seen at another place."""
    mount(f"/proc/self/fd/{handle}", place, flags=_BIND)


def mount(source: str, place: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Call mount(2).

    Raises:
        OSError: the kernel refuses.
    """
    words = [word.encode() or None for word in (source, place, kind, data)]
    if _libc.mount(words[0], words[1], words[2], flags, words[3]):
        number = ctypes.get_errno()
        raise OSError(number, f"mounting {source} on {place}: {os.strerror(number)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

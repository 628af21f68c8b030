"""The first process of a host: mounts what belongs to the host alone, then waits to be killed.

    unshare --mount --uts --ipc --pid --fork python first_process.py '{"name": ..., "own": {...}, "keep": [...], ...}'

The JSON holds the host's name, `own` (for each private folder of the host, the folder of this machine behind it),
`keep` (folders that stay visible, read-only) and `names` (its /etc/hosts). Prints this process's id, as this machine
counts, once all is mounted. Everything but the private folders is read-only, so a stage that relied on a shared disk
would fail. When this process is killed, the kernel kills all others of the host.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
from typing import Any

_BIND_MOUNT, _RECURSIVE, _PRIVATE, _REMOUNT, _READ_ONLY = 4096, 16384, 1 << 18, 32, 1
_SHARED_MEMORY = "size=1g"
_libc = ctypes.CDLL(None, use_errno=True)

__all__ = ["main"]


def main(wanted: dict[str, Any]) -> None:
    """Mount the host's folders, print the process id, and wait."""
    pid = os.readlink("/proc/self")  # as the machine counts, whose /proc this still is
    socket.sethostname(wanted["name"])
    _mount("none", "/", flags=_RECURSIVE | _PRIVATE)
    # Opened before anything is covered, since one may lie in another.
    opened = {path: os.open(path, os.O_PATH) for path in [*wanted["own"].values(), *wanted["keep"], wanted["names"]]}
    for folder, source in wanted["own"].items():
        os.makedirs(folder, exist_ok=True)
        _bind(opened[source], folder)
    for folder in wanted["keep"]:
        os.makedirs(folder, exist_ok=True)
        _bind(opened[folder], folder)
        _mount("none", folder, flags=_REMOUNT | _BIND_MOUNT | _READ_ONLY)
    _bind(opened[wanted["names"]], "/etc/hosts")
    _mount("none", "/", flags=_REMOUNT | _BIND_MOUNT | _READ_ONLY)
    _mount("tmpfs", "/dev/shm", kind="tmpfs", data=_SHARED_MEMORY)
    _mount("proc", "/proc", kind="proc")
    for handle in opened.values():
        os.close(handle)
    os.write(1, f"{pid}\n".encode())
    os.dup2(2, 1)  # whoever waits for more than this line would wait forever
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that the kernel reaps them
    while True:
        signal.pause()


def _bind(handle: int, path: str) -> None:
    """Mount an open folder or file at a second path."""
    _mount(f"/proc/self/fd/{handle}", path, flags=_BIND_MOUNT)


def _mount(source: str, path: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Call mount(2)."""
    words = [word.encode() or None for word in (source, path, kind, data)]
    if _libc.mount(words[0], words[1], words[2], flags, words[3]):
        number = ctypes.get_errno()
        raise OSError(number, f"mounting {source} on {path}: {os.strerror(number)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

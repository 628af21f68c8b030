"""One host of a test cluster: switched on, given commands, killed, switched on again.

Its processes have their own name, address, /tmp, home, cache and shared memory, and see nothing of what other hosts
write. A killed host vanishes like one that loses power: its cable is cut first, so that no closed connection tells the
others. Its folders stay, like a disk; /tmp and shared memory are empty again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import IO

from carray.testing.hosts.network import Network

__all__ = ["CLONE", "Host"]

CLONE = Path(__file__).resolve().parents[3]

_FIRST_HANDLE = 10
_switched_on: dict[int, subprocess.Popen[str]] = {}
"""Processes started here, by the id of the host's first process."""


@dataclass(frozen=True)
class Host:
    """A host, identified by its network and its folder."""

    name: str
    number: int
    """Last part of its address."""
    network: Network
    folder: Path
    """Folder of this machine that holds the host's disk."""
    clone: bool = False
    """Whether it has carray's clone; a host without it gets carray through Ray only."""

    @property
    def address(self) -> str:
        """Return its address."""
        return self.network.address(self.number)

    @property
    def home(self) -> Path:
        """Return the folder of this machine that is its home."""
        return self.folder / "home"

    @property
    def alive(self) -> bool:
        """Return whether it is on."""
        pid = self._pid()
        return pid is not None and Path(f"/proc/{pid}").exists()

    def switch_on(self, names: Mapping[str, str]) -> None:
        """Start its first process, with its cable plugged in; `names` maps every host to its address.

        Raises:
            OSError: it did not start.
        """
        backing = {"/tmp": self.folder / "tmp", "/var/tmp": self.folder / "var-tmp", str(Path.home()): self.home}
        backing |= {} if self.clone else {str(CLONE): self.folder / "no-clone"}
        for path, folder in backing.items():
            if path == "/tmp":
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        hosts = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items())
        (self.folder / "hosts").write_text(hosts)
        self.network.mend(self.name)
        alone = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork")
        command = [*self._netns, *alone, "bash", "-ec", self._first_process(backing)]
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True, text=True
            )
        assert process.stdout is not None
        with process.stdout as said:
            pid = said.readline()
        if not pid:
            raise OSError(f"host {self.name} did not start:\n{(self.folder / 'log').read_text()[-2000:]}")
        self._note.write_text(pid)
        _switched_on[int(pid)] = process

    def _first_process(self, own: Mapping[str, Path]) -> str:
        """Return the script that mounts what belongs to the host alone, prints its process id, and waits.

        Everything but the private folders is read-only, so a stage that relied on a shared disk would fail. When this
        process is killed, the kernel kills all others of the host.
        """
        keep = _existing({sys.prefix, sys.base_prefix, *([str(CLONE)] if self.clone else [])})
        mounts = [*((str(folder), path) for path, folder in own.items()), *((folder, folder) for folder in keep)]
        mounts.append((str(self.folder / "hosts"), "/etc/hosts"))
        # Opened before anything is covered, since one may lie in another.
        lines = [f"exec {number}<{quote(source)}" for number, (source, _) in enumerate(mounts, start=_FIRST_HANDLE)]
        for number, (_, path) in enumerate(mounts, start=_FIRST_HANDLE):
            lines += [] if path == "/etc/hosts" else [f"mkdir -p {quote(path)}"]
            lines.append(f"mount --no-canonicalize --bind /proc/self/fd/{number} {quote(path)}; exec {number}<&-")
        lines += [f"mount -o remount,bind,ro {quote(path)}" for path in [*keep, "/"]]
        lines += [
            "mount -t tmpfs -o size=1g tmpfs /dev/shm",
            "read -r pid _ < /proc/self/stat",  # as the machine counts, whose /proc this still is
            "mount -t proc proc /proc",
            f"hostname {self.name}",
            "echo $pid",
            # Whoever waits for more than this line would wait forever; the kernel reaps what is ignored.
            "exec env --ignore-signal=CHLD sleep infinity >&2",
        ]
        return "\n".join(lines)

    def kill(self) -> None:
        """Cut the cable, then kill every process at once."""
        self.network.cut(self.name)
        pid = self._pid()
        if pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        while self.alive:
            time.sleep(0.02)
        self._note.unlink()
        if pid in _switched_on:
            _switched_on.pop(pid).wait()

    def words(self, command: Sequence[str], environment: Mapping[str, str], folder: str = "/") -> list[str]:
        """Return the command line with which this machine runs a command on the host, in that environment only.

        Raises:
            OSError: the host is off.
        """
        pid = self._pid()
        if pid is None:
            raise OSError(f"host {self.name} is off")
        enter = ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        given = [f"{name}={value}" for name, value in (self._environment | dict(environment)).items()]
        return [*enter, "env", "--ignore-environment", f"--chdir={folder}", *given, *command]

    def run(
        self, *command: str, environment: Mapping[str, str], folder: str = "/", seconds: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host to its end, and capture its output."""
        words = self.words(command, environment, folder)
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )

    def start(
        self, *command: str, environment: Mapping[str, str], folder: str = "/", log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host; its output is appended to `log`."""
        words = self.words(command, environment, folder)
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    @property
    def _netns(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.network.namespace(self.name))

    @property
    def _environment(self) -> dict[str, str]:
        path = f"{os.path.realpath(sys.prefix)}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {"PATH": path, "HOME": str(Path.home()), "LANG": "C.UTF-8"}

    @property
    def _note(self) -> Path:
        return self.folder / "pid"

    def _pid(self) -> int | None:
        """Return the id of its first process, as this machine counts."""
        try:
            return int(self._note.read_text())
        except (OSError, ValueError):
            return None


def _existing(folders: set[str]) -> list[str]:
    """Return the folders that exist, parents first."""
    return sorted({os.path.realpath(folder) for folder in folders if os.path.isdir(folder)})

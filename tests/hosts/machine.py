"""Is one host of a test cluster: switched on, given commands, killed, switched on again.

From: a place in a `Network`, and a folder of this machine for what the host keeps. To: processes that have the host's
own name, address, /tmp, home, cache and shared memory, and see nothing of what other hosts write.
Invariants: a host that is killed goes without a word, as one that loses power: its cable is pulled first, so that no
closing of connections tells the others. Its folders stay, as a disk does; `/tmp` and shared memory are empty again.
"""

from __future__ import annotations

import json
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
from typing import IO

from hosts.network import Network

__all__ = ["CLONE", "Host"]

CLONE = Path(__file__).resolve().parents[2]

_FIRST_PROCESS = Path(__file__).with_name("first_process.py")
_switched_on: dict[int, subprocess.Popen[str]] = {}
"""What this process has started, by the hosts' first processes."""


@dataclass(frozen=True)
class Host:
    """Is one host; whoever has its network and its folder has it."""

    name: str
    place: int
    network: Network
    folder: Path
    """Of this machine; holds what the host keeps."""
    clone: bool = False
    """Whether it has carray's clone, to submit jobs from; where not, it has nothing of carray but what Ray brings."""

    @property
    def address(self) -> str:
        """Give its address."""
        return self.network.address(self.place)

    @property
    def home(self) -> Path:
        """Give the folder of this machine that is its home."""
        return self.folder / "home"

    @property
    def alive(self) -> bool:
        """Say whether it is on."""
        pid = self._pid()
        return pid is not None and Path(f"/proc/{pid}").exists()

    def switch_on(self, names: Mapping[str, str]) -> None:
        """Start its first process, with its cable plugged in; `names` gives every host's address.

        Raises:
            OSError: it did not start.
        """
        backing = {"/tmp": self.folder / "tmp", "/var/tmp": self.folder / "var-tmp", str(Path.home()): self.home}
        backing |= {} if self.clone else {str(CLONE): self.folder / "no-clone"}
        for place, folder in backing.items():
            if place == "/tmp":
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
        hosts = "".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items())
        (self.folder / "hosts").write_text(hosts)
        wanted = {
            "name": self.name,
            "own": {place: str(folder) for place, folder in backing.items()},
            "keep": _existing({sys.prefix, sys.base_prefix, *([str(CLONE)] if self.clone else [])}),
            "names": str(self.folder / "hosts"),
        }
        self.network.mend(self.name)
        alone = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork")
        command = [*self._netns, *alone, sys.executable, str(_FIRST_PROCESS), json.dumps(wanted)]
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

    def kill(self) -> None:
        """Let it go without a word: first the cable, then every process at once."""
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
        """Give the command line with which this machine runs a command on the host, with that environment and no more.

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
        """Run a command on the host to its end, and give what it says."""
        words = self.words(command, environment, folder)
        return subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
        )

    def start(
        self, *command: str, environment: Mapping[str, str], folder: str = "/", log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host, with what it says appended to `log`."""
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
        """Give its first process, as this machine counts."""
        try:
            return int(self._note.read_text())
        except (OSError, ValueError):
            return None


def _existing(folders: set[str]) -> list[str]:
    """Give the folders that are there, those above others first."""
    return sorted({os.path.realpath(folder) for folder in folders if os.path.isdir(folder)})

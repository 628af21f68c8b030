"""A process that has imported what workers need, and forks a worker in milliseconds.

It ends with the process that started it, and its forks end with it. They ignore the signals that stop a command, whose
first process decides. Only the standard library is imported to start it, so that its imports run beside the command's.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from carray.core.exit_lines import die_with

__all__ = ["ForkServer", "serve", "starting_early"]

_PROGRAM = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from carray.core import fork_server; " + (
    "fork_server.serve(*sys.argv[2:])"
)

_early: list[ForkServer] = []
"""The fork server that `starting_early` started, until it is taken."""


class ForkServer:
    """The process, as its user sees it."""

    def __init__(self, module: str) -> None:
        """Start the process, which calls `preload` of a module, and whose forks call its `work` with their link."""
        self._commands, theirs = socket.socketpair()
        with theirs:
            given = [json.dumps(sys.path), module, str(theirs.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *given],
                stdin=subprocess.DEVNULL,
                stdout=2,  # standard output is for results
                pass_fds=[theirs.fileno()],
                env={"OMP_NUM_THREADS": "1", **os.environ},  # one core a worker, as Ray sets it
            )

    @staticmethod
    def take(module: str) -> ForkServer:
        """Give the one that was started early, or a new one."""
        return _early.pop() if _early else ForkServer(module)

    def fork(self) -> Connection:
        """Fork a worker; gives the link to it, which ends when the worker ends.

        Raises:
            OSError: the process has ended.
        """
        ours, theirs = Pipe()
        with theirs:
            socket.send_fds(self._commands, [b"f"], [theirs.fileno()])
        return ours

    def kill(self) -> None:
        """Kill the process, and with it every fork; their links say when they have ended."""
        self._process.kill()
        self._process.wait()
        self._commands.close()


@contextmanager
def starting_early(module: str, *, likely: bool) -> Iterator[None]:
    """Start a fork server, where it is likely that the block takes one, before that is known."""
    if likely:
        _early.append(ForkServer(module))
    try:
        yield
    finally:
        while _early:
            _early.pop().kill()


class _WithoutPandas(MetaPathFinder):
    """Hides pandas, which no worker uses: pyarrow imports it, for 0.3 s, only to ask whether a list is a Series."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """Find no module.

        Raises:
            ImportError: it is pandas.
        """
        if name == "pandas":
            raise ImportError("pandas is hidden from workers")


def serve(module: str, commands: str, owner: str) -> None:
    """Fork a worker for each link that comes over the socket `commands`, until the process `owner` ends."""
    die_with(int(owner))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks need no waiting for
    sys.meta_path.insert(0, _WithoutPandas())
    ours = importlib.import_module(module)
    ours.preload()
    server = os.getpid()
    with socket.socket(fileno=int(commands)) as link:
        while True:
            _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
            if not descriptors:
                return
            if os.fork() == 0:
                link.close()
                die_with(server)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                try:
                    ours.work(Connection(descriptors[0]))
                except Exception:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            os.close(descriptors[0])

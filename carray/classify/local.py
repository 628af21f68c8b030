"""Scores shards in processes of this machine, without Ray.

A fork server, started before anything else is done, imports what a worker needs; workers are its forks, which start in
milliseconds. They end with it, and it ends with the driver. Workers ignore the signals that stop a job: the driver
decides. One that dies is replaced, and its shards are given to another one.
Cost: half a second of one core for the fork server's imports, then the opening of the bundle in each worker.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from carray.classify.engine import SHARDS_IN_HAND, Pool, Shards, Worker, read_answer
from carray.classify.ledger import LedgerEntry
from carray.core.cgroups import usable_cores
from carray.core.errors import ClusterError
from carray.core.exit_lines import die_with
from carray.core.ray.resources import Resources

__all__ = ["LocalEngine", "serve_forks", "start_local"]

_SERVER = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); import carray.classify.local as local; " + (
    "local.serve_forks(int(sys.argv[2]), int(sys.argv[3]))"
)
_MOST_UNBORN = 3
"""Processes that may end, one after another, before they can take a shard."""


@dataclass(eq=False)
class _Process:
    """A worker, as the driver sees it."""

    link: Connection
    number: int
    born: bool = False
    """Whether it has said that it can take a shard."""
    shards: Shards = field(default_factory=list)
    """The shards that it has in hand."""


class LocalEngine:
    """Scores shards in processes of this machine; see `start_local`."""

    name = "local"

    def __init__(self) -> None:
        """Start the fork server, which imports while the driver goes on."""
        self._processes: list[_Process] = []
        self._unborn = 0
        self._gpus = visible_gpus()
        cpus = max(1, int(usable_cores()))
        gpus = len(self._gpus)
        self.resources = Resources(True, cpus, cpus, gpus, cpus_per_gpu=cpus // gpus if gpus else 0)
        self._start_server()

    def usage(self) -> str:
        """Say what is in use, and where to look."""
        return f"{len(self._processes)} processes score on this machine; see its free memory"

    def prepare(self, job: dict[str, Any], pool: Pool) -> None:
        """Start the workers before there are shards; each opens the bundle at once."""
        for _ in range(pool.workers - len(self._processes)):
            self._fork(job, opens=True)

    def run_shards(self, job: dict[str, Any], todo: Shards, pool: Pool) -> Generator[LedgerEntry]:
        """Score shards, and give their entries as they finish; a caller that stops early ends the processes.

        Raises:
            CarrayError: of the kind that a worker raised, with its sentence.
            ClusterError: processes end before they can take a shard.
        """
        waiting = deque(todo)
        try:
            while True:
                self._hand_out(job, waiting, pool)
                if not any(process.shards for process in self._processes):
                    return
                ready = wait([process.link for process in self._processes])
                for process in [process for process in self._processes if process.link in ready]:
                    answer = self._receive(process, waiting)
                    if answer is not None:
                        yield read_answer(answer)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the processes, and wait until they have ended, so that none writes any more."""
        self._server.kill()
        self._server.wait()
        self._commands.close()
        for process in self._processes:
            with suppress(OSError, EOFError):
                while True:
                    process.link.recv_bytes()
            process.link.close()
        self._processes.clear()

    def _start_server(self) -> None:
        self._commands, theirs = socket.socketpair()
        with theirs:
            given = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
            self._server = subprocess.Popen(
                [sys.executable, "-P", "-c", _SERVER, *given],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={"OMP_NUM_THREADS": "1", **os.environ},  # a worker has one core, unless `threads` says otherwise
            )

    def _hand_out(self, job: dict[str, Any], waiting: deque[dict[str, Any]], pool: Pool) -> None:
        while waiting:
            least = min(self._processes, key=lambda process: len(process.shards), default=None)
            if (least is None or least.shards) and len(self._processes) < pool.workers:
                least = self._fork(job, opens=False)
            if least is None or len(least.shards) >= SHARDS_IN_HAND:
                return
            least.shards.append(waiting.popleft())
            with suppress(OSError):  # it has died, and its link will say so
                least.link.send_bytes(json.dumps(least.shards[-1]).encode())

    def _fork(self, job: dict[str, Any], *, opens: bool) -> _Process:
        ours, theirs = Pipe()
        taken = {process.number for process in self._processes}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[number % len(self._gpus)]} if self._gpus else {}
        process = _Process(ours, number)
        self._processes.append(process)
        with theirs:
            try:
                socket.send_fds(self._commands, [b"f"], [theirs.fileno()])
            except OSError:  # the fork server was killed, and every worker with it
                self._server.wait()
                self._commands.close()
                self._start_server()
                socket.send_fds(self._commands, [b"f"], [theirs.fileno()])
        with suppress(OSError):
            ours.send_bytes(json.dumps({**job, "environment": environment, "opens": opens}).encode())
        return process

    def _receive(self, process: _Process, waiting: deque[dict[str, Any]]) -> dict[str, Any] | None:
        """Read what a process has to say: an answer, or None where it has only begun, or ended."""
        try:
            answer: dict[str, Any] = json.loads(process.link.recv_bytes())
        except (EOFError, OSError):
            self._bury(process, waiting)
            return None
        if not process.born:
            process.born, self._unborn = True, 0
            return None
        if "bug" in answer:
            raise RuntimeError(f"a scoring process failed:\n{answer['bug']}")
        number = answer.pop("shard")
        process.shards = [one for one in process.shards if one["shard"] != number]
        return answer

    def _bury(self, process: _Process, waiting: deque[dict[str, Any]]) -> None:
        process.link.close()
        self._processes.remove(process)
        waiting.extendleft(reversed(process.shards))
        self._unborn += not process.born
        if self._unborn >= _MOST_UNBORN:
            raise ClusterError(
                f"{self._unborn} scoring processes ended before they could take a shard; look at the lines above and "
                "at the machine's memory, then run the command again."
            )


@contextmanager
def start_local() -> Iterator[LocalEngine]:
    """Give processes of this machine, which end with the block."""
    engine = LocalEngine()
    try:
        yield engine
    finally:
        engine.stop()


def visible_gpus() -> list[str]:
    """Name the NVIDIA GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip()]
    return sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))


class _WithoutPandas(MetaPathFinder):
    """Hides pandas, which a worker never uses: pyarrow imports it only to ask whether a list is a Series (0.3 s)."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        """Find no module; raise where it would be pandas.

        Raises:
            ImportError: it is pandas.
        """
        if name == "pandas":
            raise ImportError("pandas is hidden from scoring processes")


def serve_forks(commands: int, driver: int) -> None:
    """Fork a worker for each link that comes over the socket `commands`, until the process `driver` ends."""
    die_with(driver)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks need no waiting for
    sys.meta_path.insert(0, _WithoutPandas())
    import cv2  # noqa: F401
    import onnxruntime  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import simplejpeg  # noqa: F401

    server = os.getpid()
    with socket.socket(fileno=commands) as link:
        while True:
            _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
            if not descriptors:
                return
            if os.fork() == 0:
                link.close()
                die_with(server)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _work(Connection(descriptors[0]))
            os.close(descriptors[0])


def _work(link: Connection) -> None:
    """Score the shards that come over a link, as many at once as a worker has in hand; never returns."""

    def answer(shard: dict[str, Any]) -> None:
        try:
            said = {"shard": shard["shard"], **worker(shard)}
        except BaseException:
            said = {"bug": traceback.format_exc()}
        with sending:
            link.send_bytes(json.dumps(said).encode())

    sending, code = threading.Lock(), 1
    try:
        job = json.loads(link.recv_bytes())
        worker = Worker(job)
        link.send_bytes(b"{}")
        if job["opens"]:
            with suppress(Exception):  # the first shard meets the same error, and its note
                worker.scorer.open()
        with ThreadPoolExecutor(SHARDS_IN_HAND) as pool:
            while True:
                pool.submit(answer, json.loads(link.recv_bytes()))
    except (EOFError, OSError):
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

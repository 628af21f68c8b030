"""Scores shards in processes of this machine, without Ray: forks of a process that has imported what they need.

One that dies is replaced, and its shards are given to another one. All end with the driver.
Cost: half a second of one core for imports, beside the driver's own, then the opening of the bundle in each worker.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from carray.bundle.scorer import measure_runtimes
from carray.classify.engine import SHARDS_IN_HAND, Pool, Shards, Worker, read_answer
from carray.classify.ledger import LedgerEntry
from carray.core.cgroups import usable_cores
from carray.core.errors import ClusterError
from carray.core.fork_server import ForkServer
from carray.core.ray.resources import Resources

__all__ = ["LocalEngine", "preload", "start_local", "visible_gpus", "work"]

_MOST_FAILED_STARTS = 3
"""Workers that may end, one after another, before they can take a shard."""


@dataclass(eq=False)
class _Process:
    """A worker, as the driver sees it."""

    link: Connection
    number: int
    ready: bool = False
    """Whether it has said that it can take a shard."""
    shards: Shards = field(default_factory=list)
    """The shards that it has in hand."""

    def send(self, value: dict[str, Any]) -> None:
        with suppress(OSError):  # it has died, and its link will say so
            self.link.send_bytes(json.dumps(value).encode())


class LocalEngine:
    """Scores shards in processes of this machine; see `start_local`."""

    name = "local"

    def __init__(self) -> None:
        """Start, or take, the process that forks workers."""
        self._processes: list[_Process] = []
        self._failed_starts = 0
        self._gpus = visible_gpus()
        cpus, gpus = max(1, int(usable_cores())), len(self._gpus)
        self.resources = Resources(True, cpus, cpus, gpus, cpus_per_gpu=cpus // gpus if gpus else 0)
        self._server = ForkServer.take(__name__)

    def usage(self) -> str:
        """Say what is in use, and where to look."""
        return f"{len(self._processes)} processes score on this machine; large shards take minutes, else see its memory"

    def prepare(self, job: dict[str, Any], pool: Pool) -> None:
        """Start workers, which open the bundle before there are shards."""
        for _ in range(pool.workers - len(self._processes)):
            self._fork(job, opens=True)

    def measure(self, bundle: str, runtimes: list[str]) -> dict[str, float]:
        """Measure a bundle's runtimes in a process of their own."""
        with self._new_link() as link, suppress(EOFError, OSError):
            link.send_bytes(json.dumps({"measure": runtimes, "bundle": bundle}).encode())
            return dict(json.loads(link.recv_bytes()))
        return {}

    def run_shards(self, job: dict[str, Any], todo: Shards, pool: Pool) -> Generator[LedgerEntry]:
        """Score shards, and give their entries as they finish; a caller that stops early ends the processes.

        Raises:
            CarrayError: of the kind that a worker raised, with its sentence.
            ClusterError: workers end before they can take a shard.
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
        while self._processes:
            link = self._processes.pop().link
            with suppress(OSError, EOFError):
                while True:
                    link.recv_bytes()
            link.close()

    def _hand_out(self, job: dict[str, Any], waiting: deque[dict[str, Any]], pool: Pool) -> None:
        while waiting:
            least = min(self._processes, key=lambda process: len(process.shards), default=None)
            if (least is None or least.shards) and len(self._processes) < pool.workers:
                least = self._fork(job, opens=False)
            if least is None or len(least.shards) >= SHARDS_IN_HAND:
                return
            least.shards.append(waiting.popleft())
            least.send(least.shards[-1])

    def _new_link(self) -> Connection:
        try:
            return self._server.fork()
        except OSError:  # it was killed, and every worker with it
            self._server.kill()
            self._server = ForkServer(__name__)
            return self._server.fork()

    def _fork(self, job: dict[str, Any], *, opens: bool) -> _Process:
        link = self._new_link()
        taken = {process.number for process in self._processes}
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        self._processes.append(_Process(link, number))
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[number % len(self._gpus)]} if self._gpus else {}
        self._processes[-1].send({**job, "environment": environment, "opens": opens})
        return self._processes[-1]

    def _receive(self, process: _Process, waiting: deque[dict[str, Any]]) -> dict[str, Any] | None:
        """Read what a worker has to say: an answer, or None where it has only begun, or ended."""
        try:
            answer: dict[str, Any] = json.loads(process.link.recv_bytes())
        except (EOFError, OSError):
            self._remove(process, waiting)
            return None
        if not process.ready:
            process.ready, self._failed_starts = True, 0
            return None
        if "bug" in answer:
            raise RuntimeError(f"a scoring process failed:\n{answer['bug']}")
        number = answer.pop("shard")
        process.shards = [shard for shard in process.shards if shard["shard"] != number]
        return answer

    def _remove(self, process: _Process, waiting: deque[dict[str, Any]]) -> None:
        process.link.close()
        self._processes.remove(process)
        waiting.extendleft(reversed(process.shards))
        self._failed_starts += not process.ready
        if self._failed_starts >= _MOST_FAILED_STARTS:
            raise ClusterError(
                f"{self._failed_starts} scoring processes ended before they could take a shard; look at the lines "
                "above and at the machine's memory, then run the command again."
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


def preload() -> None:
    """Import what a worker needs beside this module."""
    import cv2  # noqa: F401
    import onnxruntime  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import simplejpeg  # noqa: F401


def work(link: Connection) -> None:
    """Score the shards that come over a link, as many at once as a worker has in hand, until it ends.

    Or measure runtimes, if that is what comes first.
    """
    sending = threading.Lock()

    def answer(shard: dict[str, Any]) -> None:
        try:
            said = {"shard": shard["shard"], **worker(shard)}
        except BaseException:
            said = {"bug": traceback.format_exc()}
        with sending:
            link.send_bytes(json.dumps(said).encode())

    with ThreadPoolExecutor(SHARDS_IN_HAND) as pool, suppress(EOFError):
        job = json.loads(link.recv_bytes())
        if "measure" in job:
            link.send_bytes(json.dumps(measure_runtimes(job["bundle"], job["measure"])).encode())
            return
        worker = Worker(job)
        link.send_bytes(b"{}")
        if job["opens"]:
            with suppress(Exception):  # the first shard meets the same error, after its note
                worker.scorer.open()
        while True:
            pool.submit(answer, json.loads(link.recv_bytes()))

"""An object store in memory, whose clients are threads that run one at a time, in an order that a seed decides.

Every operation of every client can fail, take effect and lose its answer, wait for any number of others, or be the last
one of its process. Nothing else runs between two operations, so a seed always gives the same schedule.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from carray.classify import ledger
from carray.core.store import files, objects
from carray.core.store.objects import ObjectState, UnmetCondition


class Killed(BaseException):
    """The process of this thread is gone: not even its `finally` reaches the store."""


@dataclass
class Process:
    """A process, on a machine of its own."""

    name: str
    alive: bool = True
    machine_lost: bool = False
    """Whether Ray has given its machine up."""
    away_steps: int = 0
    """For how many steps of others it is cut off."""
    failures: int = 0
    """How many of its next operations fail."""


class Actor:
    """A thread of a process that waits before each of its operations until the scheduler lets it go on."""

    def __init__(self, world: World, process: Process, action: Callable[[], Any]) -> None:
        self.process, self.result, self.error = process, None, None
        self.ended = False
        self._world, self._action = world, action
        self._go = threading.Lock()  # a lock hands over faster than a semaphore
        self._go.acquire()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Let it go on to its next operation, or to its end."""
        self._go.release()
        self._world.back.acquire()
        if self.ended:
            self._thread.join()

    def pause(self) -> None:
        """Wait for the next step."""
        self._world.back.release()
        self._go.acquire()

    def _run(self) -> None:
        self._go.acquire()
        self._world.current.actor = self
        try:
            self.result = self._action()
        except BaseException as err:
            self.error = err
        self.ended = True
        self._world.back.release()


@dataclass
class World:
    """The store, its clients and their faults."""

    seed: int
    faults: bool = True
    files: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Path -> bytes and etag."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.back = threading.Lock()
        self.back.acquire()
        self.current = threading.local()
        self.log: list[str] = []
        self._version = 0

    def start(self, process: Process, action: Callable[[], Any]) -> Actor:
        """Start a thread of a process."""
        return Actor(self, process, action)

    def operate(self, name: str, path: str, effect: Callable[[], Any], *, writes: bool = False) -> Any:
        """Do one operation of the current thread, with what the seed has in store for it."""
        actor = getattr(self.current, "actor", None)
        if actor is None:  # the test itself
            return effect()
        actor.pause()
        process = actor.process
        if not process.alive:
            raise Killed
        fate = self.random.random() if self.faults else 1.0
        done = f"{process.name} {name} {path}"
        if fate < 0.005:
            process.failures = files.TRIES + 1  # an outage that no number of tries outlasts
        if fate < 0.03 or (self.faults and process.failures):
            process.failures = max(0, process.failures - 1)
            self.log.append(f"{done}: fails")
            raise ConnectionError("no answer")
        if fate < 0.04:
            self.log.append(f"{done}: its process dies before")
            self.kill(process)
        answer = effect()
        if fate < 0.05:
            self.log.append(f"{done}: its process dies after")
            self.kill(process)
        if fate < 0.09 and writes:
            self.log.append(f"{done}: the answer is lost")
            raise ConnectionError("the answer was lost")
        self.log.append(done)
        return answer

    def kill(self, process: Process, *, machine: bool = True) -> None:
        """End a process, by default with its machine, from one of its own threads."""
        process.alive, process.machine_lost = False, process.machine_lost or machine
        raise Killed

    def get(self, uri: str, admit: Any = None) -> tuple[bytes, str]:
        """Read an object, as `get_object` does."""

        def effect() -> tuple[bytes, str]:
            if path not in self.files:
                raise FileNotFoundError(path)
            return self.files[path]

        path = uri.removeprefix("s3://")
        return self.operate("get", path, effect)

    def get_range(self, uri: str, start: int, end: int) -> tuple[bytes, int]:
        """Read the last bytes of an object, or some others, as `get_range` does."""
        data, _ = self.get(uri)
        return data[start:end] if start >= 0 else data[start:], len(data)

    def head(self, uri: str) -> ObjectState:
        """Look at an object, as `head_object` does."""
        return ObjectState(len(self.get(uri)[0]), 0)

    def list(self, uri: str) -> tuple[list[str], bool]:
        """List one folder, as `list_names` does."""

        def effect() -> list[str]:
            below = [path.removeprefix(f"{folder}/") for path in self.files if path.startswith(f"{folder}/")]
            return sorted(name for name in below if "/" not in name)

        folder = uri.removeprefix("s3://")
        names = self.operate("list", folder, effect)
        return names, bool(names)

    def put(self, uri: str, data: bytes, *, mode: str | None = None) -> str:
        """Write an object, as `put_object` does."""

        def effect() -> str:
            there = self.files.get(path)
            if (mode == "create" and there) or (mode not in (None, "create") and (not there or there[1] != mode)):
                raise UnmetCondition
            return self.store(path, data)

        path = uri.removeprefix("s3://")
        return str(self.operate("put", path, effect, writes=True))

    def delete(self, uri: str) -> None:
        """Delete an object, as `delete_object` does; S3 says nothing when there is none."""
        path = uri.removeprefix("s3://")
        self.operate("delete", path, lambda: self.files.pop(path, None), writes=True)

    def store(self, path: str, data: bytes) -> str:
        """Write an object, whatever is there."""
        self._version += 1
        self.files[path] = (bytes(data), str(self._version))
        return str(self._version)

    def put_anyway(self, uri: str, data: bytes, *_: Any, **__: Any) -> str:
        """Write an object over any other, in the place of `create` or `replace`."""
        return str(files.retry(lambda: self.put(uri, data), what=f"writing {uri}"))


class Stores:
    """Leads the code under test to the world of the schedule that runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.world = World(0)
        patch.setattr(objects, "get_object", lambda *args: self.world.get(*args))
        patch.setattr(objects, "get_range", lambda *args: self.world.get_range(*args))
        patch.setattr(objects, "head_object", lambda *args: self.world.head(*args))
        patch.setattr(objects, "list_names", lambda *args: self.world.list(*args))
        patch.setattr(objects, "put_object", lambda *args, **mode: self.world.put(*args, **mode))
        patch.setattr(objects, "delete_object", lambda *args: self.world.delete(*args))
        patch.setattr(ledger, "at_once", lambda action, items: [action(item) for item in items])
        patch.setattr(files.time, "sleep", lambda seconds: None)

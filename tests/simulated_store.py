"""An object store in memory, whose clients are threads that run one at a time, in an order that a seed decides.

Every operation of every client can fail, take effect and lose its answer, wait for any number of others, or be the last
one of its process. Nothing else runs between two operations, so a seed always gives the same schedule.
"""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from carray.classify import ledger
from carray.core.errors import FetchError
from carray.core.store import conditional, files
from carray.core.store.image_bytes import FetchedImage
from carray.core.store.s3 import UnmetCondition


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

    def get(self, uri: str, **_: Any) -> FetchedImage:
        """Read an object, as `fetch_image` does."""

        def effect() -> FetchedImage:
            if path not in self.files:
                raise FetchError("not_found", "the object does not exist (NoSuchKey)")
            return FetchedImage(*self.files[path])

        path = uri.removeprefix("s3://")
        return files.retry(lambda: self.operate("get", path, effect), what=f"reading {uri}")

    def put(self, bucket: str, key: str, data: bytes, **condition: str) -> str:
        """Write an object under a condition, as `put_object` does."""

        def effect() -> str:
            there = self.files.get(path)
            if "IfNoneMatch" in condition and there is not None:
                raise UnmetCondition
            if "IfMatch" in condition and (there is None or f'"{there[1]}"' != condition["IfMatch"]):
                raise UnmetCondition
            return self.store(path, data)

        path = f"{bucket}/{key}"
        return str(self.operate("put", path, effect, writes=True))

    def delete(self, bucket: str, key: str) -> None:
        """Delete an object, as `delete_object` does."""
        path = f"{bucket}/{key}"
        self.operate("delete", path, lambda: self.files.pop(path, None), writes=True)

    def store(self, path: str, data: bytes) -> str:
        """Write an object, whatever is there."""
        self._version += 1
        self.files[path] = (bytes(data), str(self._version))
        return str(self._version)

    def put_anyway(self, uri: str, data: bytes, *_: Any, **__: Any) -> str:
        """Write an object over any other, in the place of `create` or `replace`."""
        path = uri.removeprefix("s3://")
        write = lambda: self.operate("put", path, lambda: self.store(path, data), writes=True)  # noqa: E731
        return str(files.retry(write, what=f"writing {uri}"))


class FileSystem(pafs.FileSystemHandler):
    """What pyarrow asks of the store."""

    def __init__(self, world: World) -> None:
        self.world = world

    def get_type_name(self) -> str:
        """Name it."""
        return "simulated"

    def normalize_path(self, path: str) -> str:
        """Give the path as it is."""
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        """Say what there is."""
        return [self.world.operate("head", path, lambda path=path: self._info(path)) for path in paths]

    def _info(self, path: str) -> pafs.FileInfo:
        found = self.world.files.get(path)
        kind = pafs.FileType.File if found else pafs.FileType.NotFound
        return pafs.FileInfo(path, kind, size=len(found[0]) if found else None)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        """List one folder."""

        def effect() -> list[pafs.FileInfo]:
            prefix = f"{selector.base_dir}/"
            inside = [path for path in self.world.files if path.startswith(prefix)]
            return [self._info(path) for path in sorted(inside) if "/" not in path.removeprefix(prefix)]

        return list(self.world.operate("list", selector.base_dir, effect))

    def delete_file(self, path: str) -> None:
        """Delete one object; S3 says nothing when there is none."""
        self.world.operate("delete", path, lambda: self.world.files.pop(path, None), writes=True)

    def open_input_file(self, path: str) -> pa.NativeFile:
        """Read one object."""

        def effect() -> bytes:
            if path not in self.world.files:
                raise FileNotFoundError(path)
            return self.world.files[path][0]

        return pa.PythonFile(io.BytesIO(self.world.operate("get", path, effect)), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        """Write one object, which appears when the stream is closed."""
        world = self.world
        world.operate("put", path, lambda: None)

        class Stream(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    world.store(path, self.getvalue())
                super().close()

        return pa.PythonFile(Stream(), mode="w")

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = move = copy_file = None
    open_input_stream = open_append_stream = None


class Stores:
    """Leads the code under test to the world of the schedule that runs."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.world = World(0)
        patch.setattr(conditional, "fetch_image", lambda uri: self.world.get(uri))
        patch.setattr(conditional, "put_object", lambda *args, **condition: self.world.put(*args, **condition))
        patch.setattr(conditional, "delete_object", lambda *args: self.world.delete(*args))
        patch.setattr(files, "_s3", lambda _environment: pafs.PyFileSystem(FileSystem(self.world)))
        patch.setattr(files, "aws_environment", lambda: ())  # to look at it costs more than the simulation
        patch.setattr(ledger, "at_once", lambda action, items: [action(item) for item in items])
        patch.setattr(files.time, "sleep", lambda seconds: None)

"""Disturbs a running classification: processes killed, storage that fails, objects that change, a disk that is full.

A fault begins at a random moment of the job's own progress, and everything is restored at the end.
"""

from __future__ import annotations

import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from carray.core.store.files import join, list_files, read_json
from carray.testing.drawing import DEMO_CLASSES
from carray.testing.fault_proxy import FaultProxy, Rule
from carray.testing.object_store import S3Server, free_ports
from jobs.drills.harness import Command
from jobs.drills.prediction_rows import Truth
from jobs.processes import kill, kill_marked, marked_pids, parent, start_marked, title

_CHANGED_OBJECTS = 60
_TERM_SECONDS = 30
_NODE_SECONDS = 60


@dataclass
class Job(Command):
    """A `carray classify` command, with its output folder."""

    out: str = ""

    def shards_done(self) -> int:
        """Count the shards in the ledger, where each retry has an entry of its own."""
        return len({uri.rsplit("/", 1)[-1].partition(".")[0] for uri in self._ledger()})

    def wait_for_shards(self, count: int) -> bool:
        """Wait until so many shards are done, for none until the run is begun; False if the job ended before."""

        def reached() -> bool:
            started = list_files(join(self.out, "_carray"))
            return bool(started) and self.shards_done() >= count

        return self.wait_until(reached)

    def fetch_errors(self) -> int:
        """Count the rows that could not be fetched, by the ledger."""
        newest = {entry["shard"]: entry for entry in map(read_json, self._ledger())}
        return sum(int(entry["fetch_errors"]) for entry in newest.values())

    def _ledger(self) -> list[str]:
        return list_files(join(self.out, "_carray", "ledger"))


@dataclass(frozen=True)
class Scene:
    """What surrounds the drilled jobs."""

    bucket: str
    prefix: str
    """Of the images' keys, with a slash."""
    store: S3Server
    proxy: FaultProxy
    truth: Truth
    bodies: dict[str, bytes]
    """The bytes of each key."""
    mark: str
    """Beginning of the marks of all processes."""
    environment: dict[str, str]
    """Leads a job to the proxy."""

    def uri(self, key: str) -> str:
        """Return a key's URI."""
        return f"s3://{self.bucket}/{key}"

    def etag(self, key: str) -> str:
        """Return the etag of a key's original bytes."""
        return self.truth.etags[self.uri(key)]


@dataclass
class Drill:
    """One job and one kind of fault."""

    kind: str
    job: Job
    scene: Scene
    dice: random.Random
    truth: Truth
    """What is expected, with the objects that the fault changed."""
    said: str = ""
    """What was done and when; empty if the job had ended before."""
    complaints: list[str] = field(default_factory=list)

    def strike(self) -> None:
        """Wait until a random number of shards is done, then do to the job what the kind says."""
        job, fault = self.job, FAULTS[self.kind]
        if fault is None:  # prepared before the start
            self.said = self.kind
            return
        wanted = self.dice.randint(1 if fault is _change_objects else 0, self.truth.shards - 2)
        running = job.wait_for_shards(wanted)
        time.sleep(self.dice.uniform(0, 3.0 if wanted == 0 else 0.3))
        if running and job.alive:
            self.said = f"{self.kind} at shard {job.shards_done()} of {self.truth.shards}"
            fault(self)

    def draw_key(self) -> str:
        """Draw the key of an image."""
        return self.dice.choice(sorted(self.scene.bodies))


def _kill_worker(drill: Drill) -> None:
    def kill_one() -> bool:
        titles = {pid: title(pid) for pid in marked_pids(drill.job.mark)}
        workers = [pid for pid, name in titles.items() if name.startswith("ray::") and "Worker" in name]
        forkers = {pid for pid, name in titles.items() if "fork_server" in name}
        workers += sorted(pid for pid in forkers if parent(pid) in forkers)
        if workers:
            kill(drill.dice.choice(workers))
        return bool(workers)

    if not drill.job.wait_until(kill_one):
        drill.complaints.append("no worker was found to kill")


def _kill_raylet(drill: Drill) -> None:
    raylets = [pid for pid in marked_pids(_second_mark(drill.job)) if "/raylet/raylet " in title(pid)]
    for pid in raylets:
        kill(pid)
    if not raylets:
        drill.complaints.append("no raylet was found to kill")


def _kill_driver(drill: Drill) -> None:
    assert drill.job.process is not None
    drill.job.process.kill()


def _terminate_driver(drill: Drill) -> None:
    job = drill.job
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    code = job.wait(_TERM_SECONDS)
    if code is None or code <= 0:  # negative: the signal itself ended the process
        drill.complaints.append(f"SIGTERM ended it with {code} in {_TERM_SECONDS} s: {job.said()[-600:]}")
    if left := job.left(15):
        drill.complaints.append(f"SIGTERM left {left}")


def _kill_store(drill: Drill) -> None:
    drill.scene.store.kill()
    time.sleep(drill.dice.uniform(0, 4))
    drill.scene.store.start()


def _fail_storage(drill: Drill, action: str, **options: Any) -> None:
    """Let requests fail for one to four seconds, and until at least one has failed."""
    proxy = drill.scene.proxy
    if action == "version":
        images = f"^/{drill.scene.bucket}/{drill.scene.prefix}"
        options |= {"key": images, "other": drill.scene.bodies[drill.draw_key()]}
    rule = Rule(action, **options)
    before = proxy.struck[action]
    proxy.add(rule)
    until = time.monotonic() + drill.dice.uniform(1, 4)
    while drill.job.alive and (time.monotonic() < until or proxy.struck[action] == before):
        time.sleep(0.05)
    proxy.withdraw(rule)
    if proxy.struck[action] == before:
        drill.complaints.append("no request was struck")


def _change_objects(drill: Drill) -> None:
    """Delete objects, or replace their bytes by those of others, while the job reads."""
    scene, client = drill.scene, drill.scene.store.client()
    keys, replaced = drill.dice.sample(sorted(scene.bodies), _CHANGED_OBJECTS), {}
    for key in keys:
        if drill.kind == "deleted":
            client.delete_object(Bucket=scene.bucket, Key=key)
            continue
        other = drill.draw_key()
        client.put_object(Bucket=scene.bucket, Key=key, Body=scene.bodies[other])
        replaced[scene.uri(key)] = scene.etag(other)
    deleted = frozenset(scene.uri(key) for key in keys) if drill.kind == "deleted" else frozenset()
    drill.truth = replace(drill.truth, deleted=deleted, replaced=replaced)


FAULTS: dict[str, Callable[[Drill], None] | None] = {
    "worker": _kill_worker,
    "raylet": _kill_raylet,
    "driver": _kill_driver,
    "term": _terminate_driver,
    "store": _kill_store,
    "error500": partial(_fail_storage, action="answer", status=500, code="InternalError", probability=0.5),
    "slowdown": partial(_fail_storage, action="answer", status=503, code="SlowDown", probability=0.5),
    "reset": partial(_fail_storage, action="reset", probability=0.5),
    "hang": partial(_fail_storage, action="hang", seconds=5, probability=0.3),
    "truncate": partial(_fail_storage, action="truncate", method="GET", probability=0.5),
    "version": partial(_fail_storage, action="version", method="GET", probability=0.5),
    "credentials": partial(_fail_storage, action="answer", status=400, code="ExpiredToken"),
    "denied": None,
    "deleted": _change_objects,
    "replaced": _change_objects,
    "disk": None,
}
"""What disturbs a running job; None for what is prepared before it starts."""


@contextmanager
def prepare_fault(drill: Drill, work: Path) -> Iterator[Callable[[], None]]:
    """Prepare what a kind needs before its job starts; yields a function that ends the fault."""
    job, scene = drill.job, drill.scene
    if drill.kind == "disk":
        with full_disk(Path(job.out).parent, kilobytes=drill.dice.randint(60, 300)) as enlarge:
            yield enlarge
    elif drill.kind == "denied":
        key = f"/{scene.prefix}{drill.dice.choice(DEMO_CLASSES[:3])}/"
        rule = Rule("answer", status=403, code="AccessDenied", method="GET", key=key)
        scene.proxy.add(rule)
        yield lambda: scene.proxy.withdraw(rule)
    elif drill.kind == "raylet":
        with two_nodes(job, work / f"ray-{len(list(work.iterdir()))}") as job.environment:
            yield lambda: None
    else:
        yield lambda: None


@contextmanager
def full_disk(folder: Path, *, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Mount a small disk on a folder; yields a function that enlarges it. Needs root.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "carray-drill", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"no disk could be mounted on {folder}: {done.stderr.strip()}")

    def enlarge() -> None:
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)

    try:
        yield enlarge
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def two_nodes(job: Job, folder: Path) -> Iterator[dict[str, str]]:
    """Start a Ray of two nodes of one CPU on this machine; yields the environment that leads a driver to it."""
    (port,) = free_ports(1)
    # Ray binds ports to every address of this machine: the token protects it.
    environment = {**job.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--disable-usage-stats", "--block"]
    ray += ["--node-ip-address=127.0.0.1"]
    head = ["--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    nodes = {f"{job.mark}-head": head, _second_mark(job): [f"--address=127.0.0.1:{port}"]}
    log = folder.with_suffix(".log")
    try:
        for number, (mark, words) in enumerate(nodes.items(), start=1):
            start_marked([*ray, *words], mark=mark, log=log, environment=environment)
            _wait_for_nodes(number, log)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for mark in reversed(nodes):
            kill_marked(mark)


def _wait_for_nodes(count: int, log: Path) -> None:
    until = time.monotonic() + _NODE_SECONDS
    while log.read_text(errors="replace").count("Ray runtime started.") < count:
        if time.monotonic() > until:
            raise RuntimeError(f"a node of Ray did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


def _second_mark(job: Job) -> str:
    return f"{job.mark}-second"


def restore(scene: Scene, changed: Collection[str]) -> None:
    """Put back the bytes of every object that was deleted or replaced."""
    client = scene.store.client()
    for key, body in scene.bodies.items():
        if scene.uri(key) in changed:
            client.put_object(Bucket=scene.bucket, Key=key, Body=body)

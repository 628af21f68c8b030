"""Strikes a running classification: processes killed, storage that fails, objects that change, a disk that is full.

A fault falls at a random moment of the job's own progress, and everything is restored at the end.
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
from dataclasses import dataclass, replace
from pathlib import Path

from carray.core.store.files import join, list_files, read_json
from carray.testing.fault_proxy import FaultProxy, Rule
from carray.testing.object_store import S3Server, free_ports
from jobs.drills.harness import Command, kill, kill_marked, marked_pids, start_marked, title
from jobs.drills.prediction_rows import Truth

_STORAGE = ("error500", "slowdown", "reset", "hang", "truncate", "version", "credentials")
_KILLS = ("worker", "raylet", "driver", "term", "store")
KINDS = (*_KILLS, *_STORAGE, "denied", "deleted", "replaced", "disk")
_CHANGED_OBJECTS = 60
_TERM_SECONDS = 30
_NODE_SECONDS = 60


@dataclass
class Job(Command):
    """A `carray classify` command, with its output folder."""

    out: str = ""

    def shards_done(self) -> int:
        """Count the shards in the ledger, where each retry has an entry of its own."""
        return len(
            {uri.rsplit("/", 1)[-1].partition(".")[0] for uri in list_files(join(self.out, "_carray", "ledger"))}
        )

    def wait_for_shards(self, count: int) -> bool:
        """Wait until so many shards are done, for none until Ray starts; False if the job ended before."""

        def reached() -> bool:
            started = "Ray:" in self.said() or list_files(join(self.out, "_carray"))
            return bool(started) and self.shards_done() >= count

        return self.wait_until(reached)

    def fetch_errors(self) -> int:
        """Count the rows that could not be fetched, by the ledger."""
        entries = [read_json(uri) for uri in list_files(join(self.out, "_carray", "ledger"))]
        newest = {entry["shard"]: entry for entry in entries}
        return sum(int(entry["fetch_errors"]) for entry in newest.values())


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


@dataclass(frozen=True)
class Strike:
    """What was done to a job."""

    said: str
    """In words; empty if the job had ended before."""
    truth: Truth
    """What is expected now."""
    complaints: tuple[str, ...] = ()


def strike(kind: str, job: Job, scene: Scene, dice: random.Random) -> Strike:
    """Wait until a random number of shards is done, then do to the job what `kind` says."""
    if kind in ("denied", "disk"):  # these were prepared before the start
        return Strike(kind, scene.truth)
    wanted = dice.randint(1 if kind in ("deleted", "replaced") else 0, scene.truth.shards - 2)
    running = job.wait_for_shards(wanted)
    time.sleep(dice.uniform(0, 3.0 if wanted == 0 else 0.3))
    if not running or not job.alive:
        return Strike("", scene.truth)
    said = f"{kind} at shard {job.shards_done()} of {scene.truth.shards}"
    if kind in _STORAGE:
        return replace(_fail_storage(kind, job, scene, dice), said=said)
    if kind in ("deleted", "replaced"):
        return replace(_change_objects(kind, scene, dice), said=said)
    return replace(_KILLERS[kind](job, scene, dice), said=said)


def _kill_worker(job: Job, scene: Scene, dice: random.Random) -> Strike:
    def kill_one() -> bool:
        workers = [pid for pid in marked_pids(job.mark) if title(pid).startswith("ray::") and "Worker" in title(pid)]
        if workers:
            kill(dice.choice(workers))
        return bool(workers)

    found = job.wait_until(kill_one)
    return Strike("", scene.truth, () if found else ("no worker was found to kill",))


def _kill_raylet(job: Job, scene: Scene, dice: random.Random) -> Strike:
    raylets = [pid for pid in marked_pids(_second_mark(job)) if "/raylet/raylet " in title(pid)]
    for pid in raylets:
        kill(pid)
    return Strike("", scene.truth, () if raylets else ("no raylet was found to kill",))


def _kill_driver(job: Job, scene: Scene, dice: random.Random) -> Strike:
    assert job.process is not None
    job.process.kill()
    return Strike("", scene.truth)


def _terminate_driver(job: Job, scene: Scene, dice: random.Random) -> Strike:
    assert job.process is not None
    job.process.send_signal(signal.SIGTERM)
    code = job.wait(_TERM_SECONDS)
    # A negative code means that the signal itself ended the process.
    complaints = (
        [] if code and code > 0 else [f"SIGTERM ended it with {code} in {_TERM_SECONDS} s: {job.said()[-600:]}"]
    )
    if left := job.left(15):
        complaints.append(f"SIGTERM left {left}")
    return Strike("", scene.truth, tuple(complaints))


def _kill_store(job: Job, scene: Scene, dice: random.Random) -> Strike:
    scene.store.kill()
    time.sleep(dice.uniform(0, 4))
    scene.store.start()
    return Strike("", scene.truth)


_KILLERS: dict[str, Callable[[Job, Scene, random.Random], Strike]] = {
    "worker": _kill_worker,
    "raylet": _kill_raylet,
    "driver": _kill_driver,
    "term": _terminate_driver,
    "store": _kill_store,
}


def _fail_storage(kind: str, job: Job, scene: Scene, dice: random.Random) -> Strike:
    """Let requests fail for one to four seconds, and until at least one has failed."""
    rule = _rule(kind, scene, dice)
    before = scene.proxy.struck[rule.action]
    scene.proxy.add(rule)
    until = time.monotonic() + dice.uniform(1, 4)
    while job.alive and (time.monotonic() < until or scene.proxy.struck[rule.action] == before):
        time.sleep(0.05)
    scene.proxy.withdraw(rule)
    struck = scene.proxy.struck[rule.action] - before
    return Strike("", scene.truth, () if struck else ("no request was struck",))


def _rule(kind: str, scene: Scene, dice: random.Random) -> Rule:
    images = f"^/{scene.bucket}/{scene.prefix}"
    other = scene.bodies[dice.choice(sorted(scene.bodies))]
    rules = {
        "error500": Rule("answer", status=500, code="InternalError", probability=0.5),
        "slowdown": Rule("answer", status=503, code="SlowDown", probability=0.5),
        "reset": Rule("reset", probability=0.5),
        "hang": Rule("hang", seconds=5, probability=0.3),
        "truncate": Rule("truncate", method="GET", probability=0.5),
        "version": Rule("version", method="GET", key=images, other=other, probability=0.5),
        "credentials": Rule("answer", status=400, code="ExpiredToken"),
    }
    return rules[kind]


def _change_objects(kind: str, scene: Scene, dice: random.Random) -> Strike:
    """Delete objects, or replace their bytes by those of others, while the job reads."""
    client = scene.store.client()
    keys = dice.sample(sorted(scene.bodies), _CHANGED_OBJECTS)
    replaced = {}
    for key in keys:
        if kind == "deleted":
            client.delete_object(Bucket=scene.bucket, Key=key)
            continue
        other = dice.choice(sorted(scene.bodies))
        client.put_object(Bucket=scene.bucket, Key=key, Body=scene.bodies[other])
        replaced[scene.uri(key)] = scene.etag(other)
    deleted = frozenset(scene.uri(key) for key in keys) if kind == "deleted" else frozenset()
    return Strike("", replace(scene.truth, deleted=deleted, replaced=replaced))


@contextmanager
def full_disk(folder: Path, *, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Mount a small disk on a folder; yields a function that enlarges it. Needs root.

    Raises:
        PermissionError: this user may not mount.
    """
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "carray-drill", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise PermissionError(f"no disk could be mounted on {folder}: {done.stderr.strip()}")
    try:
        yield lambda: _make_room(folder)
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
    head = [*ray, "--head", f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=false"]
    marks = [f"{job.mark}-head", _second_mark(job)]
    log = folder.with_suffix(".log")
    try:
        start_marked(head, mark=marks[0], log=log, environment=environment)
        _wait_for_raylet(marks[0], log)
        start_marked([*ray, f"--address=127.0.0.1:{port}"], mark=marks[1], log=log, environment=environment)
        _wait_for_raylet(marks[1], log)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        for mark in reversed(marks):
            kill_marked(mark)


def _wait_for_raylet(mark: str, log: Path) -> None:
    until = time.monotonic() + _NODE_SECONDS
    while log.read_text(errors="replace").count("Ray runtime started.") < (2 if mark.endswith("second") else 1):
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


def _make_room(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)

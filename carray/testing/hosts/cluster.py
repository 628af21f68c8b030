"""A Ray cluster of a head and two workers, each on its own host, and an object store on a fourth.

It is set up as cluster/README.md says: token authentication, a dashboard on the head's loopback, and on every node only
the environment that leads to the store. The head runs drivers only. A worker that loses its Ray is restarted by a
supervisor, as Kubernetes or systemd would. A cluster is found again by its number; `remove` deletes all of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from carray.testing.hosts.machine import CLONE, Host
from carray.testing.hosts.network import Network, numbers_in_use
from carray.testing.object_store import S3Server, prepare_store

__all__ = ["STATE", "WORKERS", "WORKER_CPUS", "Cluster"]

STATE = Path("/var/tmp/carray-hosts")
"""Holds the hosts' disks, a folder for each cluster's number."""
WORKERS = ("worker1", "worker2")
WORKER_CPUS = 3
"""Of each worker, as Ray is told."""
_NUMBERS = {"store": 5, "head": 10, "worker1": 11, "worker2": 12}
_NODE = ("--disable-usage-stats", "--block", f"--object-store-memory={100_000_000}")
_HEAD = ("ray", "start", "--head", "--port=6379", "--dashboard-host=127.0.0.1", "--num-cpus=0", *_NODE)
_DASHBOARD = "http://127.0.0.1:8265"
_START_SECONDS = 120
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""Ray's settings of how soon a silent node counts as lost: 16 s instead of the default 65 s."""


@dataclass
class Cluster:
    """A cluster: its network, its store, and where its nodes find the store."""

    network: Network
    store: S3Server
    endpoint: str = ""

    @classmethod
    def build(cls) -> Cluster:
        """Make the hosts and start the store; `start` starts Ray.

        Raises:
            OSError: this machine allows no namespaces.
        """
        network = Network.claim()
        folder = STATE / str(network.number)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            for name, number in _NUMBERS.items():
                network.join(name, number)
            inside = ("ip", "netns", "exec", network.namespace("store"))
            store = prepare_store(folder / "store", address=network.address(_NUMBERS["store"]), inside=inside)
            store.start()
        except BaseException:
            network.remove()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(network, store)

    @classmethod
    def find(cls, number: int) -> Cluster:
        """Find a cluster by its number.

        Raises:
            OSError: there is none of that number.
        """
        note = STATE / str(number) / "cluster.json"
        if number not in numbers_in_use() or not note.exists():
            raise OSError(f"there is no cluster {number}; `up` builds one")
        saved = json.loads(note.read_text())
        store = S3Server(**{**saved["store"], "folder": Path(saved["store"]["folder"])})
        return cls(Network(number), store, saved["endpoint"])

    def start(self, *, endpoint: str = "") -> None:
        """Start Ray with a new token, and wait until every node has joined; `endpoint` may name a proxy of the store.

        Raises:
            OSError: one did not in time.
        """
        self.endpoint = endpoint or self.store.endpoint
        note = self.folder / "cluster.json"
        note.touch(mode=0o600)
        store = vars(self.store) | {"folder": str(self.store.folder), "process": None}
        note.write_text(json.dumps({"store": store, "endpoint": self.endpoint}))
        self._make_token()
        for name in ("head", *WORKERS):
            self.start_node(name)
        self.wait_for_nodes()

    @property
    def folder(self) -> Path:
        """Return the folder of this machine with the hosts' disks."""
        return STATE / str(self.network.number)

    def host(self, name: str) -> Host:
        """Return the host head, worker1 or worker2."""
        return Host(name, _NUMBERS[name], self.network, self.folder / name, clone=name == "head")

    @property
    def environment(self) -> dict[str, str]:
        """Return what is set on a node before Ray starts: token authentication, and the way to the store."""
        return {"RAY_AUTH_MODE": "token", **HEALTH, **self.store.environment, "AWS_ENDPOINT_URL": self.endpoint}

    def start_node(self, name: str) -> None:
        """Switch a host on and start its Ray under a supervisor, without waiting."""
        host = self.host(name)
        host.switch_on({other: self.network.address(number) for other, number in _NUMBERS.items()})
        words = [*_HEAD] if name == "head" else ["ray", "start", f"--address={self.network.address(10)}:6379"]
        words += [*_NODE, f"--num-cpus={WORKER_CPUS}"] if name != "head" else []
        again = f"while true; do {' '.join(words)} --node-ip-address={host.address}; sleep 1; done"
        with (host.folder / "ray.log").open("ab") as log:
            host.start("bash", "-c", again, environment=self.environment, log=log)

    def nodes(self) -> dict[str, bool]:
        """Return the hosts that Ray knows, and whether each is alive.

        Raises:
            OSError: the head does not answer.
        """
        listed = self.ray("list", "nodes", "--format=json", "--limit=100")
        if listed.returncode or not listed.stdout.startswith("["):
            raise OSError(f"the head does not answer: {listed.stdout[-300:]}{listed.stderr[-300:]}")
        names = {self.network.address(number): name for name, number in _NUMBERS.items()}
        found: dict[str, bool] = {}
        for node in json.loads(listed.stdout):
            name = names[node["node_ip"]]
            found[name] = found.get(name, False) or node["state"] == "ALIVE"
        return found

    def wait_for_nodes(self, seconds: float = _START_SECONDS) -> None:
        """Wait until every host is alive.

        Raises:
            OSError: one is not in time.
        """
        until = time.monotonic() + seconds
        seen: object = "nothing"
        while time.monotonic() < until:
            try:
                seen = self.nodes()
                if all(seen.get(name) for name in ("head", *WORKERS)):
                    return
            except OSError as err:
                seen = err
            time.sleep(1)
        logs = "".join((self.folder / name / "ray.log").read_text()[-1500:] for name in ("head", *WORKERS))
        raise OSError(f"the nodes did not join within {seconds:.0f} s: {seen}\n{logs}")

    def processes(self, name: str) -> list[str]:
        """List the command lines of a host's processes."""
        found = []
        for pid in self.network.pids(name):
            with suppress(OSError):  # it ended meanwhile
                found.append(
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
        return found

    def ray(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a `ray` command on the head."""
        return self.host("head").run("ray", *words, environment=self.user, folder=str(CLONE), seconds=seconds)

    @property
    def user(self) -> dict[str, str]:
        """Return the environment of a user who submits on the head."""
        return {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": _DASHBOARD, "PYTHONUNBUFFERED": "1"}

    def remove(self) -> None:
        """Kill and delete all of it."""
        self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_token(self) -> None:
        """Have Ray make a token on the head, and copy it to every node."""
        head = self.host("head")
        head.switch_on({})
        made = head.run("ray", "get-auth-token", "--generate", environment={"RAY_AUTH_MODE": "token"})
        head.kill()
        if made.returncode:
            raise OSError(f"Ray made no token: {made.stderr[-500:]}")
        token = (head.home / ".ray" / "auth_token").read_bytes()
        for name in ("head", *WORKERS):
            file = self.host(name).home / ".ray" / "auth_token"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.chmod(0o600)
            file.write_bytes(token)

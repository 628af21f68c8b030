"""Is a Ray cluster of a head and two workers, each on a host of its own, and an object store on a fourth.

From: nothing but this machine. To: a cluster as cluster/README.md tells a user to make it: token authentication, a
dashboard on the head's loopback only, and on every node no more of the environment than the way to the store.
Invariants: the head runs no work, only drivers; a worker that loses its Ray is started again by its supervisor, which
is what Kubernetes or systemd do; all of it is found again by its number, and `remove` takes all of it away.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from object_store import S3Server, prepare_store

from hosts.machine import CLONE, Host
from hosts.network import Network, numbers_in_use

__all__ = ["STATE", "WORKERS", "WORKER_CPUS", "Cluster"]

STATE = Path("/var/tmp/carray-hosts")
"""Where the hosts' disks lie, by the clusters' numbers."""
WORKERS = ("worker1", "worker2")
WORKER_CPUS = 3
"""Of each worker, as Ray counts; the machine has what it has."""
_PLACES = {"store": 5, "head": 10, "worker1": 11, "worker2": 12}
_NODE = ("--disable-usage-stats", "--block", f"--object-store-memory={100_000_000}")
_HEAD = ("ray", "start", "--head", "--port=6379", "--dashboard-host=127.0.0.1", "--num-cpus=0", *_NODE)
_DASHBOARD = "http://127.0.0.1:8265"
_START_SECONDS = 120
HEALTH = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
"""Ray's own settings of how soon a silent node counts as lost: 16 s, instead of 65 s as Ray comes."""


@dataclass
class Cluster:
    """Is one cluster."""

    network: Network
    store: S3Server
    endpoint: str = ""
    """Where the nodes find the store, if something stands before it."""

    @classmethod
    def build(cls) -> Cluster:
        """Make the hosts under a number of their own, and start the store; Ray comes with `start`.

        Raises:
            OSError: this machine allows no namespaces.
        """
        network = Network.claim()
        folder = STATE / str(network.number)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            for name, place in _PLACES.items():
                network.join(name, place)
            inside = ("ip", "netns", "exec", network.namespace("store"))
            store = prepare_store(folder / "store", address=network.address(_PLACES["store"]), inside=inside)
            store.start()
        except BaseException:
            network.remove()
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return cls(network, store)

    @classmethod
    def find(cls, number: int) -> Cluster:
        """Find a cluster that was built before.

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
        """Start Ray with a token of its own, and wait until every node has joined.

        Args:
            endpoint: Where the nodes find the store, if something stands before it.

        Raises:
            OSError: they do not in time.
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
        """Give the folder of this machine with the hosts' disks."""
        return STATE / str(self.network.number)

    def host(self, name: str) -> Host:
        """Give a host by its name: head, worker1 or worker2."""
        return Host(name, _PLACES[name], self.network, self.folder / name, clone=name == "head")

    @property
    def environment(self) -> dict[str, str]:
        """Give what a user sets on a node before Ray starts: the token's use, and the way to the store."""
        return {"RAY_AUTH_MODE": "token", **HEALTH, **self.store.environment, "AWS_ENDPOINT_URL": self.endpoint}

    def start_node(self, name: str) -> None:
        """Switch a host on, and start its Ray under a supervisor; does not wait."""
        host = self.host(name)
        host.switch_on({other: self.network.address(place) for other, place in _PLACES.items()})
        words = [*_HEAD] if name == "head" else ["ray", "start", f"--address={self.network.address(10)}:6379"]
        words += [*_NODE, f"--num-cpus={WORKER_CPUS}"] if name != "head" else []
        again = f"while true; do {' '.join(words)} --node-ip-address={host.address}; sleep 1; done"
        with (host.folder / "ray.log").open("ab") as log:
            host.start("bash", "-c", again, environment=self.environment, log=log)

    def nodes(self) -> dict[str, bool]:
        """Give which hosts Ray knows, by name, and whether it counts on them.

        Raises:
            OSError: the head does not answer.
        """
        listed = self.ray("list", "nodes", "--format=json", "--limit=100")
        if listed.returncode or not listed.stdout.startswith("["):
            raise OSError(f"the head does not answer: {listed.stdout[-300:]}{listed.stderr[-300:]}")
        names = {self.network.address(place): name for name, place in _PLACES.items()}
        found: dict[str, bool] = {}
        for node in json.loads(listed.stdout):
            name = names[node["node_ip"]]
            found[name] = found.get(name, False) or node["state"] == "ALIVE"
        return found

    def wait_for_nodes(self, seconds: float = _START_SECONDS) -> None:
        """Wait until Ray counts on every host.

        Raises:
            OSError: it does not in time.
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
        """Give the command lines of a host's processes."""
        found = []
        for pid in self.network.pids(name):
            with suppress(OSError):  # it ended meanwhile
                found.append(
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                )
        return found

    def ray(self, *words: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command of Ray's on the head."""
        return self.host("head").run("ray", *words, environment=self.user, folder=str(CLONE), seconds=seconds)

    @property
    def user(self) -> dict[str, str]:
        """Give what whoever submits has set, on the head."""
        return {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": _DASHBOARD, "PYTHONUNBUFFERED": "1"}

    def remove(self) -> None:
        """Kill all of it, and leave nothing."""
        self.network.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_token(self) -> None:
        """Let Ray make a token on the head, and copy it to every node."""
        head = self.host("head")
        head.switch_on({})
        made = head.run("ray", "get-auth-token", "--generate", environment={"RAY_AUTH_MODE": "token"})
        head.kill()
        if made.returncode:
            raise OSError(f"Ray made no token: {made.stderr[-500:]}")
        token = (head.home / ".ray" / "auth_token").read_bytes()
        for name in ("head", *WORKERS):
            place = self.host(name).home / ".ray" / "auth_token"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch(mode=0o600)
            place.chmod(0o600)
            place.write_bytes(token)

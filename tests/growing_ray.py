"""Starts a Ray whose head has no CPUs and whose own autoscaler adds machines: Ray's fake ones, processes on this host.

The scaling is Ray's real one (its second autoscaler, as `ray up` and KubeRay use it); only the cloud is not there.
Cost: ready in about 6 s, a machine 4 s after it is asked for.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from carray.testing.object_store import free_ports

_HEAD_ID = 51 * "f" + "00000"
_READY_SECONDS = 60
_COMMANDS = ("head_setup", "worker_setup", "setup", "initialization", "head_start_ray", "worker_start_ray")


@contextmanager
def start_growing_ray(folder: Path, *, machine: dict[str, int], most: int) -> Iterator[dict[str, str]]:
    """Start it, with at most `most` machines of the resources `machine`; gives the variables a driver needs."""
    import ray

    address = f"{ray.util.get_node_ip_address()}:{free_ports(1)[0]}"
    (folder / "cluster.yaml").write_text(json.dumps(_cluster(address, machine, most)))
    named = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    own = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_TMPDIR": str(folder),
    }
    options = f"--head --block --num-cpus=0 --port={address.rpartition(':')[2]} --include-dashboard=false"
    command = [str(Path(sys.executable).with_name("ray")), "start", *options.split(), "--disable-usage-stats"]
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [*command, f"--autoscaling-config={folder}/cluster.yaml"],
            env={**os.environ, **named, **own},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait_ready(head, folder / "head.log")
        yield {**named, "RAY_ADDRESS": address}
    finally:
        # Machines are the autoscaler's children, and it the head's: one group. Politely it would take half a minute.
        with suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()


def _wait_ready(head: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + _READY_SECONDS
    while "will now block forever" not in log.read_text():
        if head.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"Ray did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def _cluster(address: str, machine: dict[str, int], most: int) -> dict[str, object]:
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    return {
        "cluster_name": "growing",
        "max_workers": most,
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": provider,
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "gcs_address": address,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "machine": {"resources": machine, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        **{f"{name}_commands": [] for name in _COMMANDS},
    }

"""Waits for machines that a cluster may still add: by its autoscaler, or because they are joining.

From: what one worker needs, and the Ray that this process is connected to. To: a machine that has it, or a sentence.
Invariants: what is wanted is asked for as a placement group, which ends with this process, so that nobody who is killed
leaves a machine running; a machine that can never come is refused at once where the autoscaler says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray

from carray.core.errors import SettingsError
from carray.core.progress import say

__all__ = ["can_grow", "wait_for_machine"]

WAIT_SECONDS = 15 * 60.0
"""Longer than a cloud takes to start a machine and pull an image of several GB, if it has one to give."""
_LINE_SECONDS = 60.0
_LOOK_SECONDS = 1.0


def can_grow() -> bool:
    """Say whether an autoscaler looks after this Ray: that of `ray up` or of KubeRay, both in its second version."""
    return bool(_autoscaling_state().autoscaler_state_version)


def wait_for_machine(worker: Mapping[str, float]) -> None:
    """Wait until some machine has what one worker needs, such as {"CPU": 4, "GPU": 1}, if one may come.

    Where none may come, it returns at once: what is missing then is for the caller to say. A cluster without any CPU is
    one whose machines are joining.

    Raises:
        SettingsError: the autoscaler has no such machine, or none came in a quarter of an hour.
    """
    wanted = {name: float(amount) for name, amount in worker.items() if amount}
    machines = _machines()
    if _any_has(machines, wanted) or (any(one.get("CPU") for one in machines) and not can_grow()):
        return
    group = ray.util.placement_group([wanted], strategy="STRICT_PACK")
    try:
        _wait(wanted, group.id.hex())
    finally:
        ray.util.remove_placement_group(group)


def _wait(wanted: Mapping[str, float], group: str) -> None:
    text = " and ".join(f"{amount:g} {name}{'' if amount == 1 else 's'}" for name, amount in wanted.items())
    started, said = time.monotonic(), -_LINE_SECONDS
    while not _any_has(_machines(), wanted):
        waited = time.monotonic() - started
        if _is_refused(group):
            raise SettingsError(
                f"one worker needs a machine with {text}, but no machine that this cluster may add has so much; "
                "ask for less, or add such a machine type to the cluster's file."
            )
        if waited > WAIT_SECONDS:
            raise SettingsError(
                f"no machine with {text} came in {WAIT_SECONDS / 60:g} minutes; look at `ray status` on the head for "
                "what holds it up (a quota, no spot capacity, an image that cannot be pulled), and repeat the command."
            )
        if waited - said >= _LINE_SECONDS:
            say(f"Ray: waiting for a machine with {text}; {len(_machines())} are up, {waited / 60:.0f} minutes so far")
            said = waited
        time.sleep(_LOOK_SECONDS)


def _machines() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _any_has(machines: Iterable[Mapping[str, float]], wanted: Mapping[str, float]) -> bool:
    return any(all(one.get(name, 0.0) >= amount for name, amount in wanted.items()) for one in machines)


def _is_refused(group: str) -> bool:
    """Say whether the autoscaler has no machine for this placement group."""
    refused = _autoscaling_state().infeasible_gang_resource_requests
    return any(group in request.details for request in refused)


def _autoscaling_state() -> Any:
    """Read what the autoscaler last told Ray's control store; all zeros where there is none, or no way to ask."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]

    if ray.util.client.ray.is_connected():  # a ray:// address: the store is inside the cluster
        return GetClusterStatusReply().autoscaling_state
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10)).autoscaling_state

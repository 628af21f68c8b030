"""Connects to the Ray that a command runs on, the job's or `RAY_ADDRESS`'s, or starts a private local one.

A Ray that merely runs on this machine is not used; one that was started here is shut down here. A private Ray requires
a token, since Ray binds some ports to every address. Machines that a cluster may still add are requested as a placement
group, which ends with this process, so that a killed command leaves no machine running.
Cost: a private Ray starts in about 5 s and stops in 2 s.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType

import ray
from ray import exceptions
from ray.exceptions import AuthenticationError

from carray.core.environment import check_variables
from carray.core.errors import CarrayError, ClusterError, SettingsError
from carray.core.exit_lines import deferring_stops, record_error, restore_handlers
from carray.core.progress import say
from carray.core.ray.internals import autoscaling_state, silence_token_warning
from carray.core.ray.resources import Resources, ray_address
from carray.core.text import one_line

__all__ = ["start_ray", "used_text"]

WAIT_SECONDS = 15 * 60.0
"""Longer than a cloud takes to start a machine and pull an image of several GB."""
_LINE_SECONDS = 60.0
_POLL_SECONDS = 1.0


def _can_grow() -> bool:
    """Check whether an autoscaler manages this Ray: that of `ray up` or of KubeRay, both in version 2."""
    return bool(autoscaling_state().autoscaler_state_version)


def _wait_for_machine(worker: Mapping[str, float]) -> None:
    """Wait until a machine has what one worker needs, such as {"CPU": 4, "GPU": 1}, if the cluster may add one.

    Otherwise it returns at once, and the caller reports what is missing. In a cluster without any CPU, machines are
    still joining.

    Raises:
        SettingsError: the autoscaler has no such machine, or none came in a quarter of an hour.
    """
    wanted = {name: float(amount) for name, amount in worker.items() if amount}
    machines = _machines()
    if _any_has(machines, wanted) or (any(one.get("CPU") for one in machines) and not _can_grow()):
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
        time.sleep(_POLL_SECONDS)


def _machines() -> list[Mapping[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _any_has(machines: Iterable[Mapping[str, float]], wanted: Mapping[str, float]) -> bool:
    return any(all(one.get(name, 0.0) >= amount for name, amount in wanted.items()) for one in machines)


def _is_refused(group: str) -> bool:
    """Check whether the autoscaler has no machine type for this placement group."""
    refused = autoscaling_state().infeasible_gang_resource_requests
    return any(group in request.details for request in refused)


_KNOCK_SECONDS = 10
_LOSSES = (
    *(exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError),
    *(exceptions.ObjectLostError, exceptions.LocalRayletDiedError, exceptions.RpcError, exceptions.OutOfDiskError),
)

_started_here = False
"""Whether the Ray of this process is a private one that `start_ray` started."""


@contextmanager
def start_ray(
    *, num_cpus: int | None = None, worker: Mapping[str, float] = MappingProxyType({"CPU": 1.0})
) -> Iterator[Resources]:
    """Connect to the Ray of this process, else of `RAY_ADDRESS` (set in a job), else start a private local one.

    Args:
        num_cpus: CPUs of a private Ray, as many as the machine has when None; another Ray keeps its own.
        worker: What one worker needs at least; waits for such a machine where the cluster may add one.

    Raises:
        SettingsError: `RAY_ADDRESS` names no Ray that answers, or is the address of its dashboard; the cluster has no
            machine for a worker, and none came; or a variable of carray's own cannot be used.
        ClusterError: in the `with` block, Ray lost processes or machines for good.
    """
    if ray.is_initialized():
        with _naming_losses():
            yield _describe()
        return
    check_variables()  # before Ray's processes inherit them
    address = ray_address()
    try:
        if address:
            _connect(address)
        else:
            _start_private(num_cpus)
        with _naming_losses():
            if not _started_here:
                _wait_for_machine(worker)
            yield _describe()
    finally:
        if ray.is_initialized():  # not where it never began
            _stop()


@contextmanager
def _naming_losses() -> Iterator[None]:
    """Turn Ray's losses into a sentence; errors in the code that it ran pass unchanged."""
    try:
        yield
    except CarrayError as err:
        record_error(err)
        raise
    except _LOSSES as err:
        if "creation task" in str(err):  # an error in a worker's constructor, not of the machine
            raise
        said = shorten(one_line(err), 300, placeholder=" ...")
        lost = ClusterError(
            f"Ray lost what the job ran on ({type(err).__name__}: {said}); look at `ray status`, at the machines' "
            "memory and at the head node's log."
        )
        record_error(lost)
        raise lost from err


def _connect(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise SettingsError(
            f"RAY_ADDRESS is {address!r}, a dashboard, to which `ray job submit` belongs; "
            "set it to HOST:6379 of the head node, or submit the command as a job."
        )
    try:
        _knock(address)
        with deferring_stops():
            ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as err:
        raise SettingsError(
            f"RAY_ADDRESS is {address!r}, but no Ray answers there ({one_line(err, 200)}); "
            "start it, give its token (RAY_AUTH_TOKEN), or unset RAY_ADDRESS for a private local Ray."
        ) from err
    say(f"Ray: connected to {address} (RAY_ADDRESS)")


def _knock(address: str) -> None:
    """Open and close a connection, since Ray itself waits for minutes on a closed port."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _start_private(num_cpus: int | None) -> None:
    global _started_here
    _choose_token()
    silence_token_warning()  # the line below says so once
    with deferring_stops():
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            logging_level=logging.WARNING,
        )
    _started_here = True
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    say(f"Ray: started a private one on this machine, {_describe().cpus} CPUs, authentication by {mode}")


def _choose_token() -> None:
    """Make a token for a private Ray; Ray itself would leave one in the user's home."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or (Path.home() / ".ray" / "auth_token").exists() or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    # For the life of this process: Ray reads it once.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _stop() -> None:
    global _started_here
    ray.shutdown()
    restore_handlers()  # Ray's RayLog::UninstallSignalAction (2.60) leaves SIGTERM to the system
    _started_here = False


def used_text() -> str:
    """Report how many of the cluster's CPUs are in use."""
    try:
        there, free = ray.cluster_resources().get("CPU", 0.0), ray.available_resources().get("CPU", 0.0)
    except Exception as err:  # the cluster may be failing already
        return f"Ray does not say what it does ({type(err).__name__})"
    return f"{there - free:.0f} of {there:.0f} CPUs are in use"


def _describe() -> Resources:
    machines = _machines()
    node_cpus = [int(one.get("CPU", 0)) for one in machines]
    return Resources(
        private=_started_here,
        cpus=sum(node_cpus),
        node_cpus=max(node_cpus, default=0),
        gpus=sum(int(one.get("GPU", 0)) for one in machines),
        cpus_per_gpu=min(
            (int(one.get("CPU", 0) // one["GPU"]) for one in machines if one.get("GPU", 0) >= 1), default=0
        ),
        grows=not _started_here and _can_grow(),
    )

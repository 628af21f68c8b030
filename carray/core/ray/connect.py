"""Finds or starts the Ray that a command runs on: the job's or `RAY_ADDRESS`'s, else a private local one.

From: the environment, how many CPUs a private Ray may take, and what one worker needs. To: a `RunningRay`, for the
length of a `with` block, with a machine that has what is needed.
Invariants: a Ray that merely happens to run on this machine is never attached to; what was started here is shut down
here; what was found running stays. A private Ray has no dashboard and asks for a token: its ports may be reachable
from other machines (Ray binds some to every address), so the token, not the address, is what keeps strangers out. It
reports nothing to Ray's makers. Machines that a cluster may still add are waited for: what is wanted is asked for as a
placement group, which ends with this process, so that a killed command leaves no machine running.
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
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType

import ray
from ray import exceptions
from ray.exceptions import AuthenticationError

from carray.core.environment import check_variables
from carray.core.errors import CarrayError, ClusterError, SettingsError
from carray.core.exit_lines import foresee, restore_handlers, stopping_afterwards
from carray.core.progress import say
from carray.core.ray.internals import autoscaling_state, silence_token_warning

__all__ = ["RunningRay", "is_cluster", "start_ray", "used_text"]

WAIT_SECONDS = 15 * 60.0
"""Longer than a cloud takes to start a machine and pull an image of several GB, if it has one to give."""
_LINE_SECONDS = 60.0
_LOOK_SECONDS = 1.0


def can_grow() -> bool:
    """Say whether an autoscaler looks after this Ray: that of `ray up` or of KubeRay, both in its second version."""
    return bool(autoscaling_state().autoscaler_state_version)


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
    refused = autoscaling_state().infeasible_gang_resource_requests
    return any(group in request.details for request in refused)


_KNOCK_SECONDS = 10
_LOSSES = (
    *(exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError),
    *(exceptions.ObjectLostError, exceptions.LocalRayletDiedError, exceptions.RpcError, exceptions.OutOfDiskError),
)

_started_here = False
"""Whether the Ray of this process is a private one that `start_ray` started."""


@dataclass(frozen=True, slots=True)
class RunningRay:
    """Says what there is to run on."""

    private: bool
    """Whether it is a local Ray started by this process, whose workers are this user's own children."""
    cpus: int
    """CPUs of all nodes together."""
    node_cpus: int
    """CPUs of the largest node: what one worker can ask for at most."""
    gpus: int = 0
    """GPUs of all nodes together."""
    cpus_per_gpu: int = 0
    """A GPU's share of its node's CPUs, where that is smallest: what there is to feed it with."""
    grows: bool = False
    """Whether an autoscaler adds nodes when there is more to do than these can."""


@contextmanager
def start_ray(
    *, num_cpus: int | None = None, worker: Mapping[str, float] = MappingProxyType({"CPU": 1.0})
) -> Iterator[RunningRay]:
    """Give the Ray to run on: the one this process has, else `RAY_ADDRESS` (which a job has), else a private local one.

    Args:
        num_cpus: CPUs of a private Ray, as many as the machine has when None; another Ray keeps its own.
        worker: What one worker needs at least; a cluster that has no such machine yet, but may add one, is waited for.

    Raises:
        SettingsError: `RAY_ADDRESS` names no Ray that answers, or is the address of its dashboard; the cluster has no
            machine for a worker, and none came; or a variable of carray's own cannot be used.
        ClusterError: in the `with` block, Ray lost processes or machines in a way that it does not mend.
    """
    if ray.is_initialized():
        with _naming_losses():
            yield _describe()
        return
    check_variables()  # before Ray's processes inherit them
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        if address and address != "local":
            _connect(address)
        else:
            _start_private(num_cpus)
        with _naming_losses():
            if not _started_here:
                wait_for_machine(worker)
            yield _describe()
    finally:
        if ray.is_initialized():  # not where it never began
            _stop()


@contextmanager
def _naming_losses() -> Iterator[None]:
    """Say in a sentence what Ray lost; an error in what it ran, a worker's or ours, passes as it is."""
    try:
        yield
    except CarrayError as err:
        foresee(err)
        raise
    except _LOSSES as err:
        if "creation task" in str(err):  # what a worker is made of is wrong, not the machine
            raise
        said = shorten(" ".join(str(err).split()), 300, placeholder=" ...")
        lost = ClusterError(
            f"Ray lost what the job ran on ({type(err).__name__}: {said}); look at `ray status`, at the machines' "
            "memory and at the head node's log."
        )
        foresee(lost)
        raise lost from err


def _connect(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise SettingsError(
            f"RAY_ADDRESS is {address!r}, a dashboard, to which `ray job submit` belongs; "
            "set it to HOST:6379 of the head node, or submit the command as a job."
        )
    try:
        _knock(address)
        with stopping_afterwards():
            ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, ValueError, RuntimeError, AuthenticationError) as err:
        raise SettingsError(
            f"RAY_ADDRESS is {address!r}, but no Ray answers there ({' '.join(str(err).split())[:200]}); "
            "start it, give its token (RAY_AUTH_TOKEN), or unset RAY_ADDRESS for a private local Ray."
        ) from err
    say(f"Ray: connected to {address} (RAY_ADDRESS)")


def _knock(address: str) -> None:
    """Open and close a connection, since Ray itself waits for minutes where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS).close()


def _start_private(num_cpus: int | None) -> None:
    global _started_here
    _choose_token()
    silence_token_warning()  # the line below says so once
    with stopping_afterwards():
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
    """Give a private Ray a token of its own, where Ray itself would leave one in the user's home for good."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or (Path.home() / ".ray" / "auth_token").exists() or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return
    # Kept for the life of this process: Ray reads it once.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _stop() -> None:
    global _started_here
    ray.shutdown()
    restore_handlers()  # Ray's RayLog::UninstallSignalAction (2.60) leaves SIGTERM to the system
    _started_here = False


def is_cluster() -> bool:
    """Say whether `start_ray` will find a Ray rather than start one, or one runs in this process already."""
    return ray.is_initialized() or os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def used_text() -> str:
    """Say how many of the CPUs of the cluster are in use, for one who wonders why nothing happens."""
    try:
        there, free = ray.cluster_resources().get("CPU", 0.0), ray.available_resources().get("CPU", 0.0)
    except Exception as err:  # asked when something is wrong already
        return f"Ray does not say what it does ({type(err).__name__})"
    return f"{there - free:.0f} of {there:.0f} CPUs are in use"


def _describe() -> RunningRay:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    node_cpus = [int(node.get("CPU", 0)) for node in nodes]
    return RunningRay(
        private=_started_here,
        cpus=sum(node_cpus),
        node_cpus=max(node_cpus, default=0),
        gpus=sum(int(node.get("GPU", 0)) for node in nodes),
        cpus_per_gpu=min(
            (int(node.get("CPU", 0) // node["GPU"]) for node in nodes if node.get("GPU", 0) >= 1), default=0
        ),
        grows=not _started_here and can_grow(),
    )

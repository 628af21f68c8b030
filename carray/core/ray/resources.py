"""The Ray that the environment names, and what a Ray or a machine has. Imports no Ray, which takes a second."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

__all__ = ["Resources", "is_cluster", "ray_address"]


@dataclass(frozen=True, slots=True)
class Resources:
    """The resources of a Ray, or of this machine."""

    private: bool
    """Whether its processes are of this machine and started by this process."""
    cpus: int
    """CPUs of all nodes together."""
    node_cpus: int
    """CPUs of the largest node: the most that one worker can request."""
    gpus: int = 0
    """GPUs of all nodes together."""
    cpus_per_gpu: int = 0
    """The smallest number of CPUs per GPU of any node."""
    grows: bool = False
    """Whether an autoscaler may add nodes."""


def ray_address() -> str:
    """Return `RAY_ADDRESS`, which a Ray job has, too; empty where it names no Ray."""
    address = os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


def is_cluster() -> bool:
    """Check whether this process has a Ray, or `start_ray` will connect to one instead of starting it."""
    ray = sys.modules.get("ray")
    return bool(ray_address()) or (ray is not None and ray.is_initialized())

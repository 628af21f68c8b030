"""Strikes several hosts while both jobs run on them: hosts lost, cut off or slow, the head lost, the jobs stopped.

From: a `Scene` and its two running jobs. To: what was done, in words; when it returns, every host is back.
Invariants: a host that is lost goes without a word, with everything on it; what comes back is the host's disk, not its
processes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from carray.testing.hosts.cluster import Cluster, Submission

__all__ = ["KINDS", "SURVIVED", "strike"]

KINDS = ("worker", "cut", "blink", "slow", "head", "stop")
"""A worker's host is lost and comes back; its cable is out for a minute; for a few seconds; it is slow for a while; the
head's host is lost and comes back; both jobs are stopped."""
SURVIVED = ("worker", "cut", "blink", "slow")
"""Losses that must not end a job."""
CUT_SECONDS = 60
BLINK_SECONDS = 8
"""Shorter than the 16 s after which Ray counts a silent node as lost (hosts.cluster)."""
_SLOW_SECONDS, _SLOW_KILOBITS = 30, 400


def strike(kind: str, cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    """Do to a cluster, or to the jobs on it, what `kind` says; gives it in words."""
    return _STRIKES[kind](cluster, jobs, dice)


def _lose_worker(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    name, seconds = _worker(dice), dice.uniform(0, 30)
    cluster.host(name).kill()
    time.sleep(seconds)
    cluster.start_node(name)
    return f"{name} lost, and back after {seconds:.0f} s"


def _cut_worker(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    return _cut(cluster, _worker(dice), CUT_SECONDS)


def _cut_shortly(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    return _cut(cluster, _worker(dice), BLINK_SECONDS)


def _cut(cluster: Cluster, name: str, seconds: float) -> str:
    cluster.network.cut(name)
    time.sleep(seconds)
    cluster.network.mend(name)
    return f"{name} cut off for {seconds:.0f} s"


def _slow_worker(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    name = _worker(dice)
    cluster.network.slow(name, kilobits=_SLOW_KILOBITS)
    time.sleep(_SLOW_SECONDS)
    cluster.network.unlimit(name)
    return f"{name} at {_SLOW_KILOBITS} kilobits a second for {_SLOW_SECONDS} s"


def _lose_head(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    cluster.host("head").kill()
    seconds = dice.uniform(0, 10)
    time.sleep(seconds)
    cluster.start_node("head")
    cluster.wait_for_nodes()
    return f"the head lost, and back after {seconds:.0f} s"


def _stop_jobs(cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    for job in jobs:
        job.stop()
    return "both jobs stopped"


def _worker(dice: random.Random) -> str:
    from carray.testing.hosts.cluster import WORKERS

    return dice.choice(WORKERS)


_STRIKES: dict[str, Callable[[Cluster, Sequence[Submission], random.Random], str]] = {
    "worker": _lose_worker,
    "cut": _cut_worker,
    "blink": _cut_shortly,
    "slow": _slow_worker,
    "head": _lose_head,
    "stop": _stop_jobs,
}

"""Divides a cluster's CPUs and GPUs among trials.

Defaults depend on the cluster and the search's number of trials alone, never on how many are left, so that a resumed
search computes with as many threads as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carray.core.errors import SettingsError
from carray.search.space import SearchSettings

__all__ = ["Share", "share_out"]

_SLACK = 1e-6
"""Tolerance, so that 1 / (1/3) is 3."""


@dataclass(frozen=True)
class Share:
    """The resources of one trial, and how many trials run at once."""

    cpus: float
    gpus: float
    at_once: int

    @property
    def devices(self) -> float:
        """Return the devices that device-hours count: GPUs, or CPUs where there is none."""
        return self.gpus or self.cpus

    def text(self) -> str:
        """Describe it: '1 GPU and 8 CPUs'."""
        named = [f"{n:g} {unit}{'' if n <= 1 else 's'}" for n, unit in ((self.gpus, "GPU"), (self.cpus, "CPU")) if n]
        return " and ".join(named)


def share_out(nodes: Sequence[Mapping[str, float]], search: SearchSettings, trials: int) -> Share:
    """Choose the CPUs and GPUs of a trial; `nodes` gives each machine's CPU and GPU.

    Raises:
        SettingsError: no machine has what the settings ask for.
    """
    largest = {kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")}
    gpus = search.gpus_per_trial
    gpus = (1.0 if largest["GPU"] else 0.0) if gpus is None else gpus
    _check(search, gpus, largest)
    cpus = search.cpus_per_trial
    if cpus is None:
        cpus = _beside_gpus(nodes, gpus) if gpus else _of_cpus(nodes, trials)
    at_once = sum(_fitting(node, cpus, gpus) for node in nodes)
    if not at_once:
        raise SettingsError(
            f"search.cpus_per_trial is {cpus:g} and search.gpus_per_trial {gpus:g}, but no machine has both; "
            "lower one of them."
        )
    return Share(cpus, gpus, at_once)


def _check(search: SearchSettings, gpus: float, largest: Mapping[str, float]) -> None:
    if (search.cpus_per_trial or 0) > largest["CPU"]:
        raise SettingsError(
            f"search.cpus_per_trial is {search.cpus_per_trial:g}, but the largest machine has {largest['CPU']:g}; "
            "lower it."
        )
    if gpus > largest["GPU"]:
        limit = f"the largest machine has {largest['GPU']:g} GPUs" if largest["GPU"] else "the cluster has no GPU"
        raise SettingsError(f"search.gpus_per_trial is {gpus:g}, but {limit}; lower it or leave it out.")
    if gpus > 1 and gpus != int(gpus):
        raise SettingsError(f"search.gpus_per_trial is {gpus:g}; above 1 only whole GPUs can be given.")


def _beside_gpus(nodes: Sequence[Mapping[str, float]], gpus: float) -> float:
    """Divide each machine's CPUs by its trials; the smallest share decides, so that every GPU is used."""
    shares = [node.get("CPU", 0.0) / int(node["GPU"] / gpus + _SLACK) for node in nodes if node.get("GPU", 0.0) >= gpus]
    share = min(shares)
    return float(int(share)) if share >= 1 else int(share * 100) / 100


def _of_cpus(nodes: Sequence[Mapping[str, float]], trials: int) -> float:
    """Give the most CPUs with which all trials still run at once, at least one."""
    most = max((int(node.get("CPU", 0.0)) for node in nodes), default=1)
    for cpus in range(most, 1, -1):
        if sum(_fitting(node, cpus, 0.0) for node in nodes) >= trials:
            return float(cpus)
    return 1.0


def _fitting(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_kind = [int(node.get(kind, 0.0) / share + _SLACK) for kind, share in (("CPU", cpus), ("GPU", gpus)) if share]
    return min(by_kind, default=0)

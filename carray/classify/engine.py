"""What both engines share: how shards reach a scoring process, and what comes back.

    local    processes of this machine (local), which import neither Ray nor torch
    ray      Ray Data's actors on a cluster or a private Ray (worker_on_ray)

An engine carries plain values only: shards' numbers to a process, ledger entries or refusals back. A process has
SHARDS_IN_HAND shards at once; those of one that dies are given to another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from carray.classify.ledger import LedgerEntry, RunRecord
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.score_shard import ShardScorer
from carray.core import errors
from carray.core.errors import CarrayError
from carray.core.ray.resources import Resources

__all__ = ["SHARDS_IN_HAND", "Engine", "Pool", "Shards", "Worker", "read_answer", "size_pool"]

SHARDS_IN_HAND = 2
"""A worker reads the next shard while it scores the last images of this one."""

Shards = list[dict[str, Any]]
"""Shards to score, each {"shard": number, "retry": bool}."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Says how many scoring processes there may be, and what each takes of the machines."""

    workers: int
    min_workers: int
    cpus: int
    gpus: int = 0
    most_workers: int = 0
    """How many there may be once the cluster has grown; `workers` when 0."""

    def __str__(self) -> str:
        each = f"{self.cpus} CPU" + (f" and {self.gpus} GPU" if self.gpus else "")
        fewest = f"{self.min_workers} to " if self.min_workers < self.workers else ""
        more = ", more as machines are added" if self.most_workers > self.workers else ""
        return f"{fewest}{self.workers} workers of {each}{more}"


def size_pool(resources: Resources, settings: ClassifySettings, *, shards: int, device: str) -> Pool:
    """Size the pool by the machines: never more a worker than a node has, or Ray would wait for ever."""
    gpus = int(device == "cuda")
    most_cpus = max(resources.cpus_per_gpu if gpus else resources.node_cpus, 1)
    cpus = min(settings.threads or (most_cpus if gpus else 1), most_cpus)
    most = resources.gpus if gpus else resources.cpus // cpus
    workers = min(settings.workers or max(1, most), shards)
    grown = shards if resources.grows and not settings.workers else 0
    return Pool(workers, min(settings.min_workers, workers), cpus, gpus, most_workers=grown)


class Engine(Protocol):
    """Runs a job's scoring processes."""

    name: str
    """local or ray."""

    @property
    def resources(self) -> Resources:
        """What the processes may use."""

    def prepare(self, job: dict[str, Any], pool: Pool) -> None:
        """Start workers before there are shards, where that saves time."""

    def measure(self, bundle: str, runtimes: list[str]) -> dict[str, float]:
        """Measure a bundle's runtimes in a process on a machine that scores; see `scorer.measure_runtimes`.

        Gives nothing where that process is lost.
        """

    def run_shards(self, job: dict[str, Any], todo: Shards, pool: Pool) -> Generator[LedgerEntry]:
        """Score shards, and give their entries as they finish; a caller that stops early ends the processes.

        `job` holds the arguments of a `Worker`, in plain values.

        Raises:
            CarrayError: of the kind that a worker raised, with its sentence.
        """

    def usage(self) -> str:
        """Say what is in use and where to look, for a job that has not come on for a while."""


class Worker:
    """Scores shards in a process of an engine."""

    def __init__(
        self, job: dict[str, Any], *, machine: str = "", is_lost: Callable[[str], bool] = lambda machine: False
    ) -> None:
        """Prepare to score.

        Args:
            job: Plain values: bundle, out, run, settings, driver, and variables of the environment to set.
            machine: The machine of this process, as the engine names it.
            is_lost: Says whether a machine was lost, with every process on it.
        """
        os.environ.update(job["environment"])
        self.scorer = ShardScorer(
            job["bundle"],
            out=job["out"],
            run=RunRecord.model_validate(job["run"]),
            settings=ClassifySettings.model_validate(job["settings"]),
            driver=job["driver"],
            machine=machine,
            is_lost=is_lost,
        )

    def __call__(self, shard: dict[str, Any]) -> dict[str, str]:
        """Score one shard; an error for the user is part of the answer, of which an engine would lose the kind."""
        try:
            entry = self.scorer.score_shard(int(shard["shard"]), retry_failed=bool(shard["retry"]))
        except CarrayError as err:
            return {"entry": "", "refusal": type(err).__name__, "sentence": str(err)}
        return {"entry": entry.model_dump_json(), "refusal": "", "sentence": ""}


def read_answer(answer: dict[str, str]) -> LedgerEntry:
    """Give the entry that a worker answered.

    Raises:
        CarrayError: of the kind that the worker raised.
    """
    if answer["refusal"]:
        raise getattr(errors, answer["refusal"])(answer["sentence"])
    return LedgerEntry.model_validate_json(answer["entry"])

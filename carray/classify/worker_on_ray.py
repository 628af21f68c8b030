"""Carries shards to scoring processes, through Ray Data, and their counts back.

Invariants: only shards' numbers travel out and counts back, so Ray Data needs no CPU for reading or writing, and one
CPU is enough; a worker has two shards in hand, so that it reads the next one while it scores the last images of this
one; a worker that dies is started again and its shards given to it again.
Cost: a worker imports neither torch nor timm; see `cold` in results/classify.csv.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from carray.classify.ledger import LedgerEntry, RunRecord
from carray.classify.predictions_folder import ClassifySettings
from carray.classify.score_shard import ShardScorer
from carray.core import errors
from carray.core.errors import CarrayError, SettingsError
from carray.core.ray.connect import RunningRay

__all__ = ["SHARDS_IN_HAND", "Pool", "run_shards", "size_pool"]

SHARDS_IN_HAND = 2


@dataclass(frozen=True, slots=True)
class Pool:
    """Says how many scoring processes there may be, and what each takes of the cluster."""

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


def size_pool(running: RunningRay, settings: ClassifySettings, *, shards: int, device: str) -> Pool:
    """Size the pool by the cluster: never more a worker than a node has, or Ray would wait for ever."""
    gpus = int(device == "cuda")
    most_cpus = max(running.cpus_per_gpu if gpus else running.node_cpus, 1)
    cpus = min(settings.threads or (most_cpus if gpus else 1), most_cpus)
    most = running.gpus if gpus else running.cpus // cpus
    workers = min(settings.workers or max(1, most), shards)
    grown = shards if running.grows and not settings.workers else 0
    return Pool(workers, min(settings.min_workers, workers), cpus, gpus, most_workers=grown)


def run_shards(
    job: dict[str, Any], todo: list[dict[str, Any]], pool: Pool, *, worker: Any = None
) -> Generator[LedgerEntry]:
    """Score shards, each given as {"shard": number, "retry": bool}; gives their entries as they finish.

    Args:
        job: What `_Worker` takes, in plain values.
        todo: The shards.
        pool: The processes.
        worker: Their class, where it is to be another: for a measurement of all but the scoring.

    Raises:
        CarrayError: of the kind that a worker raised, with its sentence.
        SettingsError: the machines of this Ray have no carray.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A pool that lost workers grows again while all it has are busy, which is all that two shards in hand can show.
    context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    shards = ray.data.from_items(todo, override_num_blocks=len(todo))
    made_of: Any = worker or _Worker  # Ray's annotation knows functions only
    counts = shards.map(
        made_of,
        fn_constructor_kwargs={"job": job},
        # A worker that dies is started again and its shard given to it again, without end: Ray Data's default. The
        # shard's own notes (ledger.Attempt) bound that, and step over what killed it.
        compute=ActorPoolStrategy(
            min_size=pool.min_workers,
            max_size=max(pool.workers, pool.most_workers),
            initial_size=pool.workers,
            max_tasks_in_flight_per_actor=SHARDS_IN_HAND,
            max_concurrent_calls_per_actor=SHARDS_IN_HAND,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
    )
    rows: Any = iter(counts.iter_rows())
    try:
        for row in rows:
            if row["refusal"]:
                raise getattr(errors, row["refusal"])(row["sentence"])
            yield LedgerEntry.model_validate_json(row["entry"])
    except RayError as err:
        if "No module named 'carray" not in str(err):
            raise
        raise SettingsError(
            "the machines of this Ray have no carray ('No module named carray'); install it in their image, or submit "
            "the command as a job with --working-dir."
        ) from err
    finally:
        rows.close()  # a job that stops before the end kills its workers now


def _is_lost(machine: str) -> bool:
    """Say whether Ray has given a node up, with every process on it."""
    return machine not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class _Worker:
    """A Ray actor that scores shards."""

    def __init__(self, job: dict[str, Any]) -> None:
        os.environ.update(job["environment"])
        self._scorer = ShardScorer(
            job["bundle"],
            out=job["out"],
            run=RunRecord.model_validate(job["run"]),
            settings=ClassifySettings.model_validate(job["settings"]),
            driver=job["driver"],
            machine=ray.get_runtime_context().get_node_id(),
            is_lost=_is_lost,
        )

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        try:
            entry = self._scorer.score_shard(int(row["shard"]), retry_failed=bool(row["retry"]))
        except CarrayError as err:
            # Ray would wrap it, drop what it was, and print a stack: a sentence for the user travels as what it is.
            return {"entry": "", "refusal": type(err).__name__, "sentence": str(err)}
        return {"entry": entry.model_dump_json(), "refusal": "", "sentence": ""}

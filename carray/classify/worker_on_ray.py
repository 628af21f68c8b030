"""Carries shards to scoring processes, through Ray Data, and their counts back.

Invariants: only shards' numbers travel out and counts back, so Ray Data needs no CPU for reading or writing, and one
CPU is enough; a worker that dies is started again and its shards given to it again.
Cost: a worker imports neither torch nor timm; see `cold` in results/classify.csv.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from carray.bundle.scorer import measure_runtimes
from carray.classify.engine import SHARDS_IN_HAND, Pool, Shards, Worker, read_answer
from carray.classify.ledger import LedgerEntry
from carray.core.errors import SettingsError
from carray.core.ray.connect import start_ray, used_text
from carray.core.ray.resources import Resources
from carray.core.store.s3 import aws_environment

__all__ = ["RayEngine", "start_on_ray"]


class RayEngine:
    """Scores shards on a Ray; see `start_on_ray`."""

    name = "ray"

    def __init__(self, resources: Resources, *, worker: Any = None) -> None:
        """Use the Ray of this process; `worker` is another class, for a measurement of all but the scoring."""
        self.resources = resources
        self._worker: Any = worker or _RayWorker  # Ray's annotation knows functions only

    def usage(self) -> str:
        """Say what is in use, and where to look."""
        return (
            f"{used_text()}; large shards take minutes, but where that lasts, see `ray status` and the nodes' memory: "
            "workers may be waited for, or be lost as fast as they start"
        )

    def prepare(self, job: dict[str, Any], pool: Pool) -> None:
        """Do nothing: Ray Data starts its actors with the first shards."""

    def measure(self, bundle: str, runtimes: list[str]) -> dict[str, float]:
        """Measure a bundle's runtimes on one of the machines, whichever has a CPU free first."""
        task = ray.remote(num_cpus=1)(_measure)
        with suppress(RayError):
            found: dict[str, float] = ray.get(task.remote(self._environment(), bundle, runtimes))
            return found
        return {}

    def _environment(self) -> dict[str, str]:
        """Give what workers' variables are set to: a private Ray's are this user's, a cluster has its own."""
        return dict(aws_environment()) if self.resources.private else {}

    def run_shards(self, job: dict[str, Any], todo: Shards, pool: Pool) -> Generator[LedgerEntry]:
        """Score shards, and give their entries as they finish.

        Raises:
            CarrayError: of the kind that a worker raised, with its sentence.
            SettingsError: the machines of this Ray have no carray.
        """
        job = {**job, "environment": self._environment()}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # A pool that lost workers grows again while all it has are busy, which is all that two shards in hand can show.
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
        shards = ray.data.from_items(todo, override_num_blocks=len(todo))
        counts = shards.map(
            self._worker,
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
                yield read_answer(row)
        except RayError as err:
            if "No module named 'carray" not in str(err):
                raise
            raise SettingsError(
                "the machines of this Ray have no carray ('No module named carray'); install it in their image, or "
                "submit the command as a job with --working-dir."
            ) from err
        finally:
            rows.close()  # a job that stops before the end kills its workers now


@contextmanager
def start_on_ray(needs: Mapping[str, float]) -> Iterator[RayEngine]:
    """Give the processes of a Ray, where one worker `needs` so much; see `core.ray.connect.start_ray`."""
    with start_ray(worker=needs) as resources:
        yield RayEngine(resources)


def _is_lost(machine: str) -> bool:
    """Say whether Ray has given a node up, with every process on it."""
    return machine not in {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _measure(environment: dict[str, str], bundle: str, runtimes: list[str]) -> dict[str, float]:
    os.environ.update(environment)
    return measure_runtimes(bundle, runtimes)


class _RayWorker(Worker):
    """A Ray actor that scores shards."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__(job, machine=ray.get_runtime_context().get_node_id(), is_lost=_is_lost)

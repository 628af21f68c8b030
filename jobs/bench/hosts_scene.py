"""Sets the scene for drills of several hosts: a cluster, a bucket of images, and both jobs undisturbed.

From: nothing but this package. To: a `Scene` with what a disturbed search and a disturbed classification are compared
with.
Invariants: both jobs are the documented lines, submitted on the head; each image takes `_READ_SECONDS` to come, so that
a classification lasts long enough to be disturbed; a trial takes more than half of a worker's CPUs and a scorer what is
left, so that every worker has both.
Cost: about two and a half minutes on two cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from carray.core.store.files import join, read_json
from carray.search.run_folder import read_log
from jobs.bench.classify_check import Truth, read_truth
from jobs.bench.drill_compare import Reference

if TYPE_CHECKING:
    from carray.testing.hosts.cluster import Cluster, Submission

__all__ = ["Scene", "set_scene"]

_BUCKET = "s3://cluster"
_IMAGES_PER_CLASS = 80
_READ_SECONDS = 0.5
_TRIALS, _EPOCHS = 10, 4
_TRIAL_CPUS = 1.6
_SPACE = "space: {learning_rate: {log_uniform: [0.0001, 0.01]}}"
_CNN = f"{{share: 0.5, default: {{input_size: 64, stages: 3, width: 16, batch_images: 16}}, {_SPACE}}}"
_BACKBONE = "backbone: test_efficientnet, weights: none, train: all, input_size: 64, batch_images: 16"
_TRANSFER = f"{{share: 0.5, default: {{{_BACKBONE}}}, {_SPACE}}}"
_SEARCH = (
    *("--trials", f"{_TRIALS}", "--epochs", f"{_EPOCHS}", "--seed", "3"),
    *("--set", "search.reduction_factor=2", "--set", f"search.cpus_per_trial={_TRIAL_CPUS}"),
    *("--set", "pixels={decode_size: 80, input_size: 64}"),
    *("--set", f"families={{cnn: {_CNN}, transfer: {_TRANSFER}}}"),
)
_CLASSIFY = ("--workers", "2")
_SHARDS = ("shard_images_first=12", "shard_images_max=12", "fetch_concurrency=4", "batch_images=8")


@dataclass(frozen=True)
class Scene:
    """Is what drills are made in."""

    cluster: Cluster
    work: Path
    """Of this machine: the jobs' logs."""
    search: Reference
    rows: Truth

    def searching(self, name: str, *more: str) -> Submission:
        """Give the search's line, with an output of its own."""
        return _submission(self, name, "jobs/tune.py", "--manifest", f"{_BUCKET}/manifest.parquet", *_SEARCH, *more)

    def classifying(self, name: str) -> Submission:
        """Give the classification's line, with an output of its own."""
        settings = [word for setting in _SHARDS for word in ("--set", setting)]
        line = ("jobs/classify.py", f"{_BUCKET}/undisturbed-search/bundle", f"{_BUCKET}/photos", *_CLASSIFY, *settings)
        return _submission(self, name, *line)


def _submission(scene: Scene, name: str, *words: str) -> Submission:
    from carray.testing.hosts.cluster import Submission

    out = f"{_BUCKET}/{name}"
    return Submission(scene.cluster, ("python", *words, "--out", out), out, scene.work / f"{name}.log")


@contextmanager
def set_scene(work: Path) -> Iterator[Scene]:
    """Build a cluster, fill its store, and run both jobs undisturbed; all of it is removed at the end.

    Raises:
        OSError: this machine can have no such cluster.
    """
    from carray.testing.fault_proxy import Rule, start_proxy
    from carray.testing.hosts.cluster import Cluster

    cluster = Cluster.build()
    try:
        _fill_store(cluster, work)
        with start_proxy(cluster.store.endpoint, address=cluster.network.address(1)) as proxy:
            cluster.start(endpoint=proxy.endpoint)
            scene = Scene(cluster, work, Reference([], [], {}), Truth({}, {}, 0))
            search = scene.searching("undisturbed-search")
            _run(search)
            proxy.add(Rule("delay", method="GET", key="^/cluster/photos/", seconds=_READ_SECONDS))
            unpruned, rows = (
                scene.searching("unpruned-search", "--set", "search.scheduler=none"),
                scene.classifying("rows"),
            )
            _run(unpruned, rows)
            done = read_json(join(search.out, "done.json"))
            reference = Reference(read_log(search.out), read_log(unpruned.out), done)
            yield replace(scene, search=reference, rows=read_truth(rows.out))
    finally:
        cluster.remove()


def _run(*jobs: Submission) -> None:
    for job in jobs:
        job.start()
    for job in jobs:
        if job.wait():
            raise SystemExit(f"an undisturbed job failed:\n{job.said()[-3000:]}")


def _fill_store(cluster: Cluster, work: Path) -> None:
    """Draw photographs and broken files into the store, and prepare a manifest of the photographs there."""
    from carray.manifest.prepare import prepare
    from carray.testing.drawing import draw_broken_files, draw_dataset

    os.environ.update(cluster.store.environment)  # this machine is the one that prepares, and looks at what came out
    folder, client = work / "images", cluster.store.client()
    draw_dataset(folder / "photos", images_per_class=_IMAGES_PER_CLASS)
    client.create_bucket(Bucket="cluster")

    def put(path: Path) -> None:
        client.put_object(Bucket="cluster", Key=str(path.relative_to(folder)), Body=path.read_bytes())

    def put_all() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(put, [path for path in folder.rglob("*") if path.is_file()]))

    put_all()
    prepare(f"{_BUCKET}/photos", out=f"{_BUCKET}/manifest.parquet")
    draw_broken_files(folder / "photos" / "odd")
    put_all()

"""Disturbs both jobs on a cluster of several hosts, resubmits what ended, and compares all that they left.

    python -m jobs.drills.cluster --times 12 [--seed 0] [--only KIND ...]

Hosts are network namespaces, which need Linux, root and iproute2; the object store is the extra `dev`. Prints a line
and appends a row to results/drill_cluster.csv per drill, and ends with one JSON line; exit code 1 if one went wrong.
Cost: 3 minutes, and about 2 minutes a drill on two cores.

Both jobs are submitted on the head as documented. What was finished before a strike is never written again. The search
must come to figures and decisions that an undisturbed one could have come to, the classification to its very rows.
"""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from carray.core.store.files import join, list_files, read_bytes, read_json
from carray.manifest.prepare import prepare
from carray.search import run_folder
from carray.search.run_folder import read_log
from carray.testing.drawing import draw_broken_files, draw_dataset
from carray.testing.fault_proxy import Rule, start_proxy
from carray.testing.hosts.cluster import WORKERS, Cluster
from carray.testing.hosts.machine import CLONE
from jobs.bench.rows import set_words
from jobs.drills.harness import Command, Outcome, drill_program, files_below, kinds_of, run_drills
from jobs.drills.prediction_rows import Truth, inspect_output, read_truth
from jobs.drills.search_log import Reference, disagreements

SURVIVED = ("worker", "cut", "blink", "slow")
"""Losses that must not end a job."""
_SLOW_KILOBITS = 400
_PATIENCE_SECONDS = 300
_STOP_SECONDS = 60
_MOST_SUBMISSIONS = 3
_LEFT_SECONDS = 60
_WORKING = ("TrialRunner", "ResourceTrainable", "MapWorker", "_probe_here")
"""In the titles of processes that work for a job; Ray keeps idle ones for the next one."""
Finished = dict[str, tuple[str, Any]]
"""Etag and time of writing of every object that may not be written again, by key."""
_BUCKET = "s3://cluster"
_IMAGES_PER_CLASS = 80
_READ_SECONDS = 0.5
"""The store delays each image by this, so that a classification lasts long enough to be disturbed."""
_TRIALS, _EPOCHS = 10, 4
_TRIAL_CPUS = 1.6
"""More than half of a worker's CPUs, and a scorer takes what is left, so every worker has both."""
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
_CLASSIFY = (
    *("--workers", "2"),
    *set_words(["shard_images_first=12", "shard_images_max=12", "fetch_concurrency=4", "batch_images=8"]),
)


def main() -> None:
    """Run the drills, and write the results."""
    program = drill_program(__doc__, "drill_cluster.csv", times=12, kinds=KINDS)
    given = program.parse()
    kinds, right = kinds_of(given.times, given.seed, given.only), 0
    with tempfile.TemporaryDirectory(prefix="carray-drill-") as work, set_scene(Path(work)) as scene:
        epochs, shards = len(scene.search.entries), scene.rows.shards
        print(f"undisturbed: {epochs} epochs; {shards} shards of {len(scene.rows.etags)} images", flush=True)

        def drill_one(number: int, attempt: int) -> Outcome:
            dice = random.Random(f"{given.seed}-{number}-{attempt}")
            return drill(kinds[number], scene, dice, f"drill-{number}-{attempt}")

        for i, outcome in enumerate(run_drills(given.times, drill_one)):
            row = {
                "seed": given.seed,
                "drill": i + 1,
                "kind": kinds[i],
                "right": int(outcome.right),
                "said": outcome.said,
                **{f"{name}_codes": " ".join(map(str, codes)) for name, codes in outcome.codes.items()},
                "finished_before": outcome.figures["finished"],
                "seconds": round(outcome.seconds, 1),
            }
            program.record([row])
            right += outcome.right
    print(json.dumps({"drills": given.times, "right": right}))
    sys.exit(0 if right == given.times else 1)


@dataclass
class Submission(Command):
    """A job that is submitted as a user would: it can be stopped and submitted again."""

    cluster: Cluster = field(kw_only=True)
    out: str = ""
    """Its --out."""
    patience_seconds: float = _PATIENCE_SECONDS
    _id: str = ""

    def start(self, *more: str) -> None:
        """Submit the job, and follow it."""
        self._id = f"{self.log.stem}-{secrets.token_hex(3)}"
        self._said_before = self.log.stat().st_size if self.log.exists() else 0
        line = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", self._id, "--", *self.words, *more]
        with self.log.open("ab") as log:
            head = self.cluster.host("head")
            self.process = head.start(*line, environment=self.cluster.user, folder=str(CLONE), log=log)

    def kill_all(self) -> None:
        """End what follows the job; the cluster's removal ends the job itself."""
        self.kill()

    def wait_for_files(self, count: int, *folder: str) -> None:
        """Wait until so many files lie in a folder of the output, or the job has ended."""
        self.wait_until(lambda: len(list_files(join(self.out, *folder))) >= count)

    @property
    def ended_well(self) -> bool:
        """Return whether the job succeeded; the exit code alone is 0 for a stopped one, too."""
        return self.codes[-1] == 0 and f"Job '{self._id}' succeeded" in self.said()

    def stop(self) -> None:
        """Stop the job as a user does.

        Raises:
            OSError: Ray refused.
        """
        done = self.cluster.ray("job", "stop", self._id, seconds=_STOP_SECONDS)
        if done.returncode:
            raise OSError(f"the job could not be stopped: {done.stdout[-500:]}{done.stderr[-500:]}")


def drill(kind: str, scene: Scene, dice: random.Random, name: str) -> Outcome:
    """Run both jobs, disturb them or their cluster, resubmit what ended, and compare."""
    search, rows = scene.searching(f"{name}-search"), scene.classifying(f"{name}-rows")
    jobs = {"search": search, "classification": rows}
    search.start()
    # Its processes start later, and both jobs are to be disturbed.
    search.wait_until(lambda: "trials to run" in search.said())
    rows.start()
    search.wait_for_files(dice.randint(1, len(scene.search.entries) // 3), "log")
    rows.wait_for_files(dice.randint(1, scene.rows.shards // 3), "_carray", "ledger")
    time.sleep(dice.uniform(0, 1))
    before = {which: _finished(scene, job.out) for which, job in jobs.items()}
    count = [len(list_files(join(search.out, "log"))), len(list_files(join(rows.out, "_carray", "ledger")))]
    said = ""
    if search.alive and rows.alive:
        at = f" at epoch {count[0]} of some {len(scene.search.entries)}, shard {count[1]} of {scene.rows.shards}"
        said = strike(kind, scene.cluster, list(jobs.values()), dice) + at
    complaints = _finish(kind, list(jobs.values()))
    for which, job in jobs.items():
        complaints += [f"{which}: {text}" for text in _rewritten(before[which], _finished(scene, job.out))]
    complaints += _unlike_search(scene, search) + inspect_output(rows.out, scene.rows)
    complaints += _rerun(search, ended=sum(key.endswith("/trial.json") for key in before["search"]))
    scene.cluster.wait_for_nodes()
    complaints += _left(scene)
    codes = {which: job.codes for which, job in jobs.items()}
    return Outcome(said, complaints, codes, figures={"finished": sum(count)})


def _finish(kind: str, jobs: Sequence[Submission]) -> list[str]:
    """Wait for the jobs' ends, and resubmit, as a user would, those that did not succeed."""
    complaints: list[str] = []
    unfinished = jobs
    for submitted in range(1, _MOST_SUBMISSIONS + 1):
        for job in unfinished:
            job.wait()
        unfinished = [job for job in unfinished if not job.ended_well]
        if kind in SURVIVED or submitted > 1:
            complaints += [f"{job.log.stem} ended with {job.codes[-1]}: {job.said()[-1500:]}" for job in unfinished]
        if not unfinished:
            break
        for job in unfinished:
            job.start()
    return complaints


def _finished(scene: Scene, out: str) -> Finished:
    """List the objects that may not be written again: logged epochs, ended trials, entered shards and their files."""
    bucket, _, prefix = out.removeprefix("s3://").partition("/")
    pages = scene.cluster.store.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    objects = {item["Key"]: (item["ETag"], item["LastModified"]) for page in pages for item in page.get("Contents", [])}
    entered = {found[1] for key in objects if (found := re.search(r"/_carray/ledger/(\d+)\.json$", key))}

    def lasts(key: str) -> bool:
        part = re.search(r"/part-(\d+)\.parquet$", key)
        return bool(re.search(r"/log/\d+\.json$|/trial\.json$|/_carray/(ledger|shards)/", key)) or (
            part is not None and part[1] in entered
        )

    return {key: facts for key, facts in objects.items() if lasts(key)}


def _rewritten(before: Finished, after: Finished) -> list[str]:
    return [f"{key} was written again or is gone" for key, facts in before.items() if after.get(key) != facts]


def _unlike_search(scene: Scene, search: Submission) -> list[str]:
    """List what another order of the same trials does not explain, and weights that are not their epoch's."""
    from carray.search.run_log import check_decisions

    done, entries = read_json(join(search.out, "done.json")), read_log(search.out)
    found = disagreements(scene.search, entries, done) + check_decisions(search.out)
    trials = run_folder.read_trials(search.out).to_dict("records")
    packed = read_json(join(search.out, "bundle", "bundle.json"))["search"]
    if (packed["trial_id"], packed["epoch"]) != (trials[0]["trial_id"], trials[0]["best_epoch"]):
        found.append(f"the bundle is of {packed['trial_id']}, epoch {packed['epoch']}, not of the best")
    for row in trials:
        epoch = run_folder.safetensors_metadata(read_bytes(run_folder.best_weights(search.out, row["trial_id"])))[
            "epoch"
        ]
        if int(epoch) != row["best_epoch"]:
            found.append(f"{row['trial_id']} keeps the weights of epoch {epoch}, its best is {row['best_epoch']}")
        names = {uri.rsplit("/", 1)[-1] for uri in list_files(run_folder.trial_folder(search.out, row["number"]))}
        found += [
            f"{name} of {row['trial_id']} was left" for name in sorted(names - {"best.safetensors", "trial.json"})
        ]
    return found


def _rerun(search: Submission, *, ended: int) -> list[str]:
    """Check by its log that a search ran no trial again that had ended before the strike."""
    said = re.findall(r"tune: (\d+) of (\d+) trials to run", search.log.read_text(errors="replace"))
    return [
        f"{left} of {trials} trials were run again, though {ended} had ended"
        for left, trials in said[1:]
        if int(left) > int(trials) - ended
    ]


def _left(scene: Scene) -> list[str]:
    """Name the processes that still work for a job some time after its end."""
    until = time.monotonic() + _LEFT_SECONDS
    while True:
        found = [
            f"{title} goes on on {name}"
            for name in WORKERS
            for title in scene.cluster.processes(name)
            if any(word in title for word in _WORKING)
        ]
        if not found or time.monotonic() > until:
            return found
        time.sleep(1)


def strike(kind: str, cluster: Cluster, jobs: Sequence[Submission], dice: random.Random) -> str:
    """Do to a cluster, or to its jobs, what `kind` says; returns it in words. Every host is back when it returns."""
    if kind == "stop":
        for job in jobs:
            job.stop()
        return "both jobs stopped"
    loss = LOSSES[kind]
    name, seconds = "head" if kind == "head" else dice.choice(WORKERS), dice.uniform(*loss.seconds)
    loss.begin(cluster, name)
    time.sleep(seconds)
    loss.end(cluster, name)
    return f"{name} {loss.words} for {seconds:.0f} s"


class Loss(NamedTuple):
    """How a host is lost, or slow, for a while."""

    words: str
    begin: Callable[[Cluster, str], None]
    end: Callable[[Cluster, str], None]
    seconds: tuple[float, float]
    """At least, at most."""


def _restart_head(cluster: Cluster, name: str) -> None:
    cluster.start_node(name)
    cluster.wait_for_nodes()


def _kill(cluster: Cluster, name: str) -> None:
    cluster.host(name).kill()


def _cut(cluster: Cluster, name: str) -> None:
    cluster.network.cut(name)


def _mend(cluster: Cluster, name: str) -> None:
    cluster.network.mend(name)


LOSSES = {
    "worker": Loss("off", _kill, Cluster.start_node, (0, 30)),
    "cut": Loss("cut off", _cut, _mend, (60, 60)),
    # Shorter than the 16 s after which Ray counts a silent node as lost (carray.testing.hosts.cluster).
    "blink": Loss("cut off", _cut, _mend, (8, 8)),
    "slow": Loss(
        f"at {_SLOW_KILOBITS} kilobits a second",
        lambda cluster, name: cluster.network.slow(name, kilobits=_SLOW_KILOBITS),
        lambda cluster, name: cluster.network.unlimit(name),
        (30, 30),
    ),
    "head": Loss("off", _kill, _restart_head, (0, 10)),
}
KINDS = (*LOSSES, "stop")


@dataclass(frozen=True)
class Scene:
    """A cluster, and the outcomes of undisturbed jobs on it."""

    cluster: Cluster
    work: Path
    """Folder of this machine for the jobs' logs."""
    search: Reference
    rows: Truth

    def searching(self, name: str, *more: str) -> Submission:
        """Return a search with its own output."""
        return _submission(self, name, "jobs/tune.py", "--manifest", f"{_BUCKET}/manifest.parquet", *_SEARCH, *more)

    def classifying(self, name: str) -> Submission:
        """Return a classification with its own output."""
        bundle = f"{_BUCKET}/undisturbed-search/bundle"
        return _submission(self, name, "jobs/classify.py", bundle, f"{_BUCKET}/photos", *_CLASSIFY)


def _submission(scene: Scene, name: str, *words: str) -> Submission:
    out = f"{_BUCKET}/{name}"
    line = ("python", *words, "--out", out)
    return Submission(line, scene.work / f"{name}.log", mark="", cluster=scene.cluster, out=out)


@contextmanager
def set_scene(work: Path) -> Iterator[Scene]:
    """Start a cluster, fill its store, and run both jobs undisturbed; remove all of it at the end.

    Raises:
        OSError: this machine allows no such cluster.
    """
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
    """Upload drawn photographs, prepare a manifest of them, and add broken files."""
    os.environ.update(cluster.store.environment)
    folder = work / "images"
    draw_dataset(folder / "photos", images_per_class=_IMAGES_PER_CLASS)
    cluster.store.create_bucket("cluster", files_below(folder))
    prepare(f"{_BUCKET}/photos", out=f"{_BUCKET}/manifest.parquet")
    draw_broken_files(folder / "photos" / "odd")
    cluster.store.create_bucket("cluster", files_below(folder))


if __name__ == "__main__":
    main()

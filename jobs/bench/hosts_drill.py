"""Drills both jobs on several hosts once: submit them, strike, submit again what ended, and compare all that they left.

From: a kind of loss and a `Scene`. To: an `Outcome`.
Invariants: what was finished when the blow fell is finished for good: its objects are afterwards those that they were,
written once and not again. The search must come to figures and decisions that an undisturbed one could have come to
(drill_compare), the classification to the undisturbed one's very rows.
Cost: about 80 s on two cores.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carray.core.store.files import join, list_files, read_bytes, read_json
from carray.search import run_folder
from jobs.bench.classify_check import inspect_output
from jobs.bench.drill_compare import disagreements
from jobs.bench.hosts_losses import SURVIVED, strike
from jobs.bench.hosts_scene import Scene

if TYPE_CHECKING:
    from carray.testing.hosts.cluster import Submission

__all__ = ["Outcome", "drill"]

_MOST_VOID = 3
"""Blows drawn for one drill before it counts as wrong."""

_PATIENCE_SECONDS = 240
_MOST_SUBMISSIONS = 3
_LEFT_SECONDS = 60
_WORKING = ("TrialRunner", "ResourceTrainable", "MapWorker", "_probe_here")
"""In the titles of processes that work for a job; Ray keeps others, idle, for the next one."""

Finished = dict[str, tuple[str, Any]]
"""The etag and the time of writing of every object that is not to be written again, by its key."""


@dataclass(frozen=True)
class Outcome:
    """Says how a drill went."""

    kind: str
    said: str
    """What was done and when, in words; empty when a job had ended before."""
    codes: dict[str, list[int | None]]
    """The exit codes of each job's submissions."""
    finished: int
    """Epochs and shards that were finished when the blow fell."""
    complaints: list[str]
    seconds: float


def drill(kind: str, scene: Scene, *, seed: str, name: str) -> Outcome:
    """Run both jobs, do to them what `kind` says, submit what ended again, and compare; anew where a job was faster."""
    for again in range(_MOST_VOID):
        outcome = _drill(kind, scene, random.Random(f"{seed}-{again}"), f"{name}-{again}")
        if outcome.said:
            break
    return outcome


def _drill(kind: str, scene: Scene, dice: random.Random, name: str) -> Outcome:
    started = time.monotonic()
    search, rows = scene.searching(f"{name}-search"), scene.classifying(f"{name}-rows")
    jobs = {"search": search, "classification": rows}
    search.start()
    search.wait_for_words("trials to run")  # its processes take longer to come, and the blow is to fall on both
    rows.start()
    _wait_for(search, dice.randint(1, len(scene.search.entries) // 3), "log")
    _wait_for(rows, dice.randint(1, scene.rows.shards // 3), "_carray", "ledger")
    time.sleep(dice.uniform(0, 1))
    before = {which: _finished(scene, job.out) for which, job in jobs.items()}
    count = [len(list_files(join(search.out, "log"))), len(list_files(join(rows.out, "_carray", "ledger")))]
    if not search.alive or not rows.alive:
        said, complaints = "", ["a job had ended before the blow"]
    else:
        at = f" at epoch {count[0]} of some {len(scene.search.entries)}, shard {count[1]} of {scene.rows.shards}"
        said = strike(kind, scene.cluster, list(jobs.values()), dice) + at
        complaints = []
    complaints += _finish(kind, list(jobs.values()))
    for which, job in jobs.items():
        complaints += [f"{which}: {text}" for text in _rewritten(before[which], _finished(scene, job.out))]
    complaints += _unlike_search(scene, search) + inspect_output(rows.out, scene.rows)
    complaints += _rerun(search, ended=sum(key.endswith("/trial.json") for key in before["search"]))
    scene.cluster.wait_for_nodes()
    complaints += _left(scene)
    codes = {which: job.codes for which, job in jobs.items()}
    return Outcome(kind, said, codes, sum(count), complaints, time.monotonic() - started)


def _wait_for(job: Submission, count: int, *place: str) -> None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while job.alive and time.monotonic() < until and len(list_files(join(job.out, *place))) < count:
        time.sleep(0.1)


def _finish(kind: str, jobs: Sequence[Submission]) -> list[str]:
    """Wait for the jobs' ends, and submit again, as their user would, those that did not end well."""
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
    """List the objects that nobody may write again: logged epochs, ended trials, entered shards and their files."""
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
    """Say what cannot be explained by another order of the same trials, and which weights are not their epoch's."""
    from carray.search.replay_on_ray import replay
    from carray.search.train.checkpoint import safetensors_metadata

    done, entries = read_json(join(search.out, "done.json")), run_folder.read_log(search.out)
    found = disagreements(scene.search, entries, done) + replay(search.out)
    trials = run_folder.read_trials(search.out).to_dict("records")
    packed = read_json(join(search.out, "bundle", "bundle.json"))["search"]
    if (packed["trial_id"], packed["epoch"]) != (trials[0]["trial_id"], trials[0]["best_epoch"]):
        found.append(f"the bundle is of {packed['trial_id']}, epoch {packed['epoch']}, not of the best")
    for row in trials:
        epoch = safetensors_metadata(read_bytes(run_folder.best_weights(search.out, row["trial_id"])))["epoch"]
        if int(epoch) != row["best_epoch"]:
            found.append(f"{row['trial_id']} keeps the weights of epoch {epoch}, its best is {row['best_epoch']}")
        kept = {uri.rsplit("/", 1)[-1] for uri in list_files(run_folder.trial_folder(search.out, row["number"]))}
        found += [f"{name} of {row['trial_id']} was left" for name in sorted(kept - {"best.safetensors", "trial.json"})]
    return found


def _rerun(search: Submission, *, ended: int) -> list[str]:
    """Read from what a search says that it ran no trial again that had ended when the blow fell."""
    said = re.findall(r"tune: (\d+) of (\d+) trials to run", search.log.read_text(errors="replace"))
    return [
        f"{left} of {trials} trials were run again, though {ended} had ended"
        for left, trials in said[1:]
        if int(left) > int(trials) - ended
    ]


def _left(scene: Scene) -> list[str]:
    """Name the processes that still work for a job some time after its end."""
    from carray.testing.hosts.cluster import WORKERS

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

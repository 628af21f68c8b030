"""Probes every candidate backbone in Ray tasks (rung 0) and orders the trials by the results.

Each probe is written to RUN/probes.json as it comes, so a resumed search repeats none. The trials of a candidate that
cannot be probed are not dropped. Workers are reused, since importing torch and timm takes about 15 s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from carray.core.errors import CarrayError
from carray.core.progress import say
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search.resources import Share
from carray.search.rung0 import Candidate, Probe, candidate_of, named, order_trials, probe, read_probes, write_probes
from carray.search.space import TuneSettings
from carray.search.train.hyperparameters import read_hyper
from carray.tensors.block import ensure_block

__all__ = ["rank_trials"]


def rank_trials(
    run: str,
    manifest: Manifest,
    settings: TuneSettings,
    configurations: Sequence[Mapping[str, Any] | None],
    share: Share,
    *,
    environment: Mapping[str, str] = {},
) -> tuple[list[int], dict[int, str]]:
    """Order all trials, best backbone first; gives those to run and, with a reason, those not worth running.

    Args:
        run: The run's folder.
        manifest: Of the search.
        settings: Of the search: search.rung0 and search.rung0_margin among them.
        configurations: Of every trial, ended or not, so that every start of a search comes to the same order; None for
            one that the searcher proposes later.
        share: Resources of a trial, and so of a probe.
        environment: Variables that the workers need besides their own.

    Raises:
        StorageError: storage refused to keep an answer.
    """
    hypers = [None if values is None else read_hyper(values) for values in configurations]
    candidates = list(dict.fromkeys(candidate for hyper in hypers if (candidate := candidate_of(hyper))))
    if settings.search.rung0 == "off" or len(candidates) < (2 if settings.search.rung0 == "auto" else 1):
        return list(range(len(hypers))), {}
    probes = read_probes(run)
    asked = set(candidates) - {one.candidate for one in probes}
    if asked:
        say(f"tune: rung 0 compares {len(candidates)} backbones on {share.text()} each, {len(asked)} to go")
    # max_calls=0: Ray would end a process that used a GPU after each task, and the next would import torch again.
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_calls=0)(_probe_here)
    shared = (manifest.uri, settings.pixels, share, dict(environment))
    tasks = {task.remote(candidate, *shared): candidate for candidate in candidates if candidate in asked}
    while tasks:
        (done,), _ = ray.wait(list(tasks), num_returns=1)
        candidate = tasks.pop(done)
        answer = _result_of(done)
        if isinstance(answer, Probe):
            probes.append(answer)
            write_probes(run, probes)
            text = f"{answer.val_top1:.1%} validation top-1 of a linear head, {answer.seconds:.0f} s"
        else:
            text = f"no answer ({answer}); its trials are not held back"
        say(f"tune: rung 0: {named(candidate)}: {text}")
    return order_trials(hypers, probes, margin=settings.search.rung0_margin)


def _probe_here(
    candidate: Candidate, manifest_uri: str, pixels: PixelSettings, share: Share, environment: Mapping[str, str]
) -> Probe | str:
    """Probe one candidate in a worker; gives a sentence where that fails."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(max(1, int(share.cpus)))
    device = "cuda" if share.gpus and torch.cuda.is_available() else "cpu"
    try:
        manifest = read_manifest(manifest_uri)
        block = ensure_block(manifest, pixels)
        return probe(candidate, block, pixels, class_count=len(manifest.classes), device=device)
    except CarrayError as err:
        return str(err)


def _result_of(task: Any) -> Probe | str:
    """Give a task's probe, or a sentence where its process was lost or torch cannot run the backbone."""
    try:
        return ray.get(task)
    except RayError as err:
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        return lines[-1][:300] if lines else type(err).__name__

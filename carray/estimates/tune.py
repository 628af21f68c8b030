"""Estimates a search: how many epochs ASHA leaves, how long they take on given machines, and what that costs.

From: a manifest, settings and machines. To: a `TuneEstimate`, as JSON and as text.
Invariants: what an epoch costs is measured here by a trial's own code, and who is stopped is decided by the search's
own scheduler, over made-up curves whose order nobody knows; every figure is a range, whose meaning is said.
Cost: a minute or two: networks of the space, six at most, are trained on 160 images for three epochs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.storage import absolute, is_s3
from carray.doctor.machine import usable_cores
from carray.estimates.ranges import MACHINE_FACTOR, Range
from carray.estimates.stopping import rehearse
from carray.estimates.training import NetCost, TrainingCost, measure_training, net_key
from carray.manifest.format import Manifest, read_manifest
from carray.trials.draw import draw_trials
from carray.trials.hyper import CnnHyper, TransferHyper
from carray.trials.probe import TRAIN_IMAGES_PER_CLASS, VAL_IMAGES, candidate_of
from carray.trials.record import check_search
from carray.trials.resources import Share, share_out
from carray.trials.space import TuneSettings

__all__ = ["Cluster", "TuneEstimate", "estimate_tune"]

START_SECONDS = Range(5.0, 20.0)
"""Of the command, of Ray and its processes, before they import torch."""
PACK_SECONDS = Range(10.0, 120.0)
"""Of the winner: export, int8 and its certificate, calibration."""
Hyper = CnnHyper | TransferHyper


@dataclass(frozen=True, slots=True)
class Cluster:
    """Says what a search is to run on, and what a machine costs."""

    machines: int = 1
    cores: int = 1
    gpus: int = 0
    """Of each machine, as its cores."""
    machine_hour: float | None = None
    """Price; None where machines are not to be priced."""


@dataclass(frozen=True)
class TuneEstimate:
    """Says what a search will take."""

    manifest: str
    images: int
    trials: int
    epochs_each: int
    scheduler: str
    cluster: Cluster
    share: Share
    networks: int
    """Distinct ones, of which as many as `cost` holds were measured."""
    cost: TrainingCost
    epochs: Range
    """Of all trials together."""
    decode_seconds: Range
    rung0_seconds: Range
    search_seconds: Range
    """Of the trials, on all machines."""
    refit_seconds: Range
    seconds: Range
    """Of the whole command."""
    ended_by: str | None
    """The budget that ends the search before its trials do, if any does."""
    get_requests: int

    @property
    def machine_hours(self) -> Range:
        """Give the hours of all machines together."""
        return self.seconds * (self.cluster.machines / 3600)

    @property
    def device_hours(self) -> Range:
        """Give the hours of all GPUs together, or of all cores where there are none."""
        return self.machine_hours * (self.cluster.gpus or self.cluster.cores)

    @property
    def machine_money(self) -> Range | None:
        """Give the machines' price; None where nobody said one."""
        return self.machine_hours * self.cluster.machine_hour if self.cluster.machine_hour is not None else None

    def as_json(self) -> dict[str, Any]:
        """Give it in plain values; ranges are [from, to]."""
        parts = ("epochs", "decode_seconds", "rung0_seconds", "search_seconds", "refit_seconds", "seconds")
        return {
            "manifest": self.manifest,
            "images": self.images,
            "trials": self.trials,
            "epochs_all_in_full": self.trials * self.epochs_each,
            "scheduler": self.scheduler,
            "machines": self.cluster.machines,
            "cores": self.cluster.cores,
            "gpus": self.cluster.gpus,
            "trials_at_once": self.share.at_once,
            "networks": self.networks,
            "networks_measured": len(self.cost.nets),
            **{name: getattr(self, name).rounded() for name in parts},
            "machine_hours": self.machine_hours.rounded(),
            "device_hours": self.device_hours.rounded(),
            "machine_money": self.machine_money.rounded() if self.machine_money else None,
            "get_requests": self.get_requests,
            "ended_by": self.ended_by,
        }


def estimate_tune(
    manifest: str,
    *,
    settings: TuneSettings,
    cluster: Cluster,
    most_networks: int = 6,
    probe_workers: int | None = None,
) -> TuneEstimate:
    """Estimate a search from some epochs of its own networks on some of its own images.

    Raises:
        SettingsError: settings that no network takes, resources that the machines have not, or GPUs where here is none.
        SchemaError: the manifest has no usable training or validation image.
        DataError: an image cannot be read any more.
        BudgetError: a process that was to measure died.
    """
    source = read_manifest(absolute(manifest))
    hypers = draw_trials(settings)
    check_search(source, hypers)
    nodes = [{"CPU": float(cluster.cores), "GPU": float(cluster.gpus)}] * cluster.machines
    share = share_out(nodes, settings.search, len(hypers))
    device = _device(share)
    counts = Counter(net_key(hyper) for hyper in hypers)
    chosen = _choose(hypers, counts, most_networks)
    here = max(1, int(usable_cores() // max(share.cpus, 1))) if device == "cpu" else 1
    processes = probe_workers or min(here, share.at_once)
    say(f"estimate: training {len(chosen)} of {len(counts)} networks on a few images, in {processes} processes")
    cost = measure_training(source, settings, chosen, processes=processes, cpus=share.cpus, device=device)
    return _scale(source, settings, hypers, share, cluster, cost, networks=len(counts))


def _device(share: Share) -> str:
    if not share.gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise SettingsError(
            f"a trial is to have {share.gpus:g} GPUs, but torch sees none on this machine, where epochs are measured; "
            "run carray estimate tune on a machine with such a GPU."
        )
    return "cuda"


def _choose(hypers: Sequence[Hyper], counts: Mapping[str, int], most: int) -> list[Hyper]:
    """Choose the networks to measure: each family's first, then the most frequent."""
    of_key = {net_key(hyper): hyper for hyper in reversed(hypers)}
    first = {hyper.family: net_key(hyper) for hyper in reversed(hypers)}
    others = sorted((key for key in of_key if key not in first.values()), key=lambda key: (-counts[key], key))
    return [of_key[key] for key in [*first.values(), *others][: max(most, len(first))]]


def _scale(
    manifest: Manifest,
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    share: Share,
    cluster: Cluster,
    cost: TrainingCost,
    *,
    networks: int,
) -> TuneEstimate:
    """Turn what an image costs here into what the whole search costs there."""
    counts = manifest.split_counts()
    images = counts["train"] + counts["val"]
    known = [_cost_of(hyper, hypers, cost) for hyper in hypers]
    epochs, trials_seconds = rehearse(settings, hypers, known, counts, share)
    decode = (cost.decode * (images / cluster.cores)).widened(MACHINE_FACTOR)
    rung0 = _rung0(settings, hypers, known, counts, len(manifest.classes), share).widened(MACHINE_FACTOR)
    searching = trials_seconds.widened(MACHINE_FACTOR)
    before = START_SECONDS + cost.open_seconds + decode + rung0
    searched, (limit, budget) = before + searching, _limit(settings, share)
    ended_by = budget if searched.high > limit else None
    if ended_by:  # what is not reached by then is not run
        epochs = Range(epochs.low * limit / searched.high, epochs.high)
        searched = searched.at_most(limit)
    refit = _refit(settings, known, images, share, cluster).widened(MACHINE_FACTOR)
    return TuneEstimate(
        manifest=manifest.uri,
        images=images,
        trials=len(hypers),
        epochs_each=settings.search.epochs,
        scheduler=settings.search.scheduler,
        cluster=cluster,
        share=share,
        networks=networks,
        cost=cost,
        epochs=epochs,
        decode_seconds=decode,
        rung0_seconds=rung0,
        search_seconds=searching,
        refit_seconds=refit,
        seconds=searched + refit + PACK_SECONDS,
        ended_by=ended_by,
        get_requests=images * cluster.machines if is_s3(str(manifest.usable["uri"].iloc[0])) else 0,
    )


def _cost_of(hyper: Hyper, hypers: Sequence[Hyper], cost: TrainingCost) -> NetCost:
    """Give a network's cost; of one that was not measured, the range of its family's measured ones."""
    if net_key(hyper) in cost.nets:
        return cost.nets[net_key(hyper)]
    family = [cost.nets[net_key(one)] for one in hypers if one.family == hyper.family and net_key(one) in cost.nets]

    def span(ranges: list[Range]) -> Range:
        return Range(min(one.low for one in ranges), max(one.high for one in ranges))

    return NetCost(*(span([getattr(one, name) for one in family]) for name in ("train", "val", "frozen")))


def _rung0(
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    known: Sequence[NetCost],
    counts: Mapping[str, int],
    classes: int,
    share: Share,
) -> Range:
    """Give what rung 0 takes: a forward pass of a few images for each candidate, and its linear heads."""
    found = {candidate: net for hyper, net in zip(hypers, known, strict=True) if (candidate := candidate_of(hyper))}
    mode = settings.search.rung0
    if mode == "off" or not found or (mode == "auto" and len(found) < 2):
        return Range(0.0, 0.0)
    images = min(TRAIN_IMAGES_PER_CLASS * classes, counts["train"]) + min(VAL_IMAGES, counts["val"])
    total = Range(0.0, 0.0)
    for net in found.values():
        total += Range(net.val.low, net.val.high + net.frozen.high + net.train.high) * images + Range(0.5, 20.0)
    rounds = max(1.0, len(found) / share.at_once)
    return total * (rounds / len(found))


def _refit(settings: TuneSettings, known: Sequence[NetCost], images: int, share: Share, cluster: Cluster) -> Range:
    """Give what training the winner once more takes, on one machine: which it is is not known, nor how threads help."""
    search = settings.search
    if not search.refit:
        return Range(0.0, 0.0)
    epochs = search.refit_epochs or search.epochs
    each = [net.train + net.frozen for net in known]
    slowest = max(one.high for one in each) * epochs * images
    fastest = min(net.train.low for net in known) * epochs * images
    return Range(fastest * min(1.0, share.cpus / cluster.cores), slowest)


def _limit(settings: TuneSettings, share: Share) -> tuple[float, str]:
    """Give the seconds after which a budget ends the search, and which budget that is; infinity where there is none."""
    search, limits = settings.search, [(math.inf, "")]
    if search.time_budget_minutes:
        limits.append((search.time_budget_minutes * 60, "search.time_budget_minutes"))
    devices = max(share.devices * share.at_once, 1e-9)
    if search.device_hours_budget:
        limits.append((search.device_hours_budget * 3600 / devices, "search.device_hours_budget"))
    if search.money_budget and search.price_per_device_hour:
        hours = search.money_budget / search.price_per_device_hour
        limits.append((hours * 3600 / devices, "search.money_budget"))
    return min(limits)

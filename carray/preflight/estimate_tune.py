"""Estimates a search: how many epochs its trials take, how long that is on given machines, and what it costs.

Time is the cost of an image, measured here with a trial's own code, times images and epochs. The number of epochs is
what an earlier run shows, else from the fewest to the most that the scheduler may run. Every figure is a range.
Cost: a minute or two: at most six networks of the space are trained on 160 images for three epochs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.preflight.machine import usable_cores
from carray.preflight.ranges import (
    MACHINE_FACTOR,
    START_SECONDS,
    Range,
    busy_text,
    middle,
    money_text,
    seconds_text,
    table_row,
    table_text,
    whole,
)
from carray.preflight.tune_probe import NetCost, TrainingCost, frozen_key, measure_training, net_key
from carray.search import run_folder
from carray.search.judge import STOPPING_SETTINGS, first_stop
from carray.search.resources import Share, share_out
from carray.search.run_log import check_search
from carray.search.rung0 import TRAIN_IMAGES_PER_CLASS, VAL_IMAGES, candidate_of
from carray.search.space import SearchSettings, TuneSettings, draw_trials
from carray.search.train.hyperparameters import CnnHyper, TransferHyper

__all__ = ["Cluster", "TuneEstimate", "estimate_tune", "tune_text"]

PACK_SECONDS = Range(10.0, 120.0)
"""Packing the winner: export, int8 and its certificate, calibration."""
TRIAL_SECONDS, EPOCH_SECONDS = Range(0.3, 2.0), Range(0.05, 0.5)
"""Overhead of a trial and of an epoch (results/tune.csv, fixed)."""
_MEANING = f"""\
Times: from processor time to wall-clock time measured here, by images and epochs; widened by a factor of
{MACHINE_FACTOR:g} for other machines of this type. Not included: other types of machines, their booting, machines that
leave, and a cache that is already full."""
Hyper = CnnHyper | TransferHyper


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a search, and their price."""

    machines: int = 1
    cores: int = 1
    gpus: int = 0
    """Of each machine, like `cores`."""
    machine_hour: float | None = None
    """Price; None: machines are not priced."""


@dataclass(frozen=True)
class TuneEstimate:
    """What a search will take."""

    manifest: str
    images: int
    trials: int
    epochs_each: int
    scheduler: str
    cluster: Cluster
    share: Share
    networks: int
    """Different networks; those in `cost` were measured."""
    cost: TrainingCost
    epochs: Range
    """Of all trials together."""
    epochs_meaning: str
    """Where that range comes from, a sentence."""
    decode_seconds: Range
    rung0_seconds: Range
    search_seconds: Range
    """Of the trials, on all machines."""
    refit_seconds: Range
    seconds: Range
    """Of the whole command."""
    ended_by: str | None
    """The budget that ends the search early, if any."""
    get_requests: int

    @property
    def machine_hours(self) -> Range:
        """Hours of all machines together."""
        return self.seconds * (self.cluster.machines / 3600)

    @property
    def device_hours(self) -> Range:
        """Hours of all GPUs together, or of all cores without GPUs."""
        return self.machine_hours * (self.cluster.gpus or self.cluster.cores)

    @property
    def machine_money(self) -> Range | None:
        """Price of the machines; None if not given."""
        return self.machine_hours * self.cluster.machine_hour if self.cluster.machine_hour is not None else None

    def as_json(self) -> dict[str, Any]:
        """Convert for JSON; ranges are [from, to]."""
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
            "epochs_meaning": self.epochs_meaning,
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
    earlier_run: str | None = None,
) -> TuneEstimate:
    """Estimate a search by training its networks for a few epochs on some of its images.

    Args:
        manifest: Manifest of the search.
        settings: Settings of the search.
        cluster: Machines of the search.
        most_networks: Most networks to measure.
        probe_workers: Processes to measure in; None: as many as trials would run at once here.
        earlier_run: Run folder of a search with the same scheduler settings.

    Raises:
        SettingsError: no network accepts the settings, the machines lack the resources, there is no GPU here to measure
            on, or the earlier run had other scheduler settings.
        SchemaError: the manifest has no usable training or validation image.
        DataError: an image cannot be read any more.
        BudgetError: a measuring process died.
    """
    source = read_manifest(absolute(manifest))
    hypers = draw_trials(settings)
    check_search(source, hypers)
    epochs, meaning = _epochs(settings.search, len(hypers), earlier_run)
    nodes = [{"CPU": float(cluster.cores), "GPU": float(cluster.gpus)}] * cluster.machines
    share = share_out(nodes, settings.search, len(hypers))
    device = _device(share)
    counts = Counter(net_key(hyper) for hyper in hypers)
    chosen = _choose(hypers, counts, most_networks)
    here = max(1, int(usable_cores() // max(share.cpus, 1))) if device == "cpu" else 1
    processes = probe_workers or min(here, share.at_once)
    say(f"estimate: training {len(chosen)} of {len(counts)} networks on a few images, in {processes} processes")
    cost = measure_training(source, settings, chosen, processes=processes, cpus=share.cpus, device=device)
    return _scale(
        source, settings, hypers, share, cluster, cost, networks=len(counts), epochs=epochs, epochs_meaning=meaning
    )


def _epochs(search: SearchSettings, trials: int, earlier_run: str | None) -> tuple[Range, str]:
    """Estimate the epochs of all trials together; returns them and a sentence on where the range comes from.

    Raises:
        SettingsError: no search was run there, it had other scheduler settings, or none of its trials ended.
        StorageError: its records cannot be read.
    """
    full = trials * search.epochs
    if search.scheduler == "none":
        return whole(full), "Epochs: all, since search.scheduler none stops no trial."
    if earlier_run is None:
        first = first_stop(search)
        return whole(trials * first, full), (
            f"Epochs: from every trial stopped as early as possible, after epoch {first}, to none stopped. An "
            "earlier run with the same scheduler narrows the range: --earlier-run RUN."
        )
    run, taken = absolute(earlier_run), _epochs_taken(absolute(earlier_run), search)
    values, counts = np.unique(taken, return_counts=True)
    # Total epochs of as many trials as this search has, drawn from the earlier run.
    sums = np.random.default_rng(0).multinomial(trials, counts / counts.sum(), size=2000) @ values
    likely = middle(sums.astype(np.float64))
    return whole(likely.low, likely.high), (
        f"Epochs: {run} ran {taken.sum():,} of its {len(taken):,} trials' {len(taken) * search.epochs:,}; the range is "
        f"the middle 80 % of what {trials:,} trials drawn from those took together."
    )


def _epochs_taken(run: str, search: SearchSettings) -> npt.NDArray[np.int64]:
    """Read the epochs of each ended trial of an earlier run."""
    before = run_folder.read_search(run)["settings"]["search"]
    for name in STOPPING_SETTINGS:
        if before[name] != getattr(search, name):
            raise SettingsError(
                f"{run} had search.{name} {before[name]}, but this search has {getattr(search, name)}; name a run "
                f"whose {', '.join(STOPPING_SETTINGS)} are this search's, or leave --earlier-run out."
            )
    trials = run_folder.read_trials(run)
    ended = trials[~trials["status"].isin(["out_of_time", "not_started"])]
    if ended.empty:
        raise SettingsError(f"no trial of {run} has ended, so the number of epochs is unknown; name another.")
    return ended["epochs"].to_numpy(np.int64)


def _device(share: Share) -> str:
    if not share.gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise SettingsError(
            f"a trial needs {share.gpus:g} GPUs, but torch sees none on this machine, where epochs are measured; run "
            "carray estimate tune on a machine with such a GPU."
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
    epochs: Range,
    epochs_meaning: str,
) -> TuneEstimate:
    """Scale the cost of an image to the whole search."""
    counts = manifest.split_counts()
    images = counts["train"] + counts["val"]
    known = [_cost_of(hyper, hypers, cost) for hyper in hypers]
    trials_seconds = _trials_seconds(
        settings, hypers, known, counts, epochs, at_once=share.at_once, machines=cluster.machines
    )
    decode = (cost.decode * (images / cluster.cores)).widened(MACHINE_FACTOR)
    rung0 = _rung0(settings, hypers, known, counts, len(manifest.classes), share).widened(MACHINE_FACTOR)
    searching = trials_seconds.widened(MACHINE_FACTOR)
    before = START_SECONDS + cost.open_seconds + decode + rung0
    searched, (limit, budget) = before + searching, _limit(settings, share)
    ended_by = budget if searched.high > limit else None
    if ended_by:
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
        epochs_meaning=epochs_meaning,
        decode_seconds=decode,
        rung0_seconds=rung0,
        search_seconds=searching,
        refit_seconds=refit,
        seconds=searched + refit + PACK_SECONDS,
        ended_by=ended_by,
        get_requests=images * cluster.machines if is_s3(str(manifest.usable["uri"].iloc[0])) else 0,
    )


def _cost_of(hyper: Hyper, hypers: Sequence[Hyper], cost: TrainingCost) -> NetCost:
    """Look up a network's cost; if it was not measured, the range of its family's measured ones."""
    if net_key(hyper) in cost.nets:
        return cost.nets[net_key(hyper)]
    family = [cost.nets[net_key(one)] for one in hypers if one.family == hyper.family and net_key(one) in cost.nets]

    def span(ranges: list[Range]) -> Range:
        return Range(min(one.low for one in ranges), max(one.high for one in ranges))

    return NetCost(*(span([getattr(one, name) for one in family]) for name in ("train", "val", "frozen")))


def _trials_seconds(
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    known: Sequence[NetCost],
    counts: Mapping[str, int],
    epochs: Range,
    *,
    at_once: int,
    machines: int,
) -> Range:
    """Estimate the wall-clock time of all trials, each with the same share of the epochs.

    At best the work is spread evenly over the trials at once; at worst the longest trial starts when the others have
    ended.
    """

    def seconds(end: str, each: float) -> tuple[list[float], list[float]]:
        """Compute each trial's seconds for `each` epochs, and those of each frozen trunk's features."""
        trial, epoch = getattr(TRIAL_SECONDS, end), getattr(EPOCH_SECONDS, end)
        own, features = [], {}
        for hyper, net in zip(hypers, known, strict=True):
            images = getattr(net.train, end) * counts["train"] + getattr(net.val, end) * counts["val"]
            own.append(trial + each * (epoch + images))
            if isinstance(hyper, TransferHyper) and frozen_key(hyper):
                # Training images once a view, validation images once.
                views = min(hyper.cached_views, each) * counts["train"] + counts["val"]
                features[frozen_key(hyper)] = getattr(net.frozen, end) * views
        return own, list(features.values())

    own, features = seconds("low", epochs.low / len(hypers))
    low = max((sum(own) + sum(features)) / at_once, max(own))
    own, features = seconds("high", epochs.high / len(hypers))
    longest = max(seconds("high", settings.search.epochs)[0]) + max(features, default=0.0)
    spread = (sum(own) + machines * sum(features)) / at_once + longest * (1 - 1 / at_once)
    return Range(low, max(low, min(spread, math.ceil(len(hypers) / at_once) * longest)))


def _rung0(
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    known: Sequence[NetCost],
    counts: Mapping[str, int],
    classes: int,
    share: Share,
) -> Range:
    """Estimate rung 0: a forward pass of a few images for each candidate, and its linear heads."""
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
    """Estimate the refit on one machine, of any of the networks, with any speed-up by its threads."""
    search = settings.search
    if not search.refit:
        return Range(0.0, 0.0)
    epochs = search.refit_epochs or search.epochs
    each = [net.train + net.frozen for net in known]
    slowest = max(one.high for one in each) * epochs * images
    fastest = min(net.train.low for net in known) * epochs * images
    return Range(fastest * min(1.0, share.cpus / cluster.cores), slowest)


def _limit(settings: TuneSettings, share: Share) -> tuple[float, str]:
    """Compute the seconds after which a budget ends the search, and which budget; infinity without one."""
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


def tune_text(found: TuneEstimate) -> str:
    """Format an estimate for a terminal: what was measured, a table of ranges, what they mean."""
    return "\n".join([*_seen(found), "", table_text(_rows(found)), "", *_meaning(found)])


def _seen(found: TuneEstimate) -> list[str]:
    measured = len(found.cost.nets)
    each = "each" if measured == found.networks else f"{measured} of them"
    return [
        f"{found.manifest}: {found.images:,} images to train and validate on; {found.trials:,} trials of up to "
        f"{found.epochs_each} epochs,",
        f"{found.networks} different networks, {each} trained here on a few images; {found.share.at_once:,} trials at "
        f"once, on {found.share.text()} each.",
    ]


def _rows(found: TuneEstimate) -> list[tuple[str, str, str, str]]:
    full, cluster = found.trials * found.epochs_each, found.cluster
    machines = f"{cluster.machines} machine{'s' if cluster.machines > 1 else ''} of {cluster.cores} cores"
    machines += f" and {cluster.gpus} GPUs" if cluster.gpus else ""
    cut = f"; {found.ended_by} ends the search" if found.ended_by else ""
    rows = [
        table_row("epochs, of all trials", found.epochs, note=f"{full:,} if no trial is stopped ({found.scheduler})"),
        _seconds("decoding, once for each machine", found.decode_seconds),
        _seconds("rung 0", found.rung0_seconds),
        _seconds("trials", found.search_seconds),
        _seconds("refit", found.refit_seconds),
        _seconds("wall-clock", found.seconds, f"{machines}, with start and packing{cut}"),
        table_row("machine-hours", found.machine_hours),
        table_row("GPU-hours" if cluster.gpus else "core-hours", found.device_hours),
    ]
    if found.get_requests:
        rows.append(("GET requests", "", f"{found.get_requests:,}", "each image, once for each machine"))
    if found.machine_money is None:
        return [*rows, ("money, machines", "", "", "not priced: --price-per-machine-hour")]
    return [*rows, table_row("money, machines", found.machine_money, money_text)]


def _seconds(what: str, value: Range, note: str = "") -> tuple[str, str, str, str]:
    return table_row(what, value, seconds_text, note) if value.high else (what, "", "", "none")


def _meaning(found: TuneEstimate) -> list[str]:
    lines = [found.epochs_meaning, _MEANING]
    if len(found.cost.nets) < found.networks:
        lines.append(
            "Networks that were not measured have the range of their family's measured ones: --networks measures more."
        )
    return lines + busy_text(found.cost.load)

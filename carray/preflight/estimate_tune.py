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

import numpy as np
import numpy.typing as npt

from carray.core.cgroups import usable_cores
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, is_s3
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.preflight.estimates import (
    MACHINE_FACTOR,
    START_SECONDS,
    Estimate,
    Figure,
    Machines,
    Range,
    busy_text,
    count_text,
    machine_figures,
    middle,
    seconds_text,
    whole,
)
from carray.preflight.tune_probe import Hyper, NetCost, TrainingCost, frozen_key, measure_training, net_key
from carray.search import run_folder
from carray.search.judge import STOPPING_SETTINGS, first_stop
from carray.search.proposals import draw_trials
from carray.search.resources import Share, share_out
from carray.search.run_log import check_search
from carray.search.rung0 import TRAIN_IMAGES_PER_CLASS, VAL_IMAGES, candidate_of
from carray.search.space import SearchSettings, TuneSettings
from carray.search.train.hyperparameters import TransferHyper

__all__ = ["estimate_tune"]

PACK_SECONDS = Range(10.0, 120.0)
"""Packing the winner: export, int8 and its certificate, calibration."""
TRIAL_SECONDS, EPOCH_SECONDS = Range(0.3, 2.0), Range(0.05, 0.5)
"""Overhead of a trial and of an epoch (results/tune.csv, fixed)."""
_HEAD_SECONDS = Range(0.5, 20.0)
"""Fitting the linear heads of one candidate of rung 0."""
_MEANING = f"""\
Times: from processor time to wall-clock time measured here, by images and epochs; widened by a factor of
{MACHINE_FACTOR:g} for other machines of this type. Not included: other types of machines, their booting, machines that
leave, and a cache that is already full."""
_NOT_ALL_MEASURED = (
    "Networks that were not measured have the range of their family's measured ones: --networks measures more."
)


def estimate_tune(
    manifest: str,
    *,
    settings: TuneSettings,
    machines: Machines,
    most_networks: int = 6,
    probe_workers: int | None = None,
    earlier_run: str | None = None,
) -> Estimate:
    """Estimate a search by training its networks for a few epochs on some of its images.

    Args:
        manifest: Manifest of the search.
        settings: Settings of the search.
        machines: Machines of the search.
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
    nodes = [{"CPU": float(machines.cores), "GPU": float(machines.gpus)}] * machines.count
    share = share_out(nodes, settings.search, len(hypers))
    device = _device(share)
    networks = Counter(net_key(hyper) for hyper in hypers)
    chosen = _choose(hypers, networks, most_networks)
    here = max(1, int(usable_cores() // max(share.cpus, 1))) if device == "cpu" else 1
    processes = probe_workers or min(here, share.at_once)
    say(f"estimate: training {len(chosen)} of {len(networks)} networks on a few images, in {processes} processes")
    cost = measure_training(source, settings, chosen, processes=processes, cpus=share.cpus, device=device)
    return _scale(source, settings, hypers, share, machines, cost, epochs=epochs, epochs_meaning=meaning)


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
    run = absolute(earlier_run)
    taken = _epochs_taken(run, search)
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


def _choose(hypers: Sequence[Hyper], networks: Counter[str], most: int) -> list[Hyper]:
    """Choose the networks to measure: each family's first, then the most frequent."""
    of_key = {net_key(hyper): hyper for hyper in reversed(hypers)}
    first = {hyper.family: net_key(hyper) for hyper in reversed(hypers)}
    others = sorted((key for key in of_key if key not in first.values()), key=lambda key: (-networks[key], key))
    return [of_key[key] for key in [*first.values(), *others][: max(most, len(first))]]


def _scale(
    manifest: Manifest,
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    share: Share,
    machines: Machines,
    cost: TrainingCost,
    *,
    epochs: Range,
    epochs_meaning: str,
) -> Estimate:
    """Scale the cost of an image to the whole search."""
    work = _Work(
        settings, hypers, _costs(hypers, cost), manifest.split_counts(), len(manifest.classes), share, machines
    )
    images, search, networks = work.images, settings.search, len({net_key(hyper) for hyper in hypers})
    decode = (cost.decode * (images / machines.cores)).widened()
    rung0, refit = work.rung0_seconds().widened(), work.refit_seconds().widened()
    searching = work.trials_seconds(epochs).widened()
    searched, (limit, budget) = START_SECONDS + cost.open_seconds + decode + rung0 + searching, _limit(search, share)
    ended_by = budget if searched.high > limit else None
    if ended_by:
        epochs = Range(epochs.low * limit / searched.high, epochs.high)
        searched = Range(min(searched.low, limit), limit)
    note = f"{machines.text()}, with start and packing" + (f"; {ended_by} ends the search" if ended_by else "")
    taken, price = machine_figures(machines, searched + refit + PACK_SECONDS, note=note, device_hours="device_hours")
    full = len(hypers) * search.epochs
    gets = images * machines.count if is_s3(str(manifest.usable["uri"].iloc[0])) else 0
    figures = [
        Figure("manifest", manifest.uri),
        Figure("images", images),
        Figure("trials", len(hypers)),
        Figure("epochs_all_in_full", full),
        Figure("scheduler", search.scheduler),
        Figure("machines", machines.count),
        Figure("cores", machines.cores),
        Figure("gpus", machines.gpus),
        Figure("trials_at_once", share.at_once),
        Figure("networks", networks),
        Figure("networks_measured", len(cost.nets)),
        Figure("epochs_meaning", epochs_meaning),
        Figure("ended_by", ended_by),
        Figure(
            "epochs",
            whole(epochs.low, epochs.high),
            "epochs, of all trials",
            count_text,
            f"{full:,} if no trial is stopped ({search.scheduler})",
        ),
        Figure("decode_seconds", decode, "decoding, once for each machine", seconds_text),
        Figure("rung0_seconds", rung0, "rung 0", seconds_text),
        Figure("search_seconds", searching, "trials", seconds_text),
        Figure("refit_seconds", refit, "refit", seconds_text),
        *taken,
        Figure("get_requests", gets, "GET requests" if gets else "", count_text, "each image, once for each machine"),
        price,
    ]
    each = "each" if len(cost.nets) == networks else f"{len(cost.nets)} of them"
    intro = [
        f"{manifest.uri}: {images:,} images to train and validate on; {len(hypers):,} trials of up to "
        f"{search.epochs} epochs,",
        f"{networks} different networks, {each} trained here on a few images; {share.at_once:,} trials at "
        f"once, on {share.text()} each.",
    ]
    partly = [_NOT_ALL_MEASURED] if len(cost.nets) < networks else []
    return Estimate(intro, figures, [epochs_meaning, _MEANING, *partly, *busy_text(cost.load)])


def _costs(hypers: Sequence[Hyper], cost: TrainingCost) -> list[NetCost]:
    """Look up each trial's cost; a network that was not measured has the range of its family's measured ones."""
    of_family: dict[str, list[NetCost]] = {}
    for hyper in hypers:
        if net_key(hyper) in cost.nets:
            of_family.setdefault(hyper.family, []).append(cost.nets[net_key(hyper)])

    def span(ranges: Sequence[Range]) -> Range:
        return Range(min(one.low for one in ranges), max(one.high for one in ranges))

    spans = {family: NetCost(*map(span, zip(*nets, strict=True))) for family, nets in of_family.items()}
    return [cost.nets.get(net_key(hyper), spans[hyper.family]) for hyper in hypers]


@dataclass(frozen=True)
class _Work:
    """A search's work, from which the times of its parts follow."""

    settings: TuneSettings
    hypers: Sequence[Hyper]
    nets: Sequence[NetCost]
    """Of each trial."""
    counts: Mapping[str, int]
    """Images by split."""
    classes: int
    share: Share
    machines: Machines

    @property
    def images(self) -> int:
        """Return the number of images to train and validate on."""
        return self.counts["train"] + self.counts["val"]

    def trials_seconds(self, epochs: Range) -> Range:
        """Estimate the wall-clock time of all trials, each with the same share of the epochs.

        At best the work is spread evenly over the trials at once; at worst the longest trial starts when the others
        have ended.
        """
        trials, at_once = len(self.hypers), self.share.at_once
        own, features = self._each_trial("low", epochs.low / trials)
        low = max((sum(own) + sum(features)) / at_once, max(own))
        own, features = self._each_trial("high", epochs.high / trials)
        longest = max(self._each_trial("high", self.settings.search.epochs)[0]) + max(features, default=0.0)
        spread = (sum(own) + self.machines.count * sum(features)) / at_once + longest * (1 - 1 / at_once)
        return Range(low, max(low, min(spread, math.ceil(trials / at_once) * longest)))

    def _each_trial(self, end: str, epochs: float) -> tuple[list[float], list[float]]:
        """Compute each trial's seconds for so many epochs, and those of each frozen trunk's features."""
        own, features = [], {}
        for hyper, net in zip(self.hypers, self.nets, strict=True):
            train, val, frozen = (getattr(part, end) for part in net)
            images = train * self.counts["train"] + val * self.counts["val"]
            own.append(getattr(TRIAL_SECONDS, end) + epochs * (getattr(EPOCH_SECONDS, end) + images))
            if isinstance(hyper, TransferHyper) and (key := frozen_key(hyper)):
                # Training images once a view, validation images once.
                features[key] = frozen * (min(hyper.cached_views, epochs) * self.counts["train"] + self.counts["val"])
        return own, list(features.values())

    def rung0_seconds(self) -> Range:
        """Estimate rung 0: a forward pass of a few images for each candidate, and its linear heads."""
        pairs = zip(self.hypers, self.nets, strict=True)
        found = {candidate: net for hyper, net in pairs if (candidate := candidate_of(hyper))}
        mode = self.settings.search.rung0
        if mode == "off" or not found or (mode == "auto" and len(found) < 2):
            return Range(0.0, 0.0)
        train, val = TRAIN_IMAGES_PER_CLASS * self.classes, VAL_IMAGES
        images = min(train, self.counts["train"]) + min(val, self.counts["val"])
        passes = [
            Range(net.val.low, net.val.high + net.frozen.high + net.train.high) * images for net in found.values()
        ]
        total = sum((one + _HEAD_SECONDS for one in passes), Range(0.0, 0.0))
        return total * (max(1.0, len(found) / self.share.at_once) / len(found))

    def refit_seconds(self) -> Range:
        """Estimate the refit on one machine, of any of the networks, with any speed-up by its threads."""
        search = self.settings.search
        if not search.refit:
            return Range(0.0, 0.0)
        images = (search.refit_epochs or search.epochs) * self.images
        fastest = min(net.train.low for net in self.nets) * min(1.0, self.share.cpus / self.machines.cores)
        return Range(fastest, max(net.train.high + net.frozen.high for net in self.nets)) * images


def _limit(search: SearchSettings, share: Share) -> tuple[float, str]:
    """Compute the seconds after which a budget ends the search, and which budget; infinity without one."""
    device_hours = {"search.device_hours_budget": search.device_hours_budget}
    if search.money_budget and search.price_per_device_hour:
        device_hours["search.money_budget"] = search.money_budget / search.price_per_device_hour
    devices = max(share.devices * share.at_once, 1e-9)
    limits = [(hours * 3600 / devices, name) for name, hours in device_hours.items() if hours]
    if search.time_budget_minutes:
        limits.append((search.time_budget_minutes * 60, "search.time_budget_minutes"))
    return min([(math.inf, ""), *limits])

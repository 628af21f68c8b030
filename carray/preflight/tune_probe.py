"""Measures what an epoch of each network of a search costs, with a trial's own code, on a few hundred images.

As many processes train at once as trials would on this machine, with as many threads, each all networks in the same
order. Cached features of a frozen trunk, which only some trials compute, are measured separately.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from carray.core.settings import parse_settings
from carray.core.store.files import is_s3
from carray.manifest.manifest_file import SPLITS, Manifest, read_manifest, require_row
from carray.preflight.estimates import Pair, Range, load_per_core, run_in_parallel, spread, wait_for_others
from carray.search.space import TuneSettings
from carray.search.train.hyperparameters import CnnHyper, TransferHyper, read_hyper
from carray.tensors.block import Block

__all__ = ["Hyper", "NetCost", "TrainingCost", "frozen_key", "measure_training", "net_key"]

TRAIN_IMAGES, VAL_IMAGES = 160, 64
_DECIDES_NOTHING = {
    *("learning_rate", "head_learning_rate", "momentum", "weight_decay", "warmup_fraction", "clip_norm", "ema"),
    *("label_smoothing", "crop_scale", "crop_stretch", "flip", "colour_jitter", "erasing", "mixup", "cutmix"),
    *("dropout", "weights", "layer_decay", "drop_path", "head_only_epochs", "cached_views", "class_balance"),
    "optimizer",
}
"""Settings that hardly change the time of an epoch."""
_FROZEN_BY = (
    *("backbone", "weights", "train", "last_stages", "input_size", "crop_scale", "crop_stretch", "flip"),
    *("colour_jitter", "policy", "erasing"),
)
"""Settings that trials must share to share a frozen trunk's features (search.train.inputs)."""

Hyper = CnnHyper | TransferHyper


class NetCost(NamedTuple):
    """Cost of a network, in seconds for an image: from processor time to wall-clock time."""

    train: Range
    """Training: forward, backward and step, from features if they are cached."""
    val: Range
    frozen: Range
    """The frozen part, once for each cached view; 0 if nothing is cached."""


@dataclass(frozen=True)
class TrainingCost:
    """What was measured."""

    nets: dict[str, NetCost]
    """By `net_key`."""
    decode: Range
    """Core-seconds of decoding an image."""
    open_seconds: float
    """Seconds until a new process had imported torch and timm, and decoded its images."""
    load: float
    """Load of the machine for each core before the measurement."""


def net_key(hyper: Hyper) -> str:
    """Make a key of the settings that decide the time of an epoch."""
    values = {name: value for name, value in hyper.model_dump().items() if name not in _DECIDES_NOTHING}
    if isinstance(hyper, TransferHyper):
        values["kept"] = hyper.cached_views > 0 and hyper.train != "all"
    return json.dumps(values, sort_keys=True)


def frozen_key(hyper: Hyper) -> str:
    """Make a key of the settings that decide cached features; empty if none are cached."""
    if not isinstance(hyper, TransferHyper) or not hyper.cached_views or hyper.train == "all":
        return ""
    return json.dumps({name: getattr(hyper, name) for name in _FROZEN_BY}, sort_keys=True)


def measure_training(
    manifest: Manifest,
    settings: TuneSettings,
    hypers: Sequence[Hyper],
    *,
    processes: int,
    cpus: float,
    device: str = "cpu",
) -> TrainingCost:
    """Train each network for a few epochs on a few images, in several processes at once.

    Raises:
        SettingsError: a backbone or its weights are not available.
        DataError: an image cannot be read.
        BudgetError: a process died.
    """
    load, values = load_per_core(), [hyper.model_dump() for hyper in hypers]
    arguments = (manifest.uri, settings.model_dump(mode="json"), values, max(1, int(cpus)), device)
    measured = run_in_parallel(_measure, [arguments] * processes)
    nets = {
        net_key(hyper): NetCost(*(spread(parts) for parts in zip(*(one.nets[i] for one in measured), strict=True)))
        for i, hyper in enumerate(hypers)
    }
    opened = max(one.open_seconds for one in measured)
    return TrainingCost(nets, spread([one.decode for one in measured]), opened, load)


class _Measured(NamedTuple):
    """What one process measured."""

    nets: list[tuple[Pair, Pair, Pair]]
    """Of each network: training, validation, and its frozen part."""
    decode: Pair
    open_seconds: float


def _measure(
    uri: str, settings: Mapping[str, Any], values: Sequence[Mapping[str, Any]], threads: int, device: str
) -> _Measured:
    started = time.monotonic()
    import torch

    from carray.search.train.fit import Fit  # noqa: F401  so that the import is not timed with the first network

    torch.set_num_threads(threads)
    chosen, manifest = parse_settings(TuneSettings, settings), read_manifest(uri)
    block, decode = _small_block(manifest, chosen)
    opened = time.monotonic() - started
    wait_for_others()
    nets = [_measure_net(read_hyper(one), block, chosen, len(manifest.classes), threads, device) for one in values]
    return _Measured(nets, decode, opened)


def _measure_net(
    hyper: Hyper, block: Block, settings: TuneSettings, class_count: int, threads: int, device: str
) -> tuple[Pair, Pair, Pair]:
    """Train three epochs: one to warm up, one with new views of the frozen part, one with cached views."""
    from carray.search.train.fit import Fit

    cached = bool(frozen_key(hyper))
    changes = {"head_only_epochs": 0, "cached_views": 2} if cached else {}
    hyper = hyper.model_copy(update={"compile": False, **changes})
    pixels = settings.trial_pixels(hyper)
    fit = Fit(hyper, block, pixels, class_count=class_count, epochs=3, seed=0, device=device)
    _timed(fit, threads, device)
    first, val = _timed(fit, threads, device)
    if not cached:
        return first, val, Pair(0.0, 0.0)
    train, val = _timed(fit, threads, device)
    frozen = Pair(max(0.0, first.processor - train.processor), max(0.0, first.clock - train.clock))
    return train, val, frozen


def _timed(fit: Any, threads: int, device: str) -> tuple[Pair, Pair]:
    """Run an epoch; returns the seconds of a training and of a validation image."""
    used = time.process_time()
    result = fit.run_epoch()
    used = time.process_time() - used
    trained = 1 / result.images_per_second
    validated = (result.seconds - trained * len(fit.train_rows_N)) / len(fit.val_rows_N)
    busy = min(1.0, used / threads / result.seconds) if device == "cpu" else 1.0
    return Pair(busy * trained, trained), Pair(busy * validated, validated)


def _small_block(manifest: Manifest, settings: TuneSettings) -> tuple[Block, Pair]:
    """Decode some images; returns their block, and the seconds of an image."""
    chosen = [
        row
        for split, most in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES))
        for row in manifest.of_split(split).sample(frac=1.0, random_state=0).head(most).to_dict("records")
    ]
    index = {name: i for i, name in enumerate(manifest.classes)}
    read = partial(require_row, settings=settings.pixels, crop_boxes=manifest.crop_boxes)
    used, started = time.process_time(), time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(read, chosen))
    clock, processor = time.monotonic() - started, time.process_time() - used
    processor = processor if not is_s3(chosen[0]["uri"]) else max(processor, clock / 2)
    block = Block(
        pixels_NHWC=np.stack(found),
        labels_N=np.array([index[row["label"]] for row in chosen], dtype=np.int64),
        splits_N=np.array([SPLITS.index(row["split"]) for row in chosen], dtype=np.int8),
    )
    return block, Pair(processor / len(found), max(processor, clock) / len(found))

"""Rung 0: compares backbones before any trial trains them, by a linear head on their frozen features.

The images are chosen by their row numbers alone, so every candidate sees the same ones. The head's decay is chosen on
the validation images that it is measured on, alike for all: the figure ranks candidates and is no estimate of accuracy.
Source: Kornblith et al., 'Do Better ImageNet Models Transfer Better?', 2019; how well it ranks here: results/LOG.md.
Cost: a forward pass of at most 12 images a class and 2,000 validation images, and seconds for the heads.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.store.files import exists, join, read_json, write_json
from carray.images.pixels import PixelSettings
from carray.search import run_folder
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.tensors.batches import view_batches
from carray.tensors.block import Block

__all__ = [
    "Candidate",
    "Probe",
    "candidate_of",
    "choose_rows",
    "named",
    "order_trials",
    "probe",
    "read_probes",
    "write_probes",
]

TRAIN_IMAGES_PER_CLASS = 12
VAL_IMAGES = 2_000
DECAYS = (30.0, 3.0, 0.3)
"""L2 strengths of the head, on its summed loss and standardised features; each fit starts from the one before."""
_STEPS = 30
_BATCH_IMAGES = 64

Rows = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]
Candidate = tuple[str, str, int]
"""Backbone, weights and input size, on which a frozen backbone's features depend."""


@dataclass(frozen=True)
class Probe:
    """The accuracy of one candidate's frozen features."""

    backbone: str
    weights: str
    input_size: int
    val_top1: float
    """Of the best linear head on them, a fraction in 0..1."""
    seconds: float

    @property
    def candidate(self) -> Candidate:
        """Return the candidate that was probed."""
        return self.backbone, self.weights, self.input_size


def read_probes(run: str) -> list[Probe]:
    """Read a run's probes; none where rung 0 was not run."""
    uri = join(run, run_folder.PROBES)
    return [Probe(**values) for values in read_json(uri)] if exists(uri) else []


def write_probes(run: str, probes: Iterable[Probe]) -> None:
    """Write a run's probes.

    Raises:
        StorageError: storage refused them after every try.
    """
    write_json(join(run, run_folder.PROBES), [asdict(one) for one in probes])


def candidate_of(hyper: CnnHyper | TransferHyper | None) -> Candidate | None:
    """Give a trial's candidate; None for a CNN from scratch, or a trial that is not proposed yet."""
    if not isinstance(hyper, TransferHyper):
        return None
    return hyper.backbone, hyper.weights, hyper.input_size


def probe(candidate: Candidate, block: Block, pixels: PixelSettings, *, class_count: int, device: str = "cpu") -> Probe:
    """Compute a candidate's features once, at its own input size, on `device`, and fit linear heads on them.

    Raises:
        SettingsError: the backbone or its weights are not to be had.
    """
    import torch

    from carray.search.train.nets import build_net

    started = time.monotonic()
    backbone, weights, input_size = candidate
    hyper = TransferHyper(backbone=backbone, weights=weights, input_size=input_size, train="head")
    torch.manual_seed(0)  # a backbone without trained weights starts from random ones, the same each time
    net = build_net(hyper, class_count=class_count).to(device).to(memory_format=torch.channels_last).eval()
    seen = pixels.model_copy(update={"input_size": input_size})
    train_N, val_N = choose_rows(block)
    top1 = _best_head(
        _embed(net, block, train_N, seen),
        block.labels_N[train_N],
        _embed(net, block, val_N, seen),
        block.labels_N[val_N],
    )
    return Probe(backbone, weights, input_size, top1, round(time.monotonic() - started, 2))


def choose_rows(block: Block) -> tuple[Rows, Rows]:
    """Choose the training and the validation rows that every candidate sees, int64, in the block's order."""
    train_N, val_N = block.of_split("train"), block.of_split("val")
    order_N = np.random.default_rng(0).permutation(train_N)
    labels_N = block.labels_N[order_N]
    chosen = [order_N[labels_N == label][:TRAIN_IMAGES_PER_CLASS] for label in np.unique(labels_N)]
    return np.sort(np.concatenate(chosen)), np.sort(np.random.default_rng(1).permutation(val_N)[:VAL_IMAGES])


def _embed(net: Any, block: Block, rows_N: Rows, pixels: PixelSettings) -> Features:
    """Compute the trunk's embedding_ND of evaluation's views, float32."""
    import torch

    from carray.search.train.inputs import forward_precision

    device = net.mean.device
    precision = forward_precision(device)
    parts = []
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for pixels_BHWC, _ in view_batches(block, rows_N, pixels, batch_images=_BATCH_IMAGES):
            images_BCHW = torch.from_numpy(pixels_BHWC).to(device).permute(0, 3, 1, 2).float()
            parts.append(net.trunk(net.normalise(images_BCHW)).float().cpu().numpy())
    return np.concatenate(parts)


def _best_head(train_ND: Features, labels_N: Rows, val_MD: Features, val_labels_M: Rows) -> float:
    """Fit multinomial logistic regressions and give the best one's validation accuracy."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_ND)
    train_ND, val_MD = scaler.transform(train_ND), scaler.transform(val_MD)
    head, best = LogisticRegression(max_iter=_STEPS, warm_start=True), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a few steps rank as well as many
        for decay in DECAYS:
            head.set_params(C=1 / (2 * decay)).fit(train_ND, labels_N)
            best = max(best, float(head.score(val_MD, val_labels_M)))
    return best


def order_trials(
    configurations: Sequence[CnnHyper | TransferHyper | None], probes: Iterable[Probe], *, margin: float
) -> tuple[list[int], dict[int, str]]:
    """Order trial numbers, best candidate first, and give those that are not to be run, with the reason.

    Each family's first trial, its default, comes first and is not dropped. Among the others every family keeps its
    positions, and only the transfer trials are reordered; a candidate that could not be probed comes last.
    """
    value = {one.candidate: one.val_top1 for one in probes}
    best = max(value, key=lambda candidate: (value[candidate], candidate), default=None)
    first = {hyper.family: number for number, hyper in reversed(list(enumerate(configurations))) if hyper}
    early = sorted(first.values())
    others = [number for number in range(len(configurations)) if number not in early]
    dropped: dict[int, str] = {}
    for number in others:
        candidate = candidate_of(configurations[number])
        if best is not None and candidate in value and value[best] - value[candidate] > margin:
            dropped[number] = (
                f"rung 0: a linear head on {named(candidate)} has {value[candidate]:.1%} validation top-1, over "
                f"{margin:.1%} below the {value[best]:.1%} of {named(best)} (search.rung0_margin)"
            )
    left = [number for number in others if number not in dropped]
    moving = {number: candidate for number in left if (candidate := candidate_of(configurations[number]))}
    ranked = iter(sorted(moving, key=lambda number: -value.get(moving[number], -1.0)))
    return early + [next(ranked) if number in moving else number for number in left], dropped


def named(candidate: Candidate) -> str:
    """Name a candidate: 'tf_efficientnet_lite0 at 160 pixels'."""
    backbone, weights, input_size = candidate
    return f"{backbone}{'' if weights == 'auto' else f' ({weights})'} at {input_size} pixels"

"""Mixes the images of a batch with one another, and their labels alike.

From: images, feature maps or embeddings, and labels_B. To: as many mixed inputs, and targets_BK in the same proportion.
Invariants: all that is random comes from the generator, which lies on the CPU; where neither alpha is set, inputs and
labels are given back as they are and nothing is drawn.
Sources: Zhang et al., 'mixup: Beyond Empirical Risk Minimization', 2017, also on hidden layers (Verma et al.,
'Manifold Mixup', 2018); Yun et al., 'CutMix', 2019. torchvision's classes mix each image with its neighbour, which in
our batches, kept in file order, is often of its own class; and they refuse embeddings.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from carray.search.train.hyperparameters import CnnHyper, TransferHyper

__all__ = ["mix", "soft_targets"]


def mix(
    inputs: Tensor, labels_B: Tensor, hyper: CnnHyper | TransferHyper, class_count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix a batch by mixup or CutMix, whichever is on; with both, by one of them at random.

    Args:
        inputs: float images_BCHW, feature maps (square) or embedding_BD; not changed. CutMix pastes a rectangle of
            height and width, so what has none, or has its channels last, is mixed by mixup.
        labels_B: int64.
        hyper: its mixup and cutmix are the alphas of the Beta distribution that the shares come from.
        class_count: K.
        generator: on the CPU.

    Returns:
        The mixed inputs and targets_BK, float32 of sum 1 a row; labels_B itself, int64, where nothing is on.
        Cross-entropy takes either.
    """
    if not hyper.mixup and not hyper.cutmix:
        return inputs, labels_B
    random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    partner_B = torch.randperm(len(inputs), generator=generator)
    cuts = bool(hyper.cutmix) and (not hyper.mixup or random.random() < 0.5)
    alpha = hyper.cutmix if cuts else hyper.mixup
    own_share = float(random.beta(alpha, alpha))
    others = inputs[partner_B.to(inputs.device)]
    if cuts and inputs.ndim == 4 and inputs.shape[2] == inputs.shape[3]:
        mixed, own_share = _paste(inputs, others, own_share, random)
    else:
        mixed = torch.lerp(others, inputs, own_share)
    targets_BK = soft_targets(labels_B, class_count)
    return mixed, torch.lerp(targets_BK[partner_B.to(targets_BK.device)], targets_BK, own_share)


def soft_targets(labels_B: Tensor, class_count: int) -> Tensor:
    """Write labels_B, int64, as targets_BK: float32, 1 at the label and 0 elsewhere."""
    return functional.one_hot(labels_B, class_count).float()


def _paste(
    inputs_BCHW: Tensor, others_BCHW: Tensor, own_share: float, random: np.random.Generator
) -> tuple[Tensor, float]:
    """Paste one rectangle of the others, about a random centre; give what share of the own area is left."""
    height, width = inputs_BCHW.shape[2:]
    side = math.sqrt(1 - own_share)
    top, bottom = _span(side, height, random)
    left, right = _span(side, width, random)
    mixed_BCHW = inputs_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = others_BCHW[:, :, top:bottom, left:right]
    return mixed_BCHW, 1 - (bottom - top) * (right - left) / (height * width)


def _span(side: float, size: int, random: np.random.Generator) -> tuple[int, int]:
    # Its ends are cut off where they leave the image, as in the paper: the middle is not pasted more often.
    length = round(side * size)
    start = int(random.integers(size)) - length // 2
    return max(0, start), min(size, start + length)

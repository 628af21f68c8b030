"""Trains one trial's network on the block, one epoch after another; needs no Ray.

From: a hyper, a block, class count. To: an `EpochResult` an epoch, and the network's weights.
Invariants: the same seed gives the same batches and views; validation sees `pixels.view`; a non-finite loss ends the
epoch at once and says so.
Optimiser: AdamW (Loshchilov & Hutter, 2019) with a one-cycle schedule (Smith & Topin, 2018).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from carray.pixels import PixelSettings
from carray.tensors.batches import train_batches
from carray.tensors.format import Block
from carray.trials.augment import augment
from carray.trials.hyper import CnnHyper, TransferHyper
from carray.trials.nets import Net, build_net, freeze, predict_logits, train_mode

__all__ = ["EpochResult", "Fit"]


@dataclass(frozen=True)
class EpochResult:
    """Says how one epoch ended; losses are mean cross-entropies in nats, accuracies fractions in 0..1."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    val_loss: float
    val_top1: float
    val_top5: float
    learning_rate: float
    seconds: float
    images_per_second: float
    """Trained images a second of training, validation left out."""


class Fit:
    """Holds one trial's network, optimiser and schedule between epochs."""

    def __init__(
        self,
        hyper: CnnHyper | TransferHyper,
        block: Block,
        pixels: PixelSettings,
        *,
        class_count: int,
        epochs: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Build the network and its optimiser.

        Raises:
            SettingsError: the backbone or its weights are not to be had.
        """
        torch.manual_seed(seed)
        self.hyper, self.block, self.pixels, self.seed = hyper, block, pixels, seed
        self.device = torch.device(device)
        self.epoch = 0
        self.net = build_net(hyper, class_count=class_count)
        freeze(self.net, hyper)
        # Convolutions are faster with channels last, on CPUs as on GPUs.
        self.net.to(self.device)
        self.net.to(memory_format=torch.channels_last)
        self.train_rows_N, self.val_rows_N = block.of_split("train"), block.of_split("val")
        self._optimizer = _optimizer(self.net, hyper)
        steps = epochs * max(1, len(self.train_rows_N) // hyper.batch_images + 1)
        self._schedule = torch.optim.lr_scheduler.OneCycleLR(
            self._optimizer,
            [group["lr"] for group in self._optimizer.param_groups],
            total_steps=steps + 1,
            pct_start=0.25,
        )

    def run_epoch(self) -> EpochResult:
        """Train one epoch and validate; a non-finite training loss skips what is left of the epoch."""
        started = time.monotonic()
        self.epoch += 1
        train_loss = self._train()
        trained_seconds = time.monotonic() - started
        loss, top1, top5 = (math.nan, 0.0, 0.0) if not math.isfinite(train_loss) else self._validate()
        return EpochResult(
            epoch=self.epoch,
            train_loss=train_loss,
            val_loss=loss,
            val_top1=top1,
            val_top5=top5,
            learning_rate=float(self._schedule.get_last_lr()[0]),
            seconds=time.monotonic() - started,
            images_per_second=len(self.train_rows_N) / max(trained_seconds, 1e-9),
        )

    def _train(self) -> float:
        train_mode(self.net)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        batches = train_batches(
            self.block, self.train_rows_N, batch_images=self.hyper.batch_images, seed=self.seed, epoch=self.epoch
        )
        total, images = 0.0, 0
        for pixels_BHWC, labels_B in batches:
            images_BCHW = augment(torch.from_numpy(pixels_BHWC).to(self.device), self.hyper, generator)
            loss = self._step(images_BCHW.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels_B))
            if not math.isfinite(loss):
                return loss
            total, images = total + loss * len(labels_B), images + len(labels_B)
        return total / images

    def _step(self, images_BCHW: Tensor, labels_B: Tensor) -> float:
        logits_BK, _ = self.net(images_BCHW)
        loss = functional.cross_entropy(logits_BK, labels_B.to(self.device), label_smoothing=self.hyper.label_smoothing)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        return float(loss.detach())

    def _validate(self) -> tuple[float, float, float]:
        logits_NK = predict_logits(self.net, self.block, self.val_rows_N, self.pixels)
        labels_N = torch.from_numpy(self.block.labels_N[self.val_rows_N])
        loss = float(functional.cross_entropy(torch.from_numpy(logits_NK), labels_N))
        top_N5 = torch.from_numpy(logits_NK).topk(min(5, logits_NK.shape[1]), dim=1).indices
        hits_N5 = top_N5 == labels_N[:, None]
        return loss, float(hits_N5[:, 0].double().mean()), float(hits_N5.any(dim=1).double().mean())


def _optimizer(net: Net, hyper: CnnHyper | TransferHyper) -> torch.optim.Optimizer:
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": hyper.head_learning_rate if is_head else hyper.learning_rate,
                "weight_decay": hyper.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in groups.items()
        ]
    )

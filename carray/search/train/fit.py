"""Trains one trial's network on the block, one epoch after another; needs no Ray.

From: a hyper, a block, a class count. To: an `EpochResult` an epoch, the network's weights, and checkpoints.
Invariants: everything random derives from (seed, epoch), so an epoch that is run again, from a checkpoint too, gives
the same figures; validation sees `pixels.view`; a loss that is not finite ends the epoch and says so; a step takes
batch_images whatever memory allows at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from carray.core.errors import SettingsError
from carray.images.pixels import PixelSettings
from carray.search.train.batches import choose_source
from carray.search.train.checkpoint import optimizer_state, pack, restore_optimizer, unpack
from carray.search.train.features import forward_precision
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.mixing import mix
from carray.search.train.nets import build_net, freeze, layer_groups, learning_text, train_mode
from carray.search.train.optimise import Ema, build_optimizer, class_weights, set_rates
from carray.tensors.block import Block

__all__ = ["EpochResult", "Fit"]

_STEPS_BETWEEN_LOOKS = 16
"""A look at the loss waits for the device; a diverged network loses nothing by some more steps."""


@dataclass(frozen=True)
class EpochResult:
    """Says how one epoch ended; losses are mean cross-entropies in nats, accuracies fractions in 0..1."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    val_loss: float
    """nan, as the accuracies, where the training has taken the validation images, too."""
    val_top1: float
    val_top5: float
    learning_rate: float
    """Of the last stage, at the epoch's end."""
    seconds: float
    images_per_second: float
    """Trained images a second of training, validation left out."""
    note: str | None = None
    """What a reader of the log should know: in the first epoch how much of a backbone learns; a halved micro-batch."""


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
        splits: Sequence[str] = ("train",),
    ) -> None:
        """Build the network and its optimiser.

        Raises:
            SettingsError: the backbone or its weights are not to be had.
        """
        torch.manual_seed(seed)
        self.hyper, self.block, self.pixels, self.seed, self.epochs = hyper, block, pixels, seed, epochs
        self.class_count, self.device = class_count, torch.device(device)
        self.history: list[EpochResult] = []
        self.net = build_net(hyper, class_count=class_count)
        freeze(self.net, hyper)
        # Convolutions are faster with channels last, on CPUs as on GPUs.
        self.net.to(self.device)
        self.net.to(memory_format=torch.channels_last)
        self.train_rows_N = np.sort(np.concatenate([block.of_split(split) for split in splits]))
        self.val_rows_N = block.of_split("val") if "val" not in splits else np.empty(0, dtype=np.int64)
        self._source = choose_source(self.net, hyper, block, pixels, rows_N=self.train_rows_N, epochs=epochs, seed=seed)
        self._embed = torch.compile(self._source.upper) if hyper.compile else self._source.upper
        self._optimizer = build_optimizer(self.net, hyper, layer_groups(self.net.trunk))
        self._ema = Ema(self.net, hyper.ema) if hyper.ema else None
        self._class_weights = None
        if hyper.class_balance == "weights":
            self._class_weights = class_weights(block.labels_N[self.train_rows_N], class_count).to(self.device)
        self._steps_an_epoch = max(1, math.ceil(len(self.train_rows_N) / hyper.batch_images))
        self._micro_batch_images = hyper.micro_batch_images or hyper.batch_images
        self._learning = learning_text(self.net, hyper) if isinstance(hyper, TransferHyper) else None
        self._note: str | None = None

    @property
    def epoch(self) -> int:
        """Give the number of epochs done."""
        return len(self.history)

    def run_epoch(self) -> EpochResult:
        """Train one epoch and validate; a non-finite training loss skips what is left of the epoch.

        Raises:
            SettingsError: not even two images fit into the device's memory.
        """
        started = time.monotonic()
        epoch = self.epoch + 1
        torch.manual_seed(self.seed * 100_003 + epoch)  # dropout and drop path draw from the global generator
        train_loss = self._train(epoch)
        trained_seconds = time.monotonic() - started
        skipped = not math.isfinite(train_loss)
        loss, top1, top5 = (math.nan, 0.0, 0.0) if skipped else self._validate()
        result = EpochResult(
            epoch=epoch,
            train_loss=train_loss,
            val_loss=loss,
            val_top1=top1,
            val_top5=top5,
            learning_rate=max(float(group["lr"]) for group in self._optimizer.param_groups),
            seconds=time.monotonic() - started,
            images_per_second=len(self.train_rows_N) / max(trained_seconds, 1e-9),
            note="; ".join(filter(None, [self._learning, self._note])) or None,
        )
        self._learning = self._note = None
        self.history.append(result)
        return result

    def weights(self) -> dict[str, Tensor]:
        """Give the tensors that a bundle would hold, on the CPU: the running mean's where there is one."""
        with self._averaged():
            return {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}

    def checkpoint(self) -> bytes:
        """Pack all that the next epoch depends on, as safetensors."""
        note = {"history": [asdict(result) for result in self.history], "micro_batch": self._micro_batch_images}
        return pack({**self._known_parts(), "optimizer": optimizer_state(self._optimizer)}, note)

    def restore(self, data: bytes) -> None:
        """Continue where a checkpoint of the same configuration stands.

        Raises:
            SettingsError: it is cut short, or of another network; nothing is changed then.
        """
        parts, note = unpack(data, self._known_parts())
        self.net.load_state_dict(parts["net"])
        if self._ema is not None:
            self._ema.load(parts["ema"])
        restore_optimizer(self._optimizer, parts.get("optimizer", {}))
        self.history = [EpochResult(**values) for values in note["history"]]
        self._micro_batch_images, self._learning = note["micro_batch"], None

    def _known_parts(self) -> dict[str, dict[str, Tensor]]:
        ema = {} if self._ema is None else {"ema": self._ema.state()}
        return {"net": dict(self.net.state_dict()), **ema}

    def _train(self, epoch: int) -> float:
        head_only = isinstance(self.hyper, TransferHyper) and epoch <= self.hyper.head_only_epochs
        freeze(self.net, self.hyper, head_only=head_only)
        train_mode(self.net)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        total, images = torch.zeros((), device=self.device), 0
        for number, (inputs, labels_B) in enumerate(self._source.batches(epoch, generator)):
            step = (epoch - 1) * self._steps_an_epoch + number
            set_rates(self._optimizer, self.hyper, step, self.epochs * self._steps_an_epoch)
            mixed, targets = mix(inputs, labels_B, self.hyper, self.class_count, generator)
            total += self._step(mixed, targets) * len(labels_B)
            images += len(labels_B)
            if number % _STEPS_BETWEEN_LOOKS == 0 and not bool(torch.isfinite(total)):
                break
        return float(total) / images

    def _step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Change the weights by one batch's gradient; halves what passes at once where memory ends."""
        while True:
            try:
                self._optimizer.zero_grad(set_to_none=True)
                loss = self._gradients(inputs, targets)
                break
            except RuntimeError as err:  # torch's OutOfMemoryError is one
                if not _out_of_memory(err):
                    raise
                self._halve(len(inputs))
        if self.hyper.clip_norm:
            torch.nn.utils.clip_grad_norm_(
                [p for group in self._optimizer.param_groups for p in group["params"]], self.hyper.clip_norm
            )
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update(self.net)
        return loss

    def _gradients(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add up the gradients of a batch's parts; gives the batch's mean loss."""
        total = torch.zeros((), device=self.device)
        for start, stop in _parts(len(inputs), self._micro_batch_images):
            with self._autocast():
                logits_BK = self.net.head(self.net.dropout(self._embed(inputs[start:stop])))
            loss = functional.cross_entropy(
                logits_BK.float(),
                targets[start:stop],
                weight=self._class_weights,
                label_smoothing=self.hyper.label_smoothing,
                reduction="sum",
            ) / len(inputs)
            loss.backward()
            total += loss.detach()
        return total

    def _halve(self, batch_images: int) -> None:
        smaller = min(self._micro_batch_images, batch_images) // 2
        if smaller < 2:
            raise SettingsError(
                f"not even {2 * smaller or 2} images fit into the memory of {self.device}; lower input_size, or take "
                "a smaller network."
            ) from None
        self._micro_batch_images = smaller
        self._note = f"out of memory: micro-batch halved to {smaller}, batch stays {self.hyper.batch_images}"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _autocast(self) -> Any:
        wanted = self.hyper.precision
        if wanted == "auto":
            fast = forward_precision(self.device) == torch.bfloat16
            # On a CPU plain convolutions learn faster so, depthwise ones, of which most backbones consist, slower.
            pays = self.device.type == "cuda" or isinstance(self.hyper, CnnHyper)
            wanted = "bf16" if fast and pays else "fp32"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted == "bf16")

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._ema is None:
            yield
        else:
            with self._ema.in_place_of(self.net):
                yield

    def _validate(self) -> tuple[float, float, float]:
        if not len(self.val_rows_N):
            return math.nan, math.nan, math.nan
        with self._averaged():
            logits_NK = torch.from_numpy(self._source.validation_logits(self.val_rows_N))
        labels_N = torch.from_numpy(self.block.labels_N[self.val_rows_N])
        loss = float(functional.cross_entropy(logits_NK, labels_N))
        top_N5 = logits_NK.topk(min(5, logits_NK.shape[1]), dim=1).indices
        hits_N5 = top_N5 == labels_N[:, None]
        return loss, float(hits_N5[:, 0].double().mean()), float(hits_N5.any(dim=1).double().mean())


def _parts(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut a batch; a last part of one image joins the one before, since batch normalisation cannot train on one."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return zip(starts, [*starts[1:], count], strict=True)


def _out_of_memory(err: RuntimeError) -> bool:
    text = str(err).lower()
    return isinstance(err, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text

"""Trains one trial's network, one epoch after another: optimiser, rates, running mean of the weights, checkpoints.

All randomness derives from (seed, epoch) and rates depend on the step alone, so an epoch that is run again, from a
checkpoint too, gives the same figures. A loss that is not finite ends the epoch. Needs no Ray.
Sources: AdamW, Loshchilov & Hutter, 'Decoupled Weight Decay Regularization', 2019; the cycle of rate and momentum,
Smith & Topin, 'Super-Convergence', 2018; rates by layer, Howard & Ruder, 'Universal Language Model Fine-tuning', 2018.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from carray.core.errors import SettingsError
from carray.images.pixels import PixelSettings
from carray.search.train.augment import mix
from carray.search.train.checkpoint import optimizer_state, pack, restore_optimizer, unpack
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.inputs import choose_source, forward_precision
from carray.search.train.nets import Net, build_net, freeze, layer_groups, learning_text, train_mode
from carray.tensors.block import Block

__all__ = ["Ema", "EpochResult", "Fit", "build_optimizer", "class_weights", "momentum_at", "rate_factor", "set_rates"]

_FIRST_FACTOR, _LAST_FACTOR = 1 / 25, 1e-4
"""Fractions of the peak rate, at the first step of the warm-up and at the end."""
_HIGH_BETA1, _LOW_BETA1 = 0.95, 0.85
"""AdamW's beta1 where rates are lowest, and at their peak."""


def build_optimizer(
    net: Net, hyper: CnnHyper | TransferHyper, groups_of_layers: Sequence[Sequence[str]]
) -> torch.optim.Optimizer:
    """Build the optimiser, each of its groups with its rate's peak as `peak_rate`.

    Args:
        net: on its device. Every parameter that will ever learn requires a gradient now; it may be frozen for a time
            afterwards, since torch skips a parameter without a gradient.
        hyper: the head peaks at head_learning_rate, the last layers at learning_rate, and each group before them at
            layer_decay of the next one's.
        groups_of_layers: names of the trunk's parameters, from the stem on; the others belong to the last group.
    """
    last = len(groups_of_layers) - 1
    distances = {f"trunk.{name}": last - i for i, names in enumerate(groups_of_layers) for name in names}
    spared = {f"trunk.{name}" for name in getattr(net.trunk, "no_weight_decay", set)()}  # timm's position embeddings
    layer_decay = hyper.layer_decay if isinstance(hyper, TransferHyper) else 1.0
    # Grouped by layer, not by rate, so that the order, by which a checkpoint counts, is the same for other rates.
    groups: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            distance = None if name.startswith("head.") else distances.get(name, 0)
            groups.setdefault((distance, parameter.ndim > 1 and name not in spared), []).append(parameter)
    described = []
    for (distance, decays), parameters in groups.items():
        rate = hyper.head_learning_rate if distance is None else hyper.learning_rate * layer_decay**distance
        decay = hyper.weight_decay if decays else 0.0
        described.append({"params": parameters, "lr": rate, "peak_rate": rate, "weight_decay": decay})
    if hyper.optimizer == "sgd":
        # torch refuses Nesterov's correction without momentum.
        return torch.optim.SGD(described, momentum=hyper.momentum, nesterov=hyper.momentum > 0, fused=True)
    return torch.optim.AdamW(described, fused=True)


def rate_factor(step: int, steps: int, hyper: CnnHyper | TransferHyper) -> float:
    """Give the fraction of the peak rate at a step, counted from 0, of `steps`.

    Along a cosine it rises from 1/25 to 1 over the first warmup_fraction of the steps, then falls to 1e-4.
    """
    floor = _FIRST_FACTOR if step < hyper.warmup_fraction * steps else _LAST_FACTOR
    return floor + (1 - floor) * _height(step, steps, hyper)


def momentum_at(step: int, steps: int, hyper: CnnHyper | TransferHyper) -> float:
    """Give the momentum at a step: AdamW's beta1 falls from 0.95 to 0.85 as rates rise, and back; SGD's stays."""
    if hyper.optimizer == "sgd":
        return hyper.momentum
    return _HIGH_BETA1 + (_LOW_BETA1 - _HIGH_BETA1) * _height(step, steps, hyper)


def _height(step: int, steps: int, hyper: CnnHyper | TransferHyper) -> float:
    """Give the height of the cycle of rate and momentum: 0 at either end, 1 at the peak."""
    warmup = hyper.warmup_fraction * steps
    if step < warmup:
        return (1 - math.cos(math.pi * step / warmup)) / 2
    fallen = min(1.0, (step - warmup) / max(steps - warmup, 1e-9))
    return (1 + math.cos(math.pi * fallen)) / 2


def set_rates(optimizer: torch.optim.Optimizer, hyper: CnnHyper | TransferHyper, step: int, steps: int) -> None:
    """Set each group's rate and momentum for a step, counted from 0, of `steps`."""
    factor, momentum = rate_factor(step, steps, hyper), momentum_at(step, steps, hyper)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * factor
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def class_weights(labels_N: npt.NDArray[np.int64], class_count: int) -> Tensor:
    """Weigh classes for the loss, float32 (K,), so that each that occurs has the same share of it.

    An image weighs 1 on average, so the loss keeps its scale. A class that does not occur weighs 1.
    """
    counts_K = np.bincount(labels_N, minlength=class_count)
    fair = len(labels_N) / max(1, int((counts_K > 0).sum()))
    return torch.from_numpy(np.where(counts_K > 0, fair / np.maximum(counts_K, 1), 1.0).astype(np.float32))


class Ema:
    """A running mean of a network's weights, which often scores better than the last ones.

    All floats of its state are averaged, including normalisation statistics; integers are copied. The decay starts
    low, as min(decay, (1 + t) / (10 + t)) after t updates, so that the random start is soon forgotten.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._means = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Average in the network's present state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = net.state_dict()
        averaged = [name for name, mean in self._means.items() if mean.is_floating_point()]
        torch._foreach_lerp_([self._means[name] for name in averaged], [state[name] for name in averaged], 1 - decay)
        for name in self._means.keys() - set(averaged):
            self._means[name].copy_(state[name])

    @contextmanager
    def in_place_of(self, net: nn.Module) -> Iterator[None]:
        """Load the means into a network while the context lasts, then its own state again."""
        own = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(self._means)
        try:
            yield
        finally:
            net.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """Give the state for `load`: the means, which share their memory, and `updates`, int64."""
        return {**self._means, "updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the state of an `Ema` of the same network."""
        self.updates = int(state["updates"])
        for name, mean in self._means.items():
            mean.copy_(state[name])


_STEPS_BETWEEN_LOOKS = 16
"""Steps between looks at the loss, each of which waits for the device."""


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch; losses are mean cross-entropies in nats, accuracies fractions in 0..1."""

    epoch: int
    """Counted from 1."""
    train_loss: float
    val_loss: float
    """nan, as the accuracies, where validation images are trained on, too."""
    val_top1: float
    val_top5: float
    learning_rate: float
    """The largest of all layers', at the epoch's end."""
    seconds: float
    images_per_second: float
    """Of training, without validation."""
    note: str | None = None
    """How much of a backbone learns (first epoch only); a halved micro-batch."""

    def log_entry(self, number: int, family: str) -> dict[str, Any]:
        """Give the figures of this epoch of a trial for the log, with None for what is not finite."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in vars(self).items()}
        return {**values, "number": number, "family": family}


class Fit:
    """One trial's network, optimiser and schedule."""

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
            SettingsError: the backbone or its weights cannot be found.
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
        """Return the number of epochs done."""
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
        """Give the tensors for a bundle, on the CPU: the running mean's where there is one."""
        with self._averaged():
            return {name: value.detach().cpu().clone() for name, value in self.net.state_dict().items()}

    def checkpoint(self) -> bytes:
        """Pack all that the next epoch depends on, as safetensors."""
        note = {"history": [asdict(result) for result in self.history], "micro_batch": self._micro_batch_images}
        return pack({**self._known_parts(), "optimizer": optimizer_state(self._optimizer)}, note)

    def restore(self, data: bytes) -> None:
        """Load a checkpoint of the same configuration.

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
        """Take one optimiser step, halving the micro-batch where memory runs out; gives the batch's mean loss."""
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
        """Accumulate the gradients of a batch's micro-batches; gives the batch's mean loss."""
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
            # On a CPU bf16 makes plain convolutions faster, and depthwise ones, as in most backbones, slower.
            pays = self.device.type == "cuda" or isinstance(self.hyper, CnnHyper)
            wanted = "bf16" if fast and pays else "fp32"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted == "bf16")

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ema is None else self._ema.in_place_of(self.net)

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
    """Split a batch; a single last image joins the part before, since batch normalisation cannot train on one."""
    starts = list(range(0, count, size))
    if len(starts) > 1 and count - starts[-1] == 1:
        starts.pop()
    return zip(starts, [*starts[1:], count], strict=True)


def _out_of_memory(err: RuntimeError) -> bool:
    text = str(err).lower()
    return isinstance(err, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text

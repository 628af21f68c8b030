"""Sets up how weights are changed: the optimiser's groups, its rates by step, the running mean of the weights.

From: a network and its hyper. To: an optimiser; pure functions of the step; an `Ema`.
Invariants: rates and momenta depend on the step alone, so a resumed trial needs no scheduler's state.
Sources: AdamW, Loshchilov & Hutter, 'Decoupled Weight Decay Regularization', 2019; the cycle of rate and momentum,
Smith & Topin, 'Super-Convergence', 2018; rates by layer, Howard & Ruder, 'Universal Language Model Fine-tuning', 2018.
Cost: torch's fused kernels take a step of AdamW in 1.5 ms where the loop over tensors takes 9.3 ms (one core, the
default CNN of 2.0 million weights), and in 5.1 ms for 15.5 ms (EfficientNet-Lite0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from carray.core.errors import SettingsError
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import Net

__all__ = ["Ema", "build_optimizer", "class_weights", "momentum_at", "rate_factor", "set_rates"]

_FIRST_FACTOR, _LAST_FACTOR = 1 / 25, 1e-4
"""Of the peak rate, at the first step of the warm-up and at the end."""
_HIGH_BETA1, _LOW_BETA1 = 0.95, 0.85
"""AdamW's first moment where rates are lowest, and at their peak."""


def build_optimizer(
    net: Net, hyper: CnnHyper | TransferHyper, groups_of_layers: Sequence[Sequence[str]]
) -> torch.optim.Optimizer:
    """Build the optimiser, each of its groups with its rate's peak as `peak_rate`.

    Args:
        net: on the device where it will learn. All that will ever learn requires a gradient now; it may be frozen
            afterwards and freed again, since torch leaves a parameter without a gradient alone.
        hyper: the head peaks at head_learning_rate, the last layers at learning_rate, and each group before them at
            layer_decay of the next one's.
        groups_of_layers: names of the trunk's parameters, from the stem on; what stands in none counts as the last.
    """
    last = len(groups_of_layers) - 1
    distances = {f"trunk.{name}": last - i for i, names in enumerate(groups_of_layers) for name in names}
    spared = {f"trunk.{name}" for name in getattr(net.trunk, "no_weight_decay", set)()}  # timm's position embeddings
    layer_decay = hyper.layer_decay if isinstance(hyper, TransferHyper) else 1.0
    # Grouped by place and not by rate: their order, which a checkpoint counts by, is then the same for other rates.
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
        # Nesterov's correction of no momentum is none, and torch refuses it.
        return torch.optim.SGD(described, momentum=hyper.momentum, nesterov=hyper.momentum > 0, fused=True)
    return torch.optim.AdamW(described, fused=True)


def rate_factor(step: int, steps: int, hyper: CnnHyper | TransferHyper) -> float:
    """Give the share of its peak that every rate has at a step, counted from 0, of `steps`.

    Along a cosine it rises from 1/25 to 1 over the first warmup_fraction of the steps, then falls to 1e-4.
    """
    height, rises = _height(step, steps, hyper.warmup_fraction)
    floor = _FIRST_FACTOR if rises else _LAST_FACTOR
    return floor + (1 - floor) * height


def momentum_at(step: int, steps: int, hyper: CnnHyper | TransferHyper) -> float:
    """Give the momentum at a step: AdamW's beta1 falls from 0.95 to 0.85 as rates rise, and back; SGD's stays."""
    if hyper.optimizer == "sgd":
        return hyper.momentum
    height, _ = _height(step, steps, hyper.warmup_fraction)
    return _HIGH_BETA1 + (_LOW_BETA1 - _HIGH_BETA1) * height


def _height(step: int, steps: int, warmup_fraction: float) -> tuple[float, bool]:
    """Give a point of the cycle as 0 (either end) to 1 (the peak), and whether it still rises."""
    warmup = warmup_fraction * steps
    if step < warmup:
        return (1 - math.cos(math.pi * step / warmup)) / 2, True
    fallen = min(1.0, (step - warmup) / max(steps - warmup, 1e-9))
    return (1 + math.cos(math.pi * fallen)) / 2, False


def set_rates(optimizer: torch.optim.Optimizer, hyper: CnnHyper | TransferHyper, step: int, steps: int) -> None:
    """Set each group's rate and momentum to what they are at a step, counted from 0, of `steps`."""
    factor, momentum = rate_factor(step, steps, hyper), momentum_at(step, steps, hyper)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_rate"] * factor
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def class_weights(labels_N: npt.NDArray[np.int64], class_count: int) -> Tensor:
    """Weigh classes for the loss, float32 (K,): each that occurs bears the same share of it.

    An image weighs 1 on average, so the loss keeps its scale, also with soft targets, where cross-entropy divides by
    the images and not by their weights. A class that does not occur weighs 1.
    """
    counts_K = np.bincount(labels_N, minlength=class_count)
    fair = len(labels_N) / max(1, int((counts_K > 0).sum()))
    return torch.from_numpy(np.where(counts_K > 0, fair / np.maximum(counts_K, 1), 1.0).astype(np.float32))


class Ema:
    """Keeps a running mean of a network's weights, which often scores better than the last ones.

    All floats of its state are averaged, normalisation's statistics with the weights that they belong to; integers
    are copied. The decay starts low, as min(decay, (1 + t) / (10 + t)) after t updates, so that the random start is
    soon forgotten. What `state` gives shares its memory.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._means = {name: value.detach().clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Take in the network's present state."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        state = net.state_dict()
        averaged = [name for name, mean in self._means.items() if mean.is_floating_point()]
        torch._foreach_lerp_([self._means[name] for name in averaged], [state[name] for name in averaged], 1 - decay)
        for name in self._means.keys() - set(averaged):
            self._means[name].copy_(state[name])

    @contextmanager
    def in_place_of(self, net: nn.Module) -> Iterator[None]:
        """Let a network have the means for as long as the context lasts, then its own state again, as it was before."""
        own = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(self._means)
        try:
            yield
        finally:
            net.load_state_dict(own)

    def state(self) -> dict[str, Tensor]:
        """Give what `load` needs: the means, and `updates`, int64."""
        return {**self._means, "updates": torch.tensor(self.updates)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from another one's state, whose tensors are copied.

        Raises:
            SettingsError: it is of another network.
        """
        shapes = {name: value.shape for name, value in self.state().items()}
        if {name: value.shape for name, value in state.items()} != shapes:
            differing = sorted(
                name
                for name in shapes.keys() | state.keys()
                if name not in state or shapes.get(name) != state[name].shape
            )
            raise SettingsError(
                f"the running mean of the weights is of another network ({len(differing)} tensors differ, the first is "
                f"{differing[0]}); start the trial anew."
            )
        self.updates = int(state["updates"])
        for name, mean in self._means.items():
            mean.copy_(state[name])

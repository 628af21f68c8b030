"""Optimising: rates by layer, step and class are what the papers say, and the running mean is a running mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from carray.search.train.checkpoint import optimizer_state, restore_optimizer
from carray.search.train.fit import Ema, build_optimizer, class_weights, momentum_at, rate_factor, set_rates
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import Net, build_net, freeze, layer_groups

CNN = CnnHyper(input_size=16, stages=2, width=4, warmup_fraction=0.25)
SMALL = TransferHyper(
    backbone="mobilenetv3_small_050", weights="none", input_size=32, train="all", layer_decay=0.5, learning_rate=0.01
)


def named_groups(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, float]]:
    """Give each learnt parameter's group by its name."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_rates_shrink_group_by_group_from_the_head_down() -> None:
    net = build_net(SMALL, class_count=3)
    parts = layer_groups(net.trunk)
    groups = named_groups(net, build_optimizer(net, SMALL, parts))
    assert groups.keys() == dict(net.named_parameters()).keys()
    for distance, names in enumerate(reversed(parts)):
        assert {groups[f"trunk.{name}"]["peak_rate"] for name in names} == {0.01 * 0.5**distance}
    assert len(parts) > 3
    assert groups["head.weight"]["peak_rate"] == SMALL.head_learning_rate


def test_parameters_keep_their_order_whatever_the_rates() -> None:
    """A checkpoint counts parameters; one that was written at other rates fits, too."""
    net = build_net(SMALL, class_count=3)
    other = SMALL.model_copy(update={"layer_decay": 1.0, "head_learning_rate": 0.01, "weight_decay": 0.0})
    orders = [list(named_groups(net, build_optimizer(net, hyper, layer_groups(net.trunk)))) for hyper in (SMALL, other)]
    assert orders[0] == orders[1]


def test_weights_decay_and_biases_and_normalisation_do_not() -> None:
    net = build_net(SMALL, class_count=3)
    groups = named_groups(net, build_optimizer(net, SMALL, layer_groups(net.trunk)))
    assert groups["head.weight"]["weight_decay"] == groups["trunk.conv_stem.weight"]["weight_decay"] == 0.02
    for name in ("head.bias", "trunk.bn1.weight", "trunk.bn1.bias"):
        assert groups[name]["weight_decay"] == 0


def test_position_embeddings_do_not_decay() -> None:
    hyper = SMALL.model_copy(update={"backbone": "vit_tiny_patch16_224", "input_size": 224})
    net = build_net(hyper, class_count=3)
    groups = named_groups(net, build_optimizer(net, hyper, layer_groups(net.trunk)))
    assert groups["trunk.pos_embed"]["weight_decay"] == groups["trunk.cls_token"]["weight_decay"] == 0
    assert groups["trunk.patch_embed.proj.weight"]["weight_decay"] == 0.02


def test_without_stages_all_of_the_trunk_learns_at_one_rate() -> None:
    net = build_net(CNN, class_count=3)
    groups = named_groups(net, build_optimizer(net, CNN, []))
    assert {group["peak_rate"] for name, group in groups.items() if "trunk" in name} == {CNN.learning_rate}
    assert len(groups) == len(list(net.parameters()))


def test_what_is_frozen_at_first_learns_once_it_is_free() -> None:
    """Head-only epochs: the trunk stands in the optimiser, and neither gradient nor weight decay moves it."""
    net = build_net(SMALL, class_count=3).train()
    freeze(net, SMALL)
    optimizer = build_optimizer(net, SMALL, layer_groups(net.trunk))
    stem = net.trunk.get_parameter("conv_stem.weight")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        net(torch.rand(4, 3, 32, 32) * 255)[0].square().sum().backward()
        optimizer.step()

    freeze(net, SMALL, head_only=True)
    before, head = stem.detach().clone(), net.head.weight.detach().clone()
    step()
    assert torch.equal(stem, before)
    assert not torch.equal(net.head.weight, head)
    freeze(net, SMALL)
    step()
    assert not torch.equal(stem, before)


def test_sgd_is_nesterovs_and_keeps_its_momentum() -> None:
    net = build_net(CNN, class_count=3)
    for momentum in (0.9, 0.0):
        hyper = CNN.model_copy(update={"optimizer": "sgd", "momentum": momentum})
        optimizer = build_optimizer(net, hyper, [])
        assert isinstance(optimizer, torch.optim.SGD)
        set_rates(optimizer, hyper, 25, 100)
        assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {
            (momentum, momentum > 0)
        }
        assert {group["lr"] for group in optimizer.param_groups} == {CNN.learning_rate, CNN.head_learning_rate}


def test_rates_at_the_steps_that_matter() -> None:
    assert rate_factor(0, 100, CNN) == pytest.approx(1 / 25)
    assert rate_factor(25, 100, CNN) == 1
    assert rate_factor(100, 100, CNN) == pytest.approx(1e-4)
    assert rate_factor(500, 100, CNN) == pytest.approx(1e-4)
    halfway = 1e-4 + (1 - 1e-4) / 2
    assert rate_factor(62, 100, CNN) > halfway > rate_factor(63, 100, CNN)
    assert rate_factor(0, 100, CNN.model_copy(update={"warmup_fraction": 0.0})) == 1
    assert all(math.isfinite(rate_factor(step, 1, CNN)) for step in range(3))


@pytest.mark.parametrize("warmup_fraction", [0.1, 0.25, 0.5])
def test_rates_and_momenta_are_those_of_torchs_one_cycle(warmup_fraction: float) -> None:
    steps, hyper = 40, CNN.model_copy(update={"warmup_fraction": warmup_fraction})
    net = build_net(hyper, class_count=3)
    ours, theirs = build_optimizer(net, hyper, []), build_optimizer(net, hyper, [])
    # torch counts the peak from one step earlier, and its end is a step that is taken.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        theirs,
        [group["peak_rate"] for group in theirs.param_groups],
        total_steps=steps + 1,
        pct_start=(warmup_fraction * steps + 1) / (steps + 1),
        div_factor=25,
        final_div_factor=1e4 / 25,
    )
    for step in range(steps):
        set_rates(ours, hyper, step, steps)
        for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
            assert a["lr"] == pytest.approx(b["lr"])
            assert a["betas"] == pytest.approx(b["betas"])
        theirs.step()
        schedule.step()


def test_momentum_falls_as_the_rate_rises() -> None:
    assert [round(momentum_at(step, 100, CNN), 6) for step in (0, 25, 100)] == [0.95, 0.85, 0.95]
    sgd = CNN.model_copy(update={"optimizer": "sgd", "momentum": 0.7})
    assert {momentum_at(step, 100, sgd) for step in range(101)} == {0.7}


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_restored_optimiser_goes_on_as_if_never_stopped(kind: str) -> None:
    """With channels last, as a file's tensors lie otherwise in memory and fused kernels go through it in its order."""
    hyper = CNN.model_copy(update={"optimizer": kind, "dropout": 0.0})

    def start() -> tuple[Net, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = build_net(hyper, class_count=3).to(memory_format=torch.channels_last)
        return net, build_optimizer(net, hyper, [])

    def step(net: Net, optimizer: torch.optim.Optimizer, number: int) -> None:
        images_BCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(number)) * 255
        optimizer.zero_grad()
        set_rates(optimizer, hyper, number, 4)
        net(images_BCHW.contiguous(memory_format=torch.channels_last))[0].square().sum().backward()
        optimizer.step()

    whole, first = start(), start()
    for number in range(4):
        step(*whole, number)
    for number in range(2):
        step(*first, number)
    saved = {name: value.contiguous().clone() for name, value in optimizer_state(first[1]).items()}
    second = start()
    second[0].load_state_dict(first[0].state_dict())
    restore_optimizer(second[1], saved)
    for number in range(2, 4):
        step(*second, number)
    for name, value in whole[0].state_dict().items():
        assert torch.allclose(value, second[0].state_dict()[name], rtol=1e-5, atol=1e-6), name


def test_classes_bear_equal_shares_of_the_loss_and_images_weigh_one_on_average() -> None:
    labels_N = np.array([0] * 6 + [1] * 3 + [3] * 1)
    weights_K = class_weights(labels_N, 5)
    assert weights_K.dtype == torch.float32
    assert torch.allclose(weights_K, torch.tensor([10 / 18, 10 / 9, 1.0, 10 / 3, 1.0]))
    assert weights_K[torch.from_numpy(labels_N)].mean() == pytest.approx(1)
    logits_NK = torch.zeros(10, 5)
    losses_N = functional.cross_entropy(logits_NK, torch.from_numpy(labels_N), weight=weights_K, reduction="none")
    assert losses_N[:6].sum() == pytest.approx(float(losses_N[6:9].sum())) == pytest.approx(float(losses_N[9:].sum()))


class Pair(nn.Module):
    """Holds a weight, statistics, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.norm = nn.BatchNorm1d(1)

    def set(self, value: float) -> None:
        with torch.no_grad():
            for tensor in self.state_dict().values():
                tensor.fill_(value)


def test_ema_is_what_it_is_by_hand() -> None:
    net = Pair()
    net.set(0)
    ema = Ema(net, decay=0.15)
    mean = 0.0
    for updates, value in enumerate([1.0, 4.0, -2.0, 3.0]):
        net.set(value)
        ema.update(net)
        decay = [0.1, 0.15, 0.15, 0.15][updates]  # (1 + 0) / (10 + 0), then (1 + 1) / (10 + 1) = 0.18 and more
        mean = decay * mean + (1 - decay) * value
        for name, tensor in ema.state().items():
            if tensor.is_floating_point():
                assert torch.allclose(tensor, torch.full_like(tensor, mean)), name
    assert ema.state()["norm.num_batches_tracked"] == 3
    assert ema.state()["updates"] == 4


def test_a_slow_ema_starts_fast() -> None:
    net = Pair()
    net.set(0)
    ema = Ema(net, decay=0.9999)
    net.set(1)
    for _ in range(10):
        ema.update(net)
    # Between t = 0 and 9 the decays multiply to (1/10)(2/11)...(10/19).
    left = math.prod((1 + t) / (10 + t) for t in range(10))
    assert torch.allclose(ema.state()["weight"], torch.full((3,), 1 - left))


def test_ema_stands_in_for_the_network_and_steps_back() -> None:
    net = Pair()
    net.set(0)
    ema = Ema(net, decay=0.5)
    net.set(1)
    ema.update(net)
    with pytest.raises(RuntimeError, match="in the middle"), ema.in_place_of(net):
        assert torch.allclose(net.weight, torch.full((3,), 0.9))
        assert torch.allclose(net.norm.running_mean, torch.full((1,), 0.9))
        raise RuntimeError("in the middle")
    assert torch.equal(net.weight, torch.ones(3))
    assert torch.equal(net.norm.running_mean, torch.ones(1))
    assert net.weight.requires_grad


def test_a_restored_ema_goes_on_as_if_never_stopped() -> None:
    net = Pair()
    net.set(0)
    whole, first, second = Ema(net, 0.9), Ema(net, 0.9), Ema(net, 0.9)
    for value in range(6):
        net.set(value)
        whole.update(net)
        if value < 3:
            first.update(net)
        else:
            if value == 3:
                second.load(first.state())
            second.update(net)
    assert all(torch.equal(value, second.state()[name]) for name, value in whole.state().items())
    assert not torch.equal(first.state()["weight"], second.state()["weight"])

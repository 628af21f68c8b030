"""Mixing: inputs and targets change in one proportion, partners are drawn, and nothing happens where nothing is on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from carray.search.train.augment import mix, soft_targets
from carray.search.train.hyperparameters import CnnHyper

K = 16


def mixed(inputs: Tensor, *, seed: int = 0, labels_B: Tensor | None = None, **alphas: float) -> tuple[Tensor, Tensor]:
    labels_B = torch.arange(len(inputs)) if labels_B is None else labels_B
    return mix(inputs, labels_B, CnnHyper(**alphas), K, torch.Generator().manual_seed(seed))


def one_hot_images(size: int = 12) -> Tensor:
    """Give images_BCHW whose image i is 1 in channel i and 0 elsewhere, so that shares can be read off."""
    return torch.eye(K)[:, :, None, None].expand(K, K, size, size).contiguous()


def test_with_nothing_on_all_is_given_back_and_nothing_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, labels_B = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    same, targets = mix(inputs, labels_B, CnnHyper(), K, generator)
    assert same is inputs
    assert targets is labels_B
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
@pytest.mark.parametrize("seed", range(8))
def test_targets_follow_the_inputs_proportion(alphas: dict[str, float], seed: int) -> None:
    images_BCHW, targets_BK = mixed(one_hot_images(), seed=seed, **alphas)
    assert targets_BK.dtype == torch.float32
    assert torch.allclose(images_BCHW.mean(dim=(2, 3)), targets_BK, atol=1e-6)
    assert torch.allclose(targets_BK.sum(dim=1), torch.ones(K))


def test_embeddings_mix_by_mixup_whatever_is_on() -> None:
    for alphas in ({"mixup": 1.0}, {"cutmix": 1.0}):
        embedding_BD, targets_BK = mixed(torch.eye(K), **alphas)
        assert torch.allclose(embedding_BD, targets_BK, atol=1e-6)
        assert not torch.equal(embedding_BD, torch.eye(K))


def test_maps_with_their_channels_last_are_not_cut_across_channels() -> None:
    maps_BHWC = one_hot_images(6).permute(0, 2, 3, 1)
    mixed_BHWC, targets_BK = mixed(maps_BHWC, cutmix=1.0)
    assert torch.allclose(mixed_BHWC, targets_BK[:, None, None, :].expand_as(mixed_BHWC), atol=1e-6)


def test_mixup_blends_everywhere_and_cutmix_pastes_a_rectangle() -> None:
    blended_BCHW, _ = mixed(one_hot_images(), mixup=1.0)
    assert torch.equal(blended_BCHW, blended_BCHW[:, :, :1, :1].expand_as(blended_BCHW))
    shapes = set()
    for seed in range(20):
        pasted_BCHW, _ = mixed(one_hot_images(), seed=seed, cutmix=1.0)
        assert set(pasted_BCHW.unique().tolist()) <= {0.0, 1.0}
        foreign_HW = (pasted_BCHW != one_hot_images()).any(dim=(0, 1))
        rows_H, columns_W = foreign_HW.any(dim=1), foreign_HW.any(dim=0)
        assert torch.equal(foreign_HW, rows_H[:, None] & columns_W[None, :])
        shapes.add((int(rows_H.sum()), int(columns_W.sum())))
    assert len(shapes) > 10


def test_both_take_turns() -> None:
    def blends(seed: int) -> bool:
        images_BCHW, _ = mixed(one_hot_images(), seed=seed, mixup=1.0, cutmix=1.0)
        return bool(((images_BCHW > 0) & (images_BCHW < 1)).any())

    assert 10 <= sum(blends(seed) for seed in range(40)) <= 30


def test_a_small_alpha_keeps_images_nearly_whole_and_a_large_one_halves_them() -> None:
    def mean_share(alpha: float) -> float:
        shares = [mixed(torch.eye(K), seed=seed, mixup=alpha)[1].max(dim=1).values.median() for seed in range(30)]
        return float(torch.stack(shares).mean())

    assert mean_share(0.02) > 0.95
    assert mean_share(10.0) < 0.65


def test_partners_are_drawn_and_not_the_neighbours_in_the_file() -> None:
    _, targets_BK = mixed(torch.eye(K), mixup=1.0)
    partner_B = (targets_BK - torch.diag(targets_BK.diag())).argmax(dim=1)
    steps = (partner_B - torch.arange(K)) % K
    assert len(steps.unique()) > 4


def test_the_generator_alone_decides_and_the_inputs_are_not_changed() -> None:
    inputs: Any = torch.rand(6, 3, 10, 10)
    before = inputs.clone()
    torch.manual_seed(1)
    first = mixed(inputs, cutmix=1.0)
    torch.manual_seed(2)
    again, other = mixed(inputs, cutmix=1.0), mixed(inputs, seed=1, cutmix=1.0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(inputs, before)


def test_soft_targets_cost_what_labels_cost() -> None:
    labels_B, logits_BK = torch.tensor([2, 0, 15]), torch.randn(3, K)
    for smoothing in (0.0, 0.1):
        losses = [
            torch.nn.functional.cross_entropy(logits_BK, targets, label_smoothing=smoothing)
            for targets in (labels_B, soft_targets(labels_B, K))
        ]
        assert torch.allclose(*losses)

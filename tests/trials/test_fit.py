"""Training: it learns, it repeats, it stops on a loss that is not finite, and it sees evaluation's own pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from carray.pixels import PixelSettings, view
from carray.tensors.format import Block
from carray.trials.augment import augment
from carray.trials.fit import Fit
from carray.trials.hyper import CnnHyper
from carray.trials.nets import predict_logits

PIXELS = PixelSettings(decode_size=32, input_size=24)
HYPER = CnnHyper(input_size=24, stages=2, width=8, batch_images=8, learning_rate=0.01, dropout=0.0, colour_jitter=0.0)


def two_colours(images: int = 48) -> Block:
    """Make a block whose two classes differ by colour: red images and blue ones, with noise."""
    random = np.random.default_rng(0)
    labels_N = np.arange(images) % 2
    pixels_NHWC = random.integers(0, 120, (images, 32, 32, 3), dtype=np.uint8)
    pixels_NHWC[labels_N == 0, ..., 0] += 120
    pixels_NHWC[labels_N == 1, ..., 2] += 120
    splits_N = np.where(np.arange(images) < images * 2 // 3, 0, 1).astype(np.int8)
    return Block(pixels_NHWC, labels_N.astype(np.int64), splits_N)


def fit(hyper: CnnHyper = HYPER, *, seed: int = 0) -> Fit:
    return Fit(hyper, two_colours(), PIXELS, class_count=2, epochs=4, seed=seed)


def test_it_learns() -> None:
    trained = fit()
    results = [trained.run_epoch() for _ in range(4)]
    assert [result.epoch for result in results] == [1, 2, 3, 4]
    assert results[-1].val_top1 == 1.0
    assert results[-1].val_top5 == 1.0
    assert results[-1].train_loss < results[0].train_loss


def test_same_seed_same_figures() -> None:
    def losses(seed: int) -> list[float]:
        trained = fit(seed=seed)
        return [trained.run_epoch().train_loss for _ in range(2)]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_a_loss_that_is_not_finite_ends_the_epoch() -> None:
    trained = fit()
    with torch.no_grad():
        trained.net.head.weight.fill_(math.inf)
    result = trained.run_epoch()
    assert not math.isfinite(result.train_loss)
    assert math.isnan(result.val_loss)
    assert result.val_top1 == 0.0


def test_validation_sees_the_one_view() -> None:
    trained = fit()
    block = trained.block
    logits_NK = predict_logits(trained.net, block, trained.val_rows_N[:3], PIXELS)
    by_hand_NHWC = np.stack([view(block.pixels_NHWC[i], PIXELS) for i in trained.val_rows_N[:3]])
    with torch.inference_mode():
        expected_NK, _ = trained.net(torch.from_numpy(by_hand_NHWC).permute(0, 3, 1, 2).float())
    assert np.allclose(logits_NK, expected_NK.numpy(), atol=1e-5)


def test_without_randomness_augmenting_only_resizes() -> None:
    plain = HYPER.model_copy(update={"crop_scale": 1.0, "crop_stretch": 1.0, "flip": False})
    pixels_BHWC = torch.from_numpy(np.full((2, 32, 32, 3), 77, dtype=np.uint8))
    images_BCHW = augment(pixels_BHWC, plain, torch.Generator().manual_seed(0))
    assert images_BCHW.shape == (2, 3, 24, 24)
    assert torch.allclose(images_BCHW, torch.full_like(images_BCHW, 77.0))


@pytest.mark.parametrize("changes", [{"flip": True}, {"crop_scale": 0.5}, {"colour_jitter": 0.5}])
def test_each_augmentation_changes_pixels_and_stays_in_range(changes: dict[str, object]) -> None:
    plain = HYPER.model_copy(update={"crop_scale": 1.0, "crop_stretch": 1.0, "flip": False})
    pixels_BHWC = torch.from_numpy(two_colours().pixels_NHWC[:16])
    expected = augment(pixels_BHWC, plain, torch.Generator().manual_seed(0))
    changed = augment(pixels_BHWC, plain.model_copy(update=changes), torch.Generator().manual_seed(0))
    assert not torch.equal(expected, changed)
    assert 0 <= changed.min() <= changed.max() <= 255

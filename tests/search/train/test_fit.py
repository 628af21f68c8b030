"""Training: it learns, it repeats, it stops on a loss that is not finite, and it sees evaluation's own pixels."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from carray.core.errors import SettingsError
from carray.images.pixels import PixelSettings, view
from carray.search.train.augment import augment
from carray.search.train.fit import EpochResult, Fit
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import predict_logits
from carray.tensors.block import Block

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


def fit(hyper: CnnHyper | TransferHyper = HYPER, *, seed: int = 0) -> Fit:
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


def without_times(result: EpochResult) -> EpochResult:
    return dataclasses.replace(result, seconds=0.0, images_per_second=0.0)


RECIPES = {
    "plain": HYPER,
    "sgd, ema, mixing": HYPER.model_copy(update={"optimizer": "sgd", "ema": 0.9, "mixup": 0.4, "cutmix": 1.0}),
    "dropout, erasing, policy": HYPER.model_copy(update={"dropout": 0.5, "erasing": 0.5, "policy": "trivial"}),
    "balanced, clipped": HYPER.model_copy(update={"class_balance": "sampler", "clip_norm": 0.1}),
    "transfer": TransferHyper(
        backbone="mobilenetv3_small_050",
        weights="none",
        input_size=24,
        batch_images=8,
        train="all",
        head_only_epochs=1,
        layer_decay=0.7,
        drop_path=0.2,
    ),
    "transfer, kept features": TransferHyper(
        backbone="mobilenetv3_small_050", weights="none", input_size=24, batch_images=8, ema=0.9, cached_views=3
    ),
}


@pytest.mark.parametrize("hyper", RECIPES.values(), ids=RECIPES.keys())
def test_a_restored_training_goes_on_as_if_it_had_never_stopped(hyper: CnnHyper | TransferHyper) -> None:
    whole = fit(hyper)
    expected = [whole.run_epoch() for _ in range(4)]
    begun = fit(hyper)
    for _ in range(2):
        begun.run_epoch()
    goes_on = fit(hyper)
    goes_on.restore(begun.checkpoint())
    assert goes_on.epoch == 2
    for _ in range(2):
        goes_on.run_epoch()
    assert [without_times(result) for result in goes_on.history] == [without_times(result) for result in expected]
    for name, value in goes_on.weights().items():
        assert torch.equal(value, whole.weights()[name]), name


@pytest.mark.parametrize("kept_share", [0.0, 0.01, 0.5, 0.999])
def test_a_checkpoint_cut_short_is_refused_and_changes_nothing(kept_share: float) -> None:
    data = fit().checkpoint()
    trained = fit(seed=1)
    before = trained.weights()
    with pytest.raises(SettingsError, match="cut short or damaged"):
        trained.restore(data[: int(len(data) * kept_share)])
    assert all(torch.equal(value, before[name]) for name, value in trained.weights().items())
    assert trained.epoch == 0


def test_a_checkpoint_of_another_network_is_refused() -> None:
    with pytest.raises(SettingsError, match="another network"):
        fit().restore(fit(HYPER.model_copy(update={"width": 12})).checkpoint())


@pytest.mark.parametrize(("family", "bf16"), [("cnn", True), ("transfer", False)])
def test_where_a_cpu_has_bfloat16_plain_convolutions_learn_in_it(
    family: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = fit()
    if family == "transfer":
        trained.hyper = TransferHyper(backbone="tf_efficientnet_lite0")
    for has_it in (True, False):
        dtype = torch.bfloat16 if has_it else torch.float32
        monkeypatch.setattr("carray.search.train.fit.forward_precision", lambda device, dtype=dtype: dtype)
        with trained._autocast():
            assert torch.is_autocast_enabled("cpu") == (bf16 and has_it)


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    """Without batch normalisation's coupling, since the head alone sees the parts."""
    gradients = []
    for micro_batch_images in (8, 4, 3):
        exact = {"precision": "fp32", "micro_batch_images": micro_batch_images}
        trained = fit(HYPER.model_copy(update=exact))
        trained.net.eval()
        inputs, labels_B = next(iter(trained._source.batches(1, torch.Generator().manual_seed(0))))
        trained._gradients(inputs, labels_B)
        gradients.append(trained.net.head.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-6)
    assert gradients[0].abs().max() > 0


class Hungry(torch.nn.Module):
    """Has no memory for more than `most` images at once, and says so as torch does."""

    def __init__(self, upper: torch.nn.Module, most: int) -> None:
        super().__init__()
        self.upper, self.most = upper, most

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if len(images_BCHW) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return torch.as_tensor(self.upper(images_BCHW))


def test_memory_that_ends_halves_the_micro_batch_and_the_log_says_so() -> None:
    trained = fit()
    trained._embed = Hungry(trained._embed, most=3)
    first, second = trained.run_epoch(), trained.run_epoch()
    assert first.note == "out of memory: micro-batch halved to 2, batch stays 8"
    assert second.note is None
    assert math.isfinite(second.train_loss)
    goes_on = fit()
    goes_on.restore(trained.checkpoint())
    assert goes_on._micro_batch_images == 2


def test_memory_that_ends_at_once_is_a_sentence() -> None:
    trained = fit()
    trained._embed = Hungry(trained._embed, most=0)
    with pytest.raises(SettingsError, match="not even 2 images fit into the memory of cpu"):
        trained.run_epoch()


def test_refit_takes_validation_images_too_and_has_no_figures_for_them() -> None:
    trained = Fit(HYPER, two_colours(), PIXELS, class_count=2, epochs=2, seed=0, splits=("train", "val"))
    result = trained.run_epoch()
    assert len(trained.train_rows_N) == 48
    assert math.isnan(result.val_loss)
    assert math.isfinite(result.train_loss)


def test_head_only_epochs_leave_the_trunk_alone() -> None:
    trained = fit(RECIPES["transfer"])
    before = trained.net.trunk.conv_stem.weight.clone()
    trained.run_epoch()
    assert torch.equal(trained.net.trunk.conv_stem.weight, before)
    trained.run_epoch()
    assert not torch.equal(trained.net.trunk.conv_stem.weight, before)


def test_the_running_mean_is_what_is_packed_and_validated() -> None:
    trained = fit(HYPER.model_copy(update={"ema": 0.99}))
    trained.run_epoch()
    assert not torch.equal(trained.weights()["head.weight"], trained.net.head.weight)


def test_mirror_averaging_is_the_mean_of_both_logits() -> None:
    trained = fit(HYPER.model_copy(update={"flip_average": True}))
    trained.net.eval()
    images_BCHW = torch.rand(2, 3, 24, 24) * 255
    with torch.no_grad():
        both, mirrored = trained.net(images_BCHW)[0], trained.net(images_BCHW.flip(3))[0]
        assert torch.allclose(both, mirrored, atol=1e-5)
        trained.net.flip_average = False
        apart = trained.net(images_BCHW)[0], trained.net(images_BCHW.flip(3))[0]
    assert torch.allclose(both, (apart[0] + apart[1]) / 2, atol=1e-5)


def test_evaluation_may_be_larger_than_training() -> None:
    larger = PIXELS.model_copy(update={"input_size": 32})
    trained = Fit(HYPER.model_copy(update={"eval_size": 32}), two_colours(), larger, class_count=2, epochs=4, seed=0)
    assert [trained.run_epoch() for _ in range(4)][-1].val_top1 == 1.0


def test_bf16_learns_as_well() -> None:
    trained = fit(HYPER.model_copy(update={"precision": "bf16"}))
    assert [trained.run_epoch() for _ in range(4)][-1].val_top1 == 1.0
    assert trained.net.head.weight.dtype == torch.float32

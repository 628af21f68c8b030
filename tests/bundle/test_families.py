"""A dozen families of backbones, each at another size than its own: trained, packed, quantised and asked."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from carray.bundle import pack
from carray.bundle.certificates import Views, add_int8
from carray.bundle.pack import pack_bundle
from carray.bundle.scorer import Scorer
from carray.core.errors import SettingsError
from carray.images.pixels import PixelSettings
from carray.search.train import export
from carray.search.train.export import check_backbones
from carray.search.train.fit import Fit
from carray.search.train.hyperparameters import TransferHyper
from carray.tensors.block import Block

FAMILIES = {
    "ResNet": ("test_resnet", 64),
    "RegNet": ("regnetx_002", 64),
    "ConvNeXt": ("test_convnext", 64),
    "EfficientNet": ("test_efficientnet", 64),
    "MobileNetV4": ("mobilenetv4_conv_small_035", 64),
    "ViT": ("vit_tiny_patch16_224", 64),
    "ViT of any size": ("test_vit", 64),
    "DeiT": ("deit_tiny_patch16_224", 64),
    "MaxViT": ("test_maxvit", 64),
    "Swin": ("swin_tiny_patch4_window7_224", 64),
    "EVA-02": ("eva02_tiny_patch14_224", 56),
    "DINOv3": ("vit_small_patch16_dinov3", 64),
    "hybrid": ("test_coatnet", 64),
    "Hiera": ("hiera_tiny_224", 64),  # which torch's newer exporter cannot export
}
"""Backbone and input size; the smallest of each family."""
NEWER = ("ResNet", "ViT")
"""Whose bundles torch's newer exporter makes here; the others' the older one, which takes a tenth of the time."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def two_colours(size: int) -> Block:
    """Make 24 training and 104 validation images of noise, red ones and blue ones."""
    random, labels_N = np.random.default_rng(0), np.arange(128) % 2
    pixels_NHWC = random.integers(0, 120, (128, size, size, 3), dtype=np.uint8)
    pixels_NHWC[labels_N == 0, :, :, 0] += 120
    pixels_NHWC[labels_N == 1, :, :, 2] += 120
    return Block(pixels_NHWC, labels_N.astype(np.int64), (np.arange(128) >= 24).astype(np.int8))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_exports_quantises_and_classifies(
    family: str, real_export: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, size = FAMILIES[family]
    if family not in NEWER:
        monkeypatch.setattr(pack, "export_onnx", partial(export.export_onnx, fast=True))
    pixels, block = PixelSettings(decode_size=size, input_size=size, view_crop=1.0), two_colours(size)
    hyper = TransferHyper(backbone=backbone, weights="none", input_size=size, last_stages=1, batch_images=24)
    check_backbones([hyper])
    for train in ("head", "last_stages", "all"):
        told = hyper.model_copy(update={"train": train, "cached_views": 1 if train == "head" else 0})
        fit = Fit(told, block, pixels, class_count=2, epochs=1, seed=0)
        before = {name: value.clone() for name, value in fit.net.named_parameters()}
        result = fit.run_epoch()
        changed = {name for name, value in fit.net.named_parameters() if not torch.equal(value, before[name])}
        learnable = {name for name, value in fit.net.named_parameters() if value.requires_grad}
        assert np.isfinite(result.train_loss)
        assert {"head.weight", "head.bias"} <= changed <= learnable
        assert (len(changed) > 2) == (train != "head")
        assert result.note is not None and result.note.startswith("trains the head")
    bundle, seen_NHWC = str(tmp_path / "bundle"), block.pixels_NHWC
    info = pack_bundle(
        fit.net,
        bundle,
        classes=["blue", "red"],
        pixels=pixels,
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=told.model_dump(mode="json"),
        search_note={"trial_id": "none"},
        parity_pixels_NHWC=seen_NHWC[:40],
    )
    assert info.parity["fp32"]["top1_agreement"] == 1
    views = Views(calibration_NHWC=seen_NHWC[:24], judging_NHWC=seen_NHWC[24:], labels_N=block.labels_N[24:])
    certificate = add_int8(bundle, views).certificates["int8"]
    assert certificate.holds or certificate.reason
    logits_NK, embedding_ND = Scorer(bundle).score(seen_NHWC[:5])
    with torch.inference_mode():
        wanted_NK = fit.net.cpu().eval()(torch.from_numpy(seen_NHWC[:5]).permute(0, 3, 1, 2).float())[0].numpy()
    assert np.abs(logits_NK - wanted_NK).max() < (1e-2 if not certificate.holds else 1 + np.abs(wanted_NK).max())
    assert embedding_ND.shape == (5, fit.net.embedding_size)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"backbone": "crossvit_tiny_240"},
            "crossvit_tiny_240 cannot be built at 64 pixels .*choose another input_size",
        ),
        ({"backbone": "inception_v3"}, "inception_v3 cannot be built at 64 pixels"),
        ({"last_stages": 6}, "last_stages is 6, but mobilenetv3_small_050 has 5 stages"),
        ({"backbone": "test_vit2", "eval_size": 96}, "test_vit2 takes one size only"),
    ],
)
def test_what_a_backbone_cannot_do_is_said_before_a_search(changes: dict[str, object], sentence: str) -> None:
    hyper = TransferHyper(backbone="mobilenetv3_small_050", weights="none", input_size=64)
    with pytest.raises(SettingsError, match=sentence):
        check_backbones([hyper.model_copy(update=changes)])


def test_a_backbone_that_no_exporter_knows_is_refused_and_one_that_passed_is_not_tried_again(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = TransferHyper(backbone="test_resnet", weights="none", input_size=32)
    sizes = [small.model_copy(update={"input_size": size}) for size in (32, 40, 48)]
    check_backbones(sizes)
    assert len(list((own_cache / "backbones").iterdir())) == 2, "of any size, the smallest and the largest"

    def fail(net: object, size: int, *, older: bool) -> bytes:
        raise NotImplementedError(f"an operator, older {older}")

    monkeypatch.setattr(export, "_export", fail)
    check_backbones(sizes)
    with pytest.raises(SettingsError) as caught:
        check_backbones([*sizes, small.model_copy(update={"backbone": "test_convnext"})])
    (problem,) = caught.value.problems
    assert "backbone test_convnext cannot be exported to ONNX at 32 pixels" in problem
    assert "older True" in problem and "older False" in problem

"""Augments training batches on the network's device: random crops, flips, policies and erasing; mixup and CutMix.

All randomness comes from a generator on the CPU, so the same generator gives the same views on any device; what is off
draws nothing from it, and torch's own generator stays as it was. On a CPU images are cropped as bytes to whole pixels,
ten times as fast as sampling floats in one operation as a GPU does; the two differ by less than a pixel.
Sources: random resized crop, Szegedy et al., 'Going Deeper with Convolutions', 2014, section 6, with milder bounds;
Zhong et al., 'Random Erasing Data Augmentation', 2017; Zhang et al., 'mixup', 2017, also on hidden layers (Verma et
al., 'Manifold Mixup', 2018); Yun et al., 'CutMix', 2019. torchvision's mixup and CutMix pair neighbours, often of one
class in our file-ordered batches, and refuse embeddings.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from carray.search.train.hyperparameters import CnnHyper, TransferHyper

__all__ = ["augment", "mix", "soft_targets"]

_GREY = 128.0
"""Fill where an image was moved away or erased; about zero once normalised."""
_ERASED_AREA, _ERASED_STRETCH = (0.02, 0.33), 3.0
"""Share of the image, and largest ratio of the longer to the shorter side."""
_POLICY_DRAWS = 32
"""torchvision's policies draw one operation a call. Up to this many images get a call each; of a larger batch, as
GPUs take, each call gets a group of images, drawn at random: launching operations image by image would take longer
there than training on them."""


def augment(pixels_BHWC: Tensor, hyper: CnnHyper | TransferHyper, generator: torch.Generator) -> Tensor:
    """Crop, mirror, tint, distort and erase a batch at random.

    Takes uint8 pixels_BHWC and gives float32 images_BCHW in 0..255 at input_size.
    """
    boxes_B4 = _random_boxes(len(pixels_BHWC), pixels_BHWC.shape[1], hyper, generator)
    mirrored_B = torch.zeros(len(pixels_BHWC), dtype=torch.bool)
    if hyper.flip:
        mirrored_B = torch.rand(len(pixels_BHWC), generator=generator) < 0.5
    crop = _crop_bytes if pixels_BHWC.device.type == "cpu" else _crop_floats
    images_BCHW = crop(pixels_BHWC, boxes_B4, mirrored_B, hyper.input_size)
    if hyper.colour_jitter:
        images_BCHW = _tint(images_BCHW, hyper.colour_jitter, generator)
    if hyper.policy != "none":
        images_BCHW = _distort(images_BCHW, hyper.policy, generator)
    return _erase(images_BCHW, hyper.erasing, generator) if hyper.erasing else images_BCHW


def _random_boxes(batch_images: int, size: int, hyper: CnnHyper | TransferHyper, generator: torch.Generator) -> Tensor:
    """Draw boxes_B4 (x1, y1, x2, y2), float32 pixels, inside a square of `size`."""
    scale_B, stretch_B, left_B, top_B = torch.rand(4, batch_images, generator=generator)
    side_B = size * (hyper.crop_scale + (1 - hyper.crop_scale) * scale_B)
    root_B = torch.exp((stretch_B - 0.5) * math.log(hyper.crop_stretch))
    width_B, height_B = (side_B * root_B).clamp(max=size), (side_B / root_B).clamp(max=size)
    x_B, y_B = left_B * (size - width_B), top_B * (size - height_B)
    return torch.stack([x_B, y_B, x_B + width_B, y_B + height_B], dim=1)


def _crop_bytes(pixels_BHWC: Tensor, boxes_B4: Tensor, mirrored_B: Tensor, size: int) -> Tensor:
    """Cut, resize and mirror each image; boxes are rounded to whole pixels."""
    import cv2

    cv2.setNumThreads(1)  # a resize is too short to share, and the other cores are other trials'
    corners_B4 = boxes_B4.round().int().tolist()
    images_BHWC = np.empty((len(pixels_BHWC), size, size, 3), dtype=np.uint8)
    rows = zip(pixels_BHWC.numpy(), corners_B4, mirrored_B.tolist(), images_BHWC, strict=True)
    for pixels_HWC, (x1, y1, x2, y2), mirrored, image_HWC in rows:
        # Averaging keeps fine detail from aliasing where a crop shrinks; where it grows, it would show the pixels.
        shrinks = x2 - x1 >= size and y2 - y1 >= size
        kind = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cv2.resize(pixels_HWC[y1:y2, x1:x2], (size, size), dst=image_HWC, interpolation=kind)
        if mirrored:
            cv2.flip(image_HWC, 1, dst=image_HWC)
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float()


def _crop_floats(pixels_BHWC: Tensor, boxes_B4: Tensor, mirrored_B: Tensor, size: int) -> Tensor:
    """Cut, resize and mirror a whole batch at once."""
    from torchvision.ops import roi_align

    device = pixels_BHWC.device
    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
    boxes_B5 = torch.cat([torch.arange(len(boxes_B4))[:, None], boxes_B4], dim=1).to(device)
    # roi_align averages sampling_ratio^2 points a pixel: a crop that shrinks is smoothed, as by an area resize.
    shrink = images_BCHW.shape[-1] / size
    sampled_BCHW: Tensor = roi_align(
        images_BCHW, boxes_B5, output_size=size, sampling_ratio=max(1, math.ceil(shrink - 0.2)), aligned=True
    )
    return torch.where(mirrored_B.to(device).view(-1, 1, 1, 1), sampled_BCHW.flip(3), sampled_BCHW)


def _tint(images_BCHW: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast, each image by its own factors in 1 - jitter .. 1 + jitter."""
    factors_2B = (1 + jitter * (2 * torch.rand(2, len(images_BCHW), generator=generator) - 1)).to(images_BCHW.device)
    contrast_B111, brightness_B111 = factors_2B.view(2, -1, 1, 1, 1)
    mean_B111 = images_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return (((images_BCHW - mean_B111) * contrast_B111 + mean_B111) * brightness_B111).clamp(0, 255)


def _distort(images_BCHW: Tensor, policy: Literal["trivial", "rand"], generator: torch.Generator) -> Tensor:
    """Apply torchvision's TrivialAugmentWide or RandAugment, drawn for each image or small group on its own."""
    from torchvision.transforms import v2

    make = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment}[policy]
    transform = make(interpolation=v2.InterpolationMode.BILINEAR, fill=_GREY)
    images = len(images_BCHW)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    # Neighbours in a batch are neighbours in the file, often of one class; a group should not be.
    order_B = torch.randperm(images, generator=generator).to(images_BCHW.device)
    whole_BCHW = images_BCHW.round().clamp(0, 255).to(torch.uint8)  # some operations are defined on bytes only
    changed_BCHW = torch.empty_like(whole_BCHW)
    # torchvision draws from torch's own generator, on the CPU for any device; devices=[] spares copying the others'.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for group_G in order_B.split(math.ceil(images / _POLICY_DRAWS)):
            changed_BCHW[group_G] = transform(whole_BCHW[group_G])
    return changed_BCHW.float()


def _erase(images_BCHW: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Paint a random rectangle grey, in each image with the given probability."""
    height, width = images_BCHW.shape[2:]
    chance_B, area_B, stretch_B, top_B, left_B = torch.rand(5, len(images_BCHW), generator=generator)
    low, high = _ERASED_AREA
    area_B = height * width * (low + (high - low) * area_B)
    ratio_B = torch.exp((2 * stretch_B - 1) * math.log(_ERASED_STRETCH))
    # The largest area at the largest ratio is 0.995 of the side, so that nothing has to be drawn again.
    tall_B, wide_B = (area_B * ratio_B).sqrt().round(), (area_B / ratio_B).sqrt().round()
    tall_B = torch.where(chance_B < probability, tall_B, 0)
    top_B, left_B = (top_B * (height - tall_B + 1)).floor(), (left_B * (width - wide_B + 1)).floor()
    erased_BHW = _spans(top_B, tall_B, height)[:, :, None] & _spans(left_B, wide_B, width)[:, None, :]
    return torch.where(erased_BHW[:, None].to(images_BCHW.device), _GREY, images_BCHW)


def _spans(start_B: Tensor, length_B: Tensor, size: int) -> Tensor:
    """Mark, bool (B, size), `length` positions from `start`."""
    positions = torch.arange(size)
    return (positions >= start_B[:, None]) & (positions < (start_B + length_B)[:, None])


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

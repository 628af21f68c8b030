"""Turns decoded pixels into training's random views, as batch operations on the network's device.

From: uint8 pixels_BHWC at decode_size. To: float images_BCHW in 0..255 at input_size.
Source of the random resized crop: Szegedy et al., 'Going Deeper with Convolutions', 2014, section 6, with milder
bounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from carray.trials.hyper import CnnHyper, TransferHyper

__all__ = ["augment"]


def augment(pixels_BHWC: Tensor, hyper: CnnHyper | TransferHyper, generator: torch.Generator) -> Tensor:
    """Crop, mirror and tint a batch at random: uint8 pixels_BHWC to float32 images_BCHW in 0..255 at input_size."""
    from torchvision.ops import roi_align

    images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
    boxes_B5 = _random_boxes(len(images_BCHW), images_BCHW.shape[-1], hyper, generator).to(images_BCHW.device)
    # roi_align averages sampling_ratio^2 points a pixel: a crop that shrinks is smoothed, as by an area resize.
    shrink = images_BCHW.shape[-1] / hyper.input_size
    images_BCHW = roi_align(
        images_BCHW,
        boxes_B5,
        output_size=hyper.input_size,
        sampling_ratio=max(1, math.ceil(shrink - 0.2)),
        aligned=True,
    )
    if hyper.flip:
        mirrored_B = torch.rand(len(images_BCHW), generator=generator).to(images_BCHW.device) < 0.5
        images_BCHW = torch.where(mirrored_B.view(-1, 1, 1, 1), images_BCHW.flip(3), images_BCHW)
    return _tint(images_BCHW, hyper.colour_jitter, generator) if hyper.colour_jitter else images_BCHW


def _random_boxes(batch_images: int, size: int, hyper: CnnHyper | TransferHyper, generator: torch.Generator) -> Tensor:
    """Draw boxes_B5 (image, x1, y1, x2, y2), float32 pixels, inside a square of `size`."""
    scale_B, stretch_B, left_B, top_B = torch.rand(4, batch_images, generator=generator)
    side_B = size * (hyper.crop_scale + (1 - hyper.crop_scale) * scale_B)
    root_B = torch.exp((stretch_B - 0.5) * math.log(hyper.crop_stretch))
    width_B, height_B = (side_B * root_B).clamp(max=size), (side_B / root_B).clamp(max=size)
    x_B, y_B = left_B * (size - width_B), top_B * (size - height_B)
    return torch.stack([torch.arange(batch_images), x_B, y_B, x_B + width_B, y_B + height_B], dim=1)


def _tint(images_BCHW: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Change brightness and contrast, each image by its own factors in 1 - jitter .. 1 + jitter."""
    factors_2B = (1 + jitter * (2 * torch.rand(2, len(images_BCHW), generator=generator) - 1)).to(images_BCHW.device)
    contrast_B111, brightness_B111 = factors_2B.view(2, -1, 1, 1, 1)
    mean_B111 = images_BCHW.mean(dim=(1, 2, 3), keepdim=True)
    return (((images_BCHW - mean_B111) * contrast_B111 + mean_B111) * brightness_B111).clamp(0, 255)

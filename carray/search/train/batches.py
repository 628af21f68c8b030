"""Feeds a network its batches: views made anew from the block, or the kept features of its frozen part.

From: a block, a network, a hyper. To: training batches an epoch, and validation's logits.
Invariants: both give the same rows in the same order for the same (seed, epoch); validation sees `pixels.view`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from carray.images.pixels import PixelSettings
from carray.search.train.augment import augment
from carray.search.train.features import Features
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import Net, predict_logits, split_trunk
from carray.tensors.batches import balanced_weights, batch_rows
from carray.tensors.block import Block

__all__ = ["FeatureSource", "PixelSource", "Source", "choose_source"]

Rows = npt.NDArray[np.int64]
_DEVICE_SHARE = 4
"""A block that takes less than one in so many bytes of a GPU's free memory lies there whole."""


class Source(Protocol):
    """Is what a Fit asks for inputs: images_BCHW, or the features that stand for them."""

    @property
    def upper(self) -> nn.Module:
        """Give what turns inputs into embedding_BD."""
        ...

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and labels_B (int64) of one epoch, on the network's device."""
        ...

    def validation_logits(self, rows_N: Rows) -> npt.NDArray[np.float32]:
        """Compute logits_NK of the validation rows, float32."""
        ...


def choose_source(
    net: Net,
    hyper: CnnHyper | TransferHyper,
    block: Block,
    pixels: PixelSettings,
    *,
    rows_N: Rows,
    epochs: int,
    seed: int,
) -> Source:
    """Feed from kept features where part of the trunk is frozen and the hyper wants them, else from pixels."""
    views = min(hyper.cached_views, epochs) if isinstance(hyper, TransferHyper) else 0
    parts = split_trunk(net, input_size=hyper.input_size) if views else None
    if parts is None:
        return PixelSource(net, hyper, block, pixels, rows_N=rows_N, seed=seed)
    lower, upper = parts
    features = Features(block, net, lower, hyper, pixels, views=views)
    return FeatureSource(net, upper, features, hyper, block, pixels, rows_N=rows_N, seed=seed)


class PixelSource:
    """Makes new random views from the block each epoch, on the network's device."""

    def __init__(
        self, net: Net, hyper: CnnHyper | TransferHyper, block: Block, pixels: PixelSettings, *, rows_N: Rows, seed: int
    ) -> None:
        self._net, self._hyper, self._block, self._pixels = net, hyper, block, pixels
        self._rows_N, self._seed = rows_N, seed
        self._device = net.mean.device
        self._resident = _on_device(block, self._device)
        self.upper = _Images(net)

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield augmented images_BCHW and labels_B."""
        for rows_B in _rows(self._rows_N, self._hyper, self._block, seed=self._seed, epoch=epoch):
            images_BCHW = augment(self._decoded(rows_B), self._hyper, generator)
            labels_B = torch.from_numpy(self._block.labels_N[rows_B]).to(self._device)
            yield images_BCHW.contiguous(memory_format=torch.channels_last), labels_B

    def validation_logits(self, rows_N: Rows) -> npt.NDArray[np.float32]:
        """Compute logits_NK of the validation rows, float32."""
        return predict_logits(self._net, self._block, rows_N, self._pixels)

    def _decoded(self, rows_B: Rows) -> Tensor:
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows_B).to(self._device)]
        return torch.from_numpy(self._block.pixels_NHWC[rows_B]).to(self._device)


class FeatureSource:
    """Gives kept features of the frozen part: random view e of every image in epoch e."""

    def __init__(
        self,
        net: Net,
        upper: nn.Module,
        features: Features,
        hyper: TransferHyper | CnnHyper,
        block: Block,
        pixels: PixelSettings,
        *,
        rows_N: Rows,
        seed: int,
    ) -> None:
        self._net, self._features, self._hyper, self._block, self._pixels = net, features, hyper, block, pixels
        self._rows_N, self._seed = rows_N, seed
        self.upper = upper

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features_BX and labels_B; the views' randomness is in the features already."""
        for rows_B in _rows(self._rows_N, self._hyper, self._block, seed=self._seed, epoch=epoch):
            features_BX = _channels_last(self._features.of_rows(rows_B, epoch - 1))
            yield features_BX, torch.from_numpy(self._block.labels_N[rows_B]).to(features_BX.device)

    def validation_logits(self, rows_N: Rows) -> npt.NDArray[np.float32]:
        """Compute logits_NK of the validation rows, float32."""
        if self._net.flip_average:  # the mirrored images have no kept features
            return predict_logits(self._net, self._block, rows_N, self._pixels)
        self._net.eval()
        with torch.inference_mode():
            logits = [
                self._net.score(self.upper(_channels_last(features_BX)))[0].cpu()
                for features_BX in self._features.of_validation(64)
            ]
        return torch.cat(logits).numpy()


class _Images(nn.Module):
    """Normalises images and runs the whole trunk."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self._net = [net]  # in a list, so that the network is not a part of this one twice

    def forward(self, images_BCHW: Tensor) -> Tensor:
        net = self._net[0]
        return torch.as_tensor(net.trunk(net.normalise(images_BCHW)))


def _rows(rows_N: Rows, hyper: CnnHyper | TransferHyper, block: Block, *, seed: int, epoch: int) -> Iterator[Rows]:
    weights_N = balanced_weights(block.labels_N[rows_N]) if hyper.class_balance == "sampler" else None
    return batch_rows(rows_N, batch_images=hyper.batch_images, seed=seed, epoch=epoch, weights_N=weights_N)


def _on_device(block: Block, device: torch.device) -> Tensor | None:
    if device.type != "cuda" or block.pixels_NHWC.nbytes * _DEVICE_SHARE > torch.cuda.mem_get_info(device)[0]:
        return None
    return torch.from_numpy(np.array(block.pixels_NHWC)).to(device)


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs

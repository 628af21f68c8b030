"""Feeds a network its batches: random views of the block, or cached features of its frozen part.

Both give the same rows in the same order for the same (seed, epoch). Features are computed once for every trial of this
machine with the same frozen part and the same random views: view v of an image depends on the block, the view's
settings and v only. They lie in `$CARRAY_CACHE/features/BLOCK/KEY/`; training's are float16, validation's float32; a
file is renamed last, so one with its name is complete. Above $CARRAY_FEATURES_GB the least recently used go first, and
deleting the folder while nothing runs costs only their computing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from carray.core.environment import cache_home, features_bytes
from carray.core.errors import DataError
from carray.core.leftovers import remove_leftovers
from carray.images.pixels import PixelSettings
from carray.search.train.augment import augment
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.nets import Net, as_images, predict_logits, split_trunk
from carray.tensors.batches import balanced_weights, batch_rows, view_batch
from carray.tensors.block import Block

__all__ = ["FeatureSource", "Features", "PixelSource", "choose_source", "forward_precision"]

_CHUNK_IMAGES = 64
_VIEW_OF = ("input_size", "crop_scale", "crop_stretch", "flip", "colour_jitter", "policy", "erasing")
"""Settings that decide a random view, besides its number."""

Rows = npt.NDArray[np.int64]


def forward_precision(device: torch.device) -> torch.dtype:
    """Give bfloat16 where the device is fast with it, else float32; cached features are float16 anyway.

    On a CPU with AVX-512 BF16 a frozen EfficientNet-Lite0 runs 2.8 times faster so (one core, 160 pixels, batch 32).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32


class Features:
    """The feature maps of one frozen trunk; missing ones are computed."""

    def __init__(
        self,
        block: Block,
        net: Net,
        lower: nn.Module,
        hyper: CnnHyper | TransferHyper,
        pixels: PixelSettings,
        *,
        views: int,
    ) -> None:
        self._block, self._net, self._lower, self._hyper, self._pixels = block, net, lower, hyper, pixels
        self.views = views
        self._device = net.mean.device
        decided_by = {
            "views": {name: getattr(hyper, name) for name in _VIEW_OF},
            "evaluation": pixels.model_dump(mode="json"),
            "net": [net.mean.flatten().tolist(), net.std.flatten().tolist()],
            "precision": str(forward_precision(self._device)),
        }
        digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode())
        for name, value in lower.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        # A block in memory, as tests and notebooks make, has no folder.
        self._folder = cache_home() / "features" / block.key / digest.hexdigest()[:16] if block.key else None
        self._memory: dict[tuple[str, int | None], npt.NDArray[Any]] = {}
        self._rows = {split: block.of_split(split) for split in ("train", "val")}

    def of_rows(self, rows_B: Rows, view: int) -> Tensor:
        """Give features_BX of random view `view` (counted from 0, taken modulo `views`) of some rows, float32."""
        number = view % self.views
        parts = []
        for split, rows_N in self._rows.items():
            chosen_B = rows_B[np.isin(rows_B, rows_N)]
            if len(chosen_B):
                values_N = self._get(split, number)
                parts.append((chosen_B, values_N[np.searchsorted(rows_N, chosen_B)]))
        order_B = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
        features_BX = np.concatenate([values for _, values in parts])[order_B]
        return torch.from_numpy(features_BX).to(self._device).float()

    def of_validation(self, batch_images: int) -> Iterator[Tensor]:
        """Yield features_BX of evaluation's view of the validation rows, in their order, float32."""
        values_N = self._get("val", None)
        for start in range(0, len(values_N), batch_images):
            yield torch.from_numpy(np.array(values_N[start : start + batch_images])).to(self._device)

    def _get(self, split: str, view: int | None) -> npt.NDArray[Any]:
        key = split, view
        if key not in self._memory:
            self._memory[key] = self._compute(*key) if self._folder is None else self._from_disk(*key)
        return self._memory[key]

    def _from_disk(self, split: str, view: int | None) -> npt.NDArray[Any]:
        """Map a file; while another process computes it, compute later views."""
        for later in [] if view is None else range(view + 1, self.views):
            if self._make(split, view, wait=False):
                break
            self._make(split, later, wait=False)
        self._make(split, view, wait=True)
        path = self._path(split, view)
        os.utime(path)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def _make(self, split: str, view: int | None, *, wait: bool) -> bool:
        """Compute a file unless it exists; False where another process is at it and `wait` is off."""
        from filelock import FileLock, Timeout

        path = self._path(split, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if not path.exists():
                    _write(path, self._compute(split, view))
        except Timeout:
            return False
        return True

    def _path(self, split: str, view: int | None) -> Path:
        assert self._folder is not None
        return self._folder / f"{split}-{'eval' if view is None else f'{view:04d}'}.npy"

    def _compute(self, split: str, view: int | None) -> npt.NDArray[Any]:
        """Run the frozen part on a split: random view `view` as float16, evaluation's (None) as float32."""
        rows_N = self._rows[split]
        values_N: npt.NDArray[Any] = np.empty(0)
        precision = torch.float32 if view is None else forward_precision(self._device)
        for number, start in enumerate(range(0, len(rows_N), _CHUNK_IMAGES)):
            rows_B = rows_N[start : start + _CHUNK_IMAGES]
            float_BX = self._forward(self._images(rows_B, split, view, number), precision).float().cpu().numpy()
            if not start:
                dtype = np.float32 if view is None else np.float16
                values_N = np.empty((len(rows_N), *float_BX.shape[1:]), dtype=dtype)
            # A normalised network stays within float16; clipping avoids an infinity all the same.
            values_N[start : start + len(rows_B)] = float_BX if view is None else float_BX.clip(-65504, 65504)
        return values_N

    def _images(self, rows_B: Rows, split: str, view: int | None, number: int) -> Tensor:
        if view is None:
            return as_images(view_batch(self._block, rows_B, self._pixels), self._device)
        seed = int(np.random.default_rng([view, split == "val", number]).integers(2**62))
        pixels_BHWC = torch.from_numpy(self._block.pixels_NHWC[rows_B]).to(self._device)
        return augment(pixels_BHWC, self._hyper, torch.Generator().manual_seed(seed))

    def _forward(self, images_BCHW: Tensor, precision: torch.dtype) -> Tensor:
        self._lower.eval()
        autocast = torch.autocast(self._device.type, precision, enabled=precision != torch.float32)
        with torch.inference_mode(), autocast:
            images_BCHW = self._net.normalise(images_BCHW).contiguous(memory_format=torch.channels_last)
            return torch.as_tensor(self._lower(images_BCHW))


def _write(path: Path, values_N: npt.NDArray[Any]) -> None:
    _make_room(path.parent.parent.parent, values_N.nbytes)
    unfinished = path.with_suffix(".part")  # the lock of `path` is held
    try:
        with unfinished.open("wb") as file:
            np.save(file, values_N, allow_pickle=False)
        os.replace(unfinished, path)
    except OSError as err:
        raise DataError(
            f"the cached features need {values_N.nbytes / 1e6:.0f} MB in {path.parent}, which cannot be written "
            f"({err.strerror}); set CARRAY_CACHE to a larger disk, or cached_views to 0."
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # renamed or removed meanwhile
        return 0


def _make_room(home: Path, needed_bytes: int) -> None:
    """Delete the least recently used features until `needed_bytes` more fit."""
    remove_leftovers(home.rglob("*.part"), lambda path: path.with_name(f"{path.name.partition('.')[0]}.npy.lock"))
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in home.rglob("*.npy"))
    total = sum(size for _, size, _ in files) + sum(_size_bytes(path) for path in home.rglob("*.part"))
    most = features_bytes()
    while files and (total + needed_bytes > most or shutil.disk_usage(home).free < 2 * needed_bytes):
        # A process that has it mapped keeps it: on Linux the file lives until it is closed.
        _, size, path = files.pop(0)
        path.unlink(missing_ok=True)
        total -= size


_DEVICE_SHARE = 4
"""A block of at most this fraction (1/4) of a GPU's free memory is copied there whole."""


def choose_source(
    net: Net,
    hyper: CnnHyper | TransferHyper,
    block: Block,
    pixels: PixelSettings,
    *,
    rows_N: Rows,
    epochs: int,
    seed: int,
) -> PixelSource:
    """Choose cached features where part of the trunk is frozen and the hyper wants them, else pixels."""
    views = min(hyper.cached_views, epochs) if isinstance(hyper, TransferHyper) else 0
    parts = split_trunk(net, input_size=hyper.input_size) if views else None
    if parts is None:
        return PixelSource(net, hyper, block, pixels, rows_N=rows_N, seed=seed)
    features = Features(block, net, parts[0], hyper, pixels, views=views)
    return FeatureSource(features, parts[1], net, hyper, block, pixels, rows_N=rows_N, seed=seed)


class PixelSource:
    """New random views of the block each epoch, on the network's device."""

    upper: Callable[[Tensor], Tensor]
    """Turns the inputs of a batch into embedding_BD."""

    def __init__(
        self, net: Net, hyper: CnnHyper | TransferHyper, block: Block, pixels: PixelSettings, *, rows_N: Rows, seed: int
    ) -> None:
        self._net, self._hyper, self._block, self._pixels = net, hyper, block, pixels
        self._rows_N, self._seed = rows_N, seed
        self._device = net.mean.device
        self.upper = net.embed

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs, images_BCHW or their features, and labels_B (int64) of one epoch, on the network's device."""
        labels_N = self._block.labels_N
        weights_N = balanced_weights(labels_N[self._rows_N]) if self._hyper.class_balance == "sampler" else None
        for rows_B in batch_rows(
            self._rows_N, batch_images=self._hyper.batch_images, seed=self._seed, epoch=epoch, weights_N=weights_N
        ):
            inputs = _channels_last(self._inputs(rows_B, epoch, generator))
            yield inputs, torch.from_numpy(labels_N[rows_B]).to(self._device)

    def validation_logits(self, rows_N: Rows) -> npt.NDArray[np.float32]:
        """Compute logits_NK of the validation rows, float32."""
        return predict_logits(self._net, self._block, rows_N, self._pixels)

    def _inputs(self, rows_B: Rows, epoch: int, generator: torch.Generator) -> Tensor:
        if self._resident is not None:
            pixels_BHWC = self._resident[torch.from_numpy(rows_B).to(self._device)]
        else:
            pixels_BHWC = torch.from_numpy(self._block.pixels_NHWC[rows_B]).to(self._device)
        return augment(pixels_BHWC, self._hyper, generator)

    @cached_property
    def _resident(self) -> Tensor | None:
        """Copy the block to a GPU whose memory has room for it."""
        size_bytes = self._block.pixels_NHWC.nbytes
        if self._device.type != "cuda" or size_bytes * _DEVICE_SHARE > torch.cuda.mem_get_info(self._device)[0]:
            return None
        return torch.from_numpy(np.array(self._block.pixels_NHWC)).to(self._device)


class FeatureSource(PixelSource):
    """Cached features of the frozen part: random view e of every image in epoch e."""

    def __init__(self, features: Features, upper: nn.Module, *shared: Any, rows_N: Rows, seed: int) -> None:
        super().__init__(*shared, rows_N=rows_N, seed=seed)
        self.upper, self._features = upper, features

    def validation_logits(self, rows_N: Rows) -> npt.NDArray[np.float32]:
        """Compute logits_NK of the validation rows, float32."""
        if self._net.flip_average:  # mirrored images have no cached features
            return super().validation_logits(rows_N)
        self._net.eval()
        with torch.inference_mode():
            logits = [
                self._net.score(self.upper(_channels_last(features_BX)))[0].cpu()
                for features_BX in self._features.of_validation(64)
            ]
        return torch.cat(logits).numpy()

    def _inputs(self, rows_B: Rows, epoch: int, generator: torch.Generator) -> Tensor:
        return self._features.of_rows(rows_B, epoch - 1)


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.ndim == 4 else inputs

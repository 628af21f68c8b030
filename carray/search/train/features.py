"""Keeps what a frozen trunk makes of the images, so that trials train only the part that learns.

From: a block and a network whose lower part is frozen. To: feature maps by view, on disk once for every trial of this
machine that has the same frozen part and the same random views.
Invariants: view v of an image depends on the block, the view's settings and v only, never on a trial; training's
views are float16, validation's float32; a file is complete when it has its name, since it is renamed last.
Place: `$CARRAY_CACHE/features/BLOCK/KEY/`; removing `features` while nothing runs costs their computing, no more. Above
$CARRAY_FEATURES_GB, the files that were not used for longest go first.
Cost: one forward pass of the frozen part an image and view, where an epoch would cost one each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
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
from carray.search.train.nets import Net
from carray.tensors.batches import view_batch
from carray.tensors.block import Block

__all__ = ["Features", "forward_precision"]

_CHUNK_IMAGES = 64
_VIEW_OF = ("input_size", "crop_scale", "crop_stretch", "flip", "colour_jitter", "policy", "erasing")
"""What decides a random view, besides its number."""

Rows = npt.NDArray[np.int64]


def forward_precision(device: torch.device) -> torch.dtype:
    """Give bfloat16 where the device computes with it fast and its result is kept as float16 anyway, else float32.

    On a CPU with AVX-512 BF16 a frozen EfficientNet-Lite0 runs 2.8 times faster so (one core, 160 pixels, batch 32).
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32


class Features:
    """Gives the feature maps of one frozen trunk, computing those that are not there."""

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
        digest = hashlib.sha256(json.dumps(_settings(hyper, pixels, net), sort_keys=True).encode())
        for name, value in lower.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        # A block in memory, as tests and notebooks make, has nothing on disk to stand beside.
        self._place = cache_home() / "features" / block.key / digest.hexdigest()[:16] if block.key else None
        self._memory: dict[str, npt.NDArray[Any]] = {}
        self._rows = {split: block.of_split(split) for split in ("train", "val")}

    def of_rows(self, rows_B: Rows, view: int) -> Tensor:
        """Give features_BX of random view `view` (counted from 0, taken modulo `views`) of some rows, float32."""
        number = view % self.views
        parts = []
        for split, rows_N in self._rows.items():
            chosen_B = rows_B[np.isin(rows_B, rows_N)]
            if len(chosen_B):
                kept_N = self._get(split, number)
                parts.append((chosen_B, kept_N[np.searchsorted(rows_N, chosen_B)]))
        order_B = np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable")
        features_BX = np.concatenate([values for _, values in parts])[order_B]
        return torch.from_numpy(features_BX).to(self._device).float()

    def of_validation(self, batch_images: int) -> Iterator[Tensor]:
        """Yield features_BX of evaluation's view of the validation rows, in their order, float32."""
        kept_N = self._get("val", None)
        for start in range(0, len(kept_N), batch_images):
            yield torch.from_numpy(np.array(kept_N[start : start + batch_images])).to(self._device)

    def _get(self, split: str, view: int | None) -> npt.NDArray[Any]:
        name = f"{split}-{'eval' if view is None else f'{view:04d}'}"
        if name not in self._memory:
            self._memory[name] = self._compute(split, view) if self._place is None else self._from_disk(split, view)
        return self._memory[name]

    def _from_disk(self, split: str, view: int | None) -> npt.NDArray[Any]:
        """Map a file, waiting for the process that computes it; a process that would wait computes a later view."""
        from filelock import FileLock, Timeout

        assert self._place is not None
        self._place.mkdir(parents=True, exist_ok=True)
        path = self._path(split, view)
        for later in [] if view is None else range(view + 1, self.views):
            try:
                with FileLock(f"{path}.lock", timeout=0):
                    break
            except Timeout:
                self._try(split, later)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self._write(path, self._compute(split, view))
            os.utime(path)
            return np.load(path, mmap_mode="r", allow_pickle=False)

    def _try(self, split: str, view: int) -> None:
        """Compute a view unless it is there or another process is at it."""
        from filelock import FileLock, Timeout

        path = self._path(split, view)
        try:
            with FileLock(f"{path}.lock", timeout=0):
                if not path.exists():
                    self._write(path, self._compute(split, view))
        except Timeout:
            return

    def _path(self, split: str, view: int | None) -> Path:
        assert self._place is not None
        return self._place / f"{split}-{'eval' if view is None else f'{view:04d}'}.npy"

    def _write(self, path: Path, values_N: npt.NDArray[Any]) -> None:
        _make_room(path.parent.parent.parent, values_N.nbytes)
        unfinished = path.with_suffix(".part")  # the lock of `path` is held
        try:
            with unfinished.open("wb") as file:
                np.save(file, values_N, allow_pickle=False)
            os.replace(unfinished, path)
        except OSError as err:
            raise DataError(
                f"the kept features need {values_N.nbytes / 1e6:.0f} MB in {path.parent}, which cannot be written "
                f"({err.strerror}); set CARRAY_CACHE to a larger disk, or cached_views to 0."
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)

    def _compute(self, split: str, view: int | None) -> npt.NDArray[Any]:
        rows_N = self._rows[split]
        kept_N: npt.NDArray[Any] | None = None
        precision = torch.float32 if view is None else forward_precision(self._device)
        for number, start in enumerate(range(0, len(rows_N), _CHUNK_IMAGES)):
            rows_B = rows_N[start : start + _CHUNK_IMAGES]
            features_BX = self._forward(self._images(rows_B, split, view, number), precision)
            if kept_N is None:
                dtype = np.float32 if view is None else np.float16
                kept_N = np.empty((len(rows_N), *features_BX.shape[1:]), dtype=dtype)
            # Beyond float16's range lies nothing that a normalised network makes; a clip is better than an infinity.
            values_BX = features_BX.float().cpu().numpy()
            kept_N[start : start + len(rows_B)] = values_BX if view is None else values_BX.clip(-65504, 65504)
        assert kept_N is not None, "a split without rows was refused before the search began"
        return kept_N

    def _images(self, rows_B: Rows, split: str, view: int | None, number: int) -> Tensor:
        if view is None:
            seen_BHWC = torch.from_numpy(view_batch(self._block, rows_B, self._pixels)).to(self._device)
            return seen_BHWC.permute(0, 3, 1, 2).float()
        seed = int(np.random.default_rng([view, split == "val", number]).integers(2**62))
        pixels_BHWC = torch.from_numpy(self._block.pixels_NHWC[rows_B]).to(self._device)
        return augment(pixels_BHWC, self._hyper, torch.Generator().manual_seed(seed))

    def _forward(self, images_BCHW: Tensor, precision: torch.dtype) -> Tensor:
        self._lower.eval()
        autocast = torch.autocast(self._device.type, precision, enabled=precision != torch.float32)
        with torch.inference_mode(), autocast:
            images_BCHW = self._net.normalise(images_BCHW).contiguous(memory_format=torch.channels_last)
            return torch.as_tensor(self._lower(images_BCHW))


def _settings(hyper: CnnHyper | TransferHyper, pixels: PixelSettings, net: Net) -> dict[str, Any]:
    views = {name: getattr(hyper, name) for name in _VIEW_OF}
    normalised_by = [net.mean.flatten().tolist(), net.std.flatten().tolist()]
    precision = str(forward_precision(net.mean.device))
    return {"views": views, "evaluation": pixels.model_dump(mode="json"), "net": normalised_by, "precision": precision}


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # it has become whole, or was given up
        return 0


def _make_room(home: Path, needed_bytes: int) -> None:
    """Delete the features that were not used for longest until `needed_bytes` more fit."""
    remove_leftovers(home.rglob("*.part"), lambda path: path.with_name(f"{path.name.partition('.')[0]}.npy.lock"))
    files = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in home.rglob("*.npy"))
    total = sum(size for _, size, _ in files) + sum(_size_bytes(path) for path in home.rglob("*.part"))
    most = features_bytes()
    while files and (total + needed_bytes > most or shutil.disk_usage(home).free < 2 * needed_bytes):
        # Whoever has it mapped keeps it: on Linux the file lives until it is closed.
        _, size, path = files.pop(0)
        path.unlink(missing_ok=True)
        total -= size

"""Scores a bundle with PyTorch in bfloat16: the runtime for GPUs; it runs on a CPU, too, when asked for.

From: a bundle's weights (safetensors only) and what it says of its network. To: logits and embeddings.
Invariants: pixels travel to the device as uint8, 1 byte a channel, and are turned there; on a GPU one captured CUDA
graph serves every batch, the last one filled up, so that no kernel is launched from Python.
Cost: importing torch and timm takes about 15 s and 1 GB of memory.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from carray.bundle.bundle_folder import BundleInfo
from carray.bundle.runtimes import is_of_timm
from carray.core.errors import BundleError

__all__ = ["TorchRuntime"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

WARM_UPS = 3
"""Passes before the capture: libraries choose their kernels and take their memory in them."""


class TorchRuntime:
    """Holds a network on a device; one call at a time computes, others wait."""

    def __init__(
        self, weights: bytes, info: BundleInfo, *, device: str = "cpu", threads: int | None = None, batch_images: int
    ) -> None:
        """Build the network of a bundle's description and load its weights.

        Raises:
            BundleError: the weights are damaged, or of another network, or that is none of timm's own.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        from carray.search.train.hyperparameters import read_hyper
        from carray.search.train.nets import build_net

        if not is_of_timm(info):
            raise BundleError(
                f"the bundle's network is {info.net.get('backbone')!r}, which timm does not know by itself, and a "
                "bundle makes nobody read a hub or a folder; take runtime fp32 or int8."
            )
        if threads and device == "cpu":
            torch.set_num_threads(threads)
        try:
            net = build_net(read_hyper(info.net), class_count=len(info.classes), load_weights=False)
            net.load_state_dict(load(weights))
        except (ValidationError, SafetensorError, RuntimeError) as err:
            reason = " ".join(str(err).split())[:200]
            raise BundleError(
                f"the bundle's weights are damaged or of another network than it says ({reason}); pack it again."
            ) from None
        self._net = net.eval().to(device).to(memory_format=torch.channels_last)
        self._device, self._batch_images, self._size = device, batch_images, info.pixels.input_size
        self._lock = threading.Lock()
        self._graph: Any = None
        if device == "cuda":
            self._capture()

    def score(self, pixels_BHWC: Pixels) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32, for a batch of any size."""
        import torch

        parts = [pixels_BHWC[i : i + self._batch_images] for i in range(0, len(pixels_BHWC), self._batch_images)]
        with self._lock, torch.inference_mode():
            scored = [self._score_part(torch.from_numpy(np.ascontiguousarray(part))) for part in parts]
        return np.concatenate([logits for logits, _ in scored]), np.concatenate([embedding for _, embedding in scored])

    def _score_part(self, pixels_BHWC: Any) -> tuple[Floats, Floats]:
        images = len(pixels_BHWC)
        if self._graph is None:
            outputs = self._forward(pixels_BHWC.to(self._device))
        else:
            self._input[:images].copy_(pixels_BHWC)
            self._graph.replay()
            outputs = self._outputs
        logits_BK, embedding_BD = (output[:images].float().cpu().numpy() for output in outputs)
        return logits_BK, embedding_BD

    def _forward(self, pixels_BHWC: Any) -> Any:
        import torch

        # A uint8 NHWC batch, seen as NCHW, already lies as channels_last wants it.
        images_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float()
        with torch.autocast(self._device, dtype=torch.bfloat16, cache_enabled=False):
            return self._net(images_BCHW)

    def _capture(self) -> None:
        import torch

        shape = (self._batch_images, self._size, self._size, 3)
        self._input = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(self._input)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            self._outputs = self._forward(self._input)
        self._graph = graph

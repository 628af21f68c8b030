"""The runtimes that can score a bundle, and the choice among them.

    fp32         onnxruntime in 32-bit floats; on an NVIDIA GPU where onnxruntime has its provider
    int8         onnxruntime in 8-bit integers, on CPUs
    torch-bf16   PyTorch in bfloat16, meant for GPUs; importing torch and timm takes about 15 s and 1 GB

On a CPU `auto` chooses fp32, which needs no certificate, or a runtime whose certificate holds. It depends only on the
bundle and the device, so that a driver decides for all its workers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from carray.bundle.bundle_folder import RUNTIME_FILES, BundleInfo
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.text import one_line

__all__ = ["OnnxRuntime", "TorchRuntime", "best_batch", "check_graph", "resolve_runtime"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

DEFAULT_BATCH = 32
CUDA_BATCH = 256
"""Images that fill a GPU; the rates in a certificate are of a CPU."""
WARM_UPS = 3
"""Forward passes before a CUDA graph is captured, in which libraries choose kernels and allocate memory."""


def resolve_runtime(runtime: str, info: BundleInfo, *, device: str = "cpu") -> str:
    """Resolve `auto` to the fastest runtime, on cpu or cuda, whose certificate in this bundle holds.

    Raises:
        SettingsError: the runtime is unknown, or the bundle has no file for it.
    """
    certificate = info.certificates.get("int8" if runtime == "auto" else runtime)
    if runtime == "auto":
        chosen = _fastest(info, device)
        if chosen == "fp32" and device == "cpu" and certificate and not certificate.holds:
            why = f"the int8 certificate of bundle {info.bundle_id} does not hold: {certificate.reason}"
            say(f"runtime: auto takes fp32, since {why}")
        return chosen
    present = [name for name, file in RUNTIME_FILES.items() if file in info.files]
    if runtime not in present:
        why = f" (int8 was left out: {certificate.reason})" if certificate else ""
        why = "; carray quantize adds int8" if runtime == "int8" and not certificate else why
        raise SettingsError(f"runtime is {runtime!r}; this bundle has {', '.join(['auto', *present])}{why}.")
    if runtime != "fp32" and not (certificate and certificate.holds):
        reason = certificate.reason if certificate else "it has none"
        say(f"warning: bundle {info.bundle_id} holds no certificate for {runtime} ({reason}); labels may differ")
    return runtime


def _fastest(info: BundleInfo, device: str) -> str:
    if device == "cuda" and _is_built_in(info):  # each worker compares its logits with fp32's probes
        bf16 = info.certificates.get("torch-bf16")
        return "fp32" if bf16 and not bf16.holds else "torch-bf16"
    int8 = info.certificates.get("int8")
    if not (int8 and int8.holds and RUNTIME_FILES["int8"] in info.files):
        return "fp32"
    speed = {name: max(rates.values()) for name, rates in int8.images_per_second.items()}
    return max(("fp32", "int8"), key=lambda name: speed.get(name, 0.0))


def _is_built_in(info: BundleInfo) -> bool:
    """Whether timm itself builds the bundle's network, without reading a hub or folder that the bundle names."""
    return not {":", "/"} & set(str(info.net.get("backbone", "")))


def best_batch(info: BundleInfo, runtime: str, *, device: str = "cpu") -> int:
    """Choose the batch size that was fastest when the bundle was packed."""
    if device == "cuda":
        return CUDA_BATCH
    for certificate in info.certificates.values():
        rates = certificate.images_per_second.get(runtime)
        if rates:
            return max(rates, key=lambda images: rates[images])
    return DEFAULT_BATCH


class OnnxRuntime:
    """An onnxruntime session; safe to call from several threads."""

    def __init__(self, model: bytes, *, threads: int | None = None, device: str = "cpu") -> None:
        """Open a model's bytes on the CPU, or on an NVIDIA GPU where this onnxruntime has its provider.

        Raises:
            BundleError: the bytes are no ONNX, refer to other files, or onnxruntime refuses them.
        """
        import onnxruntime

        check_graph(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A spinning thread pool takes a core from other processes while this one decodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # it would keep memory for each batch size seen: a fifth more
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # TF32 fails fp32's probes
        try:
            self._session: Any = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as err:  # its error classes have no common base below Exception
            reason = one_line(err, 200)
            raise BundleError(f"onnxruntime refuses the model ({reason}); pack the bundle again.") from None

    def score(self, pixels_BHWC: Pixels) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32; the pixels are not copied."""
        logits_BK, embedding_BD = self._session.run(["logits", "embedding"], {"pixels": pixels_BHWC})
        return logits_BK, embedding_BD


class TorchRuntime:
    """A PyTorch network on a device, in bfloat16; calls from several threads are computed one after another.

    Pixels are copied to the device as uint8. On a GPU one CUDA graph computes every batch, the last one padded.
    """

    def __init__(
        self, weights: bytes, info: BundleInfo, *, device: str = "cpu", threads: int | None = None, batch_images: int
    ) -> None:
        """Build the network of a bundle's description and load its weights.

        Raises:
            BundleError: the weights are damaged or of another network, or timm does not know the network.
        """
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import load

        from carray.search.train.hyperparameters import read_hyper
        from carray.search.train.nets import build_net

        if not _is_built_in(info):
            raise BundleError(
                f"the bundle's network is {info.net.get('backbone')!r}, which timm does not know without a hub or "
                "folder, and a bundle must not refer to either; use runtime fp32 or int8."
            )
        if threads and device == "cpu":
            torch.set_num_threads(threads)
        try:
            net = build_net(read_hyper(info.net), class_count=len(info.classes), load_weights=False)
            net.load_state_dict(load(weights))
        except (ValidationError, SafetensorError, RuntimeError) as err:
            raise BundleError(
                f"the bundle's weights are damaged or of another network ({one_line(err, 200)}); pack it again."
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

        parts = torch.from_numpy(np.ascontiguousarray(pixels_BHWC)).split(self._batch_images)
        with self._lock, torch.inference_mode():
            scored = [[output.float().cpu().numpy() for output in self._score_part(part)] for part in parts]
        logits, embeddings = zip(*scored, strict=True)
        return np.concatenate(logits), np.concatenate(embeddings)

    def _score_part(self, pixels_BHWC: Any) -> Any:
        if self._graph is None:
            return self._forward(pixels_BHWC.to(self._device))
        self._input[: len(pixels_BHWC)].copy_(pixels_BHWC)
        self._graph.replay()
        return [output[: len(pixels_BHWC)] for output in self._outputs]

    def _forward(self, pixels_BHWC: Any) -> Any:
        import torch

        # A permuted uint8 NHWC batch already has channels_last memory format.
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


def check_graph(model: bytes) -> None:
    """Accept an ONNX file only if it refers to no other file.

    Given bytes, onnxruntime reads a tensor's external data from below the working directory (seen on 1.32), so the
    logits of a hostile model could leak files there, such as `.aws/credentials`.

    Raises:
        BundleError: it is no ONNX, or one of its tensors or nodes refers to another file.
    """
    import onnx

    try:
        parsed = onnx.load_model_from_string(model)
    except Exception as err:  # protobuf's, which is no dependency of ours
        raise BundleError(f"the model is not ONNX ({one_line(err)}); copy the bundle again.") from None
    for part in _messages(parsed):
        kind = part.DESCRIPTOR.name
        if kind == "TensorProto" and (part.external_data or part.data_location == onnx.TensorProto.EXTERNAL):
            raise BundleError(
                f"the model keeps its tensor {part.name[:80]!r} in another file, which the model of a bundle never "
                "does; use a bundle that carray packed."
            )
        if kind == "NodeProto" and part.op_type == "EPContext":  # a compiled engine, which may be a path
            raise BundleError("the model holds an EPContext node, which names another file; use a bundle of carray's.")


def _messages(message: Any) -> Iterator[Any]:
    """Give a protobuf message and all messages inside it: graphs, subgraphs, functions, attributes."""
    waiting = [message]
    while waiting:
        part = waiting.pop()
        yield part
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += [value] if hasattr(value, "ListFields") else list(value)

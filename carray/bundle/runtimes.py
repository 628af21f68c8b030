"""Names the runtimes that can score a bundle, chooses among them, and opens those of onnxruntime.

    fp32         onnxruntime in 32-bit floats; on an NVIDIA GPU where onnxruntime has its provider
    int8         onnxruntime in 8-bit integers, on CPUs
    torch-bf16   PyTorch in bfloat16, made for GPUs (bundle.torch_runtime)

Invariants: on a CPU `auto` takes only what a certificate holds for, and fp32, which needs none; what was chosen depends
on the bundle and the device alone, so that a driver decides for all its workers.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import RUNTIME_FILES, BundleInfo
from carray.bundle.graph import check_graph
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say

__all__ = ["OnnxRuntime", "best_batch", "is_of_timm", "resolve_runtime"]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

DEFAULT_BATCH = 32
CUDA_BATCH = 256
"""Images that fill a GPU; what was measured on a CPU at packing says nothing of it."""


def resolve_runtime(runtime: str, info: BundleInfo, *, device: str = "cpu") -> str:
    """Turn `auto` into the fastest runtime, on cpu or cuda, whose certificate in this bundle holds.

    Raises:
        SettingsError: the runtime is unknown, or the bundle has no file for it.
    """
    if runtime == "auto":
        chosen = _fastest(info, device)
        refused = info.certificates.get("int8")
        if chosen == "fp32" and device == "cpu" and refused and not refused.holds:
            why = f"the int8 certificate of bundle {info.bundle_id} does not hold: {refused.reason}"
            say(f"runtime: auto takes fp32, since {why}")
        return chosen
    present = [name for name, file in RUNTIME_FILES.items() if file in info.files]
    certificate = info.certificates.get(runtime)
    if runtime not in present:
        why = f" (int8 was left out: {certificate.reason})" if certificate else ""
        why = "; carray quantize adds int8" if runtime == "int8" and not certificate else why
        raise SettingsError(f"runtime is {runtime!r}; this bundle has {', '.join(['auto', *present])}{why}.")
    if runtime != "fp32" and not (certificate and certificate.holds):
        reason = certificate.reason if certificate else "it has none"
        say(f"warning: bundle {info.bundle_id} holds no certificate for {runtime} ({reason}); labels may differ")
    return runtime


def is_of_timm(info: BundleInfo) -> bool:
    """Say whether timm builds the bundle's network by itself, and reads no hub or folder that the bundle names."""
    return not {":", "/"} & set(str(info.net.get("backbone", "")))


def _fastest(info: BundleInfo, device: str) -> str:
    holding = {name: found for name, found in info.certificates.items() if found.holds}
    if device == "cuda" and is_of_timm(info):  # what it computes there is held against fp32's probes by each worker
        return "fp32" if "torch-bf16" in info.certificates and "torch-bf16" not in holding else "torch-bf16"
    int8 = holding.get("int8")
    if int8 is None or RUNTIME_FILES["int8"] not in info.files:
        return "fp32"
    speed = {name: max(rates.values()) for name, rates in int8.images_per_second.items()}
    return max(("fp32", "int8"), key=lambda name: speed.get(name, 0.0))


def best_batch(info: BundleInfo, runtime: str, *, device: str = "cpu") -> int:
    """Give the number of images of a forward pass that was fastest when the bundle was packed."""
    if device == "cuda":
        return CUDA_BATCH
    for certificate in info.certificates.values():
        rates = certificate.images_per_second.get(runtime)
        if rates:
            return max(rates, key=lambda images: rates[images])
    return DEFAULT_BATCH


class OnnxRuntime:
    """Holds one onnxruntime session; safe to call from several threads."""

    def __init__(self, model: bytes, *, threads: int | None = None, device: str = "cpu") -> None:
        """Open a model's bytes on the CPU, or on an NVIDIA GPU where this onnxruntime has its provider.

        Raises:
            BundleError: the bytes are no ONNX that is whole in itself, or onnxruntime refuses them.
        """
        import onnxruntime

        check_graph(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A spinning pool burns a neighbour's core while this process decodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # one block for all activations of each batch size seen: a fifth more memory
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))  # TF32 would not pass fp32's probes
        try:
            self._session: Any = onnxruntime.InferenceSession(model, options, providers=providers)
        except Exception as err:  # one class for each of its status codes, without a common one below Exception
            reason = " ".join(str(err).split())[:200]
            raise BundleError(f"onnxruntime refuses the model ({reason}); pack the bundle again.") from None

    def score(self, pixels_BHWC: Pixels) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32; onnxruntime reads the pixels where they lie."""
        logits_BK, embedding_BD = self._session.run(["logits", "embedding"], {"pixels": pixels_BHWC})
        return logits_BK, embedding_BD

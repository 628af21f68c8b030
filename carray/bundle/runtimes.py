"""The runtimes that can score a bundle, and the choice among them.

    fp32         onnxruntime in 32-bit floats; on an NVIDIA GPU where onnxruntime has its provider
    int8         onnxruntime in 8-bit integers, on CPUs
    bf16         OpenVINO in bfloat16, on CPUs that have AVX-512 BF16 or AMX, where openvino is installed
    torch-bf16   PyTorch in bfloat16, meant for GPUs; importing torch and timm takes about 15 s and 1 GB

On a CPU `auto` chooses fp32, which needs no certificate, or a runtime whose certificate holds: by the rates in the
certificates, or for a long job by those that a machine of the job measures. A driver decides for all its workers.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from carray.bundle.bundle_folder import RUNTIME_FILES, BundleInfo
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.text import one_line

__all__ = [
    "OnnxRuntime",
    "OpenVinoRuntime",
    "TorchRuntime",
    "best_batch",
    "bf16_obstacle",
    "certified_rates",
    "check_graph",
    "measure_rates",
    "resolve_runtime",
    "uses_gpus",
]

Floats = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]

DEFAULT_BATCH = 32
CUDA_BATCH = 256
"""Images that fill a GPU; the rates in a certificate are of a CPU."""
WARM_UPS = 3
"""Forward passes before a CUDA graph is captured, in which libraries choose kernels and allocate memory."""


def resolve_runtime(
    runtime: str, info: BundleInfo, *, device: str = "cpu", here: bool = True, warns: bool = True
) -> str:
    """Resolve `auto` to the runtime that was fastest when the bundle was packed, of those that may score.

    Args:
        runtime: A runtime's name or `auto`.
        info: The bundle's description.
        device: cpu or cuda, on which `auto` is fp32.
        here: Whether this machine scores; else others do, whose processors are not known.
        warns: Whether a runtime without a certificate is worth a line; the driver of a job has said so already.

    Raises:
        SettingsError: the runtime is unknown, the bundle has no file for it, or this machine cannot run it.
    """
    certificate = info.certificates.get("int8" if runtime == "auto" else runtime)
    if runtime == "auto" and device == "cuda":
        if _is_built_in(info):
            say("runtime: auto takes fp32 on GPUs; torch-bf16, which was never measured on one, has to be named")
        return "fp32"
    if runtime == "auto":
        rates = certified_rates(info, here=here)
        chosen = max(rates, key=lambda name: rates[name])
        if chosen != "int8" and certificate and not certificate.holds:
            why = f"the int8 certificate of bundle {info.bundle_id} does not hold: {certificate.reason}"
            say(f"runtime: auto takes {chosen}, since {why}")
        return chosen
    present = [name for name, file in RUNTIME_FILES.items() if file in info.files]
    if runtime not in present:
        why = f" (int8 was left out: {certificate.reason})" if certificate else ""
        why = "; carray quantize adds int8" if runtime == "int8" and not certificate else why
        raise SettingsError(f"runtime is {runtime!r}; this bundle has {', '.join(['auto', *present])}{why}.")
    if runtime == "bf16" and here and (obstacle := bf16_obstacle()):
        raise SettingsError(f"runtime bf16 cannot score here: {obstacle}; take auto, fp32 or int8.")
    if warns and runtime != "fp32" and not (certificate and certificate.holds):
        reason = certificate.reason if certificate else "it has none"
        say(f"warning: bundle {info.bundle_id} holds no certificate for {runtime} ({reason}); labels may differ")
    return runtime


def certified_rates(info: BundleInfo, *, here: bool = True) -> dict[str, float]:
    """Give the runtimes that `auto` may choose on a CPU, fp32 first, with their packed rates.

    Rates are images a second of one thread. Each certificate was measured beside fp32, perhaps on machines of their
    own, so the others' are scaled to the fp32 of the first.
    """
    rates, fp32 = {"fp32": 0.0}, 0.0
    for name in ("int8", "bf16"):
        found = info.certificates.get(name)
        runs = name == "int8" or (here and not bf16_obstacle())
        if not (found and found.holds and runs and RUNTIME_FILES[name] in info.files):
            continue
        speed = {of: max(measured.values()) for of, measured in found.images_per_second.items() if measured}
        fp32 = fp32 or speed.get("fp32", 0.0)
        scale = fp32 / speed["fp32"] if speed.get("fp32") else 1.0
        rates |= {"fp32": fp32, name: round(speed.get(name, 0.0) * scale, 1)}
    return rates


def bf16_obstacle() -> str:
    """Say why the runtime bf16 cannot run on this machine; empty where it can. OpenVINO is not imported for it."""
    if find_spec("openvino") is None:
        return "openvino is not installed (pip install 'carray[openvino]')"
    if not _BF16_FLAGS & _processor_flags():
        return "the processor has neither AVX-512 BF16 nor AMX"
    return ""


_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def _processor_flags() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return set(next((line for line in file if line.startswith("flags")), "").split())
    except OSError:
        return set()


def uses_gpus(runtime: str) -> bool:
    """Say whether a runtime, or `auto`, can score on GPUs with the libraries installed here."""
    return runtime == "torch-bf16" or (runtime in ("auto", "fp32") and _has_cuda())


def _has_cuda() -> bool:
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def measure_rates(
    passes: Mapping[str, Callable[[], object]], images: Mapping[str, int], *, seconds: float
) -> dict[str, float]:
    """Measure runtimes in turn, by the fastest pass of each; gives images a second of a core.

    Processor time counts, so that what else runs on the machine disturbs little.

    Args:
        passes: Computes one batch of each runtime.
        images: Images of that batch.
        seconds: How long to measure; each runtime gets two passes at least, and one before that.
    """
    fastest = dict.fromkeys(passes, float("inf"))
    for score in passes.values():
        score()  # the first pass allocates
    until, turns = time.perf_counter() + seconds, 0
    while turns < 2 or time.perf_counter() < until:
        for name, score in passes.items():
            started = time.process_time()
            score()
            fastest[name] = min(fastest[name], time.process_time() - started)
        turns += 1
    return {name: round(images[name] / max(taken, 1e-6), 1) for name, taken in fastest.items()}


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
            SettingsError: the device is cuda, but this onnxruntime has no provider for it.
        """
        import onnxruntime

        check_graph(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A spinning thread pool takes a core from other processes while this one decodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = False  # it would keep memory for each batch size seen: a fifth more
        providers: list[Any] = ["CPUExecutionProvider"]
        if device == "cuda":
            if not _has_cuda():
                raise SettingsError(
                    "device is 'cuda', but this onnxruntime has no CUDA provider; install onnxruntime-gpu in its "
                    "place, take runtime torch-bf16, or device cpu."
                )
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


class OpenVinoRuntime:
    """A model compiled by OpenVINO for bfloat16 on a CPU; calls from several threads are computed one after another.

    Beside onnxruntime in fp32: 1.7 to 2.2 times the rate, 0.1 s more of a core at the start, less memory
    (results/LOG.md). Compiled models are not kept in files: they would be native code that a folder is trusted with.
    """

    def __init__(self, model: bytes, *, threads: int | None = None) -> None:
        """Compile a model's bytes.

        Raises:
            BundleError: the bytes are no ONNX, refer to other files, or OpenVINO refuses them.
            SettingsError: this machine cannot run it.
        """
        check_graph(model)
        if obstacle := bf16_obstacle():
            raise SettingsError(f"runtime bf16 cannot score here: {obstacle}; take auto, fp32 or int8.")
        openvino = _import_openvino()
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads or len(os.sched_getaffinity(0)),
            "ENABLE_CPU_PINNING": False,  # every worker would pin itself to the same first core
        }
        try:
            # Core.read_model would guess the format, and knows others that name files.
            frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
            graph = frontend.convert(frontend.load(io.BytesIO(model)))
            self._request: Any = openvino.Core().compile_model(graph, "CPU", properties).create_infer_request()
        except Exception as err:  # its error classes have no common base below Exception
            raise BundleError(
                f"OpenVINO refuses the model ({one_line(err, 200)}); score with --runtime fp32."
            ) from None
        self._lock = threading.Lock()

    def score(self, pixels_BHWC: Pixels) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32; the pixels are not copied."""
        with self._lock:
            found = self._request.infer({"pixels": np.ascontiguousarray(pixels_BHWC)}, share_inputs=True)
        return found["logits"], found["embedding"]


def _import_openvino() -> Any:
    """Import OpenVINO without its converter, whose import reports to OpenVINO's maker, and takes longer than the rest.

    No variable turns that report off; only a file in the user's home folder would.
    """
    converter = "openvino.tools.ovc"
    sys.modules.setdefault(converter, None)  # type: ignore[arg-type]  # importing it fails, which OpenVINO allows for
    try:
        import openvino
    finally:
        if sys.modules[converter] is None:
            del sys.modules[converter]
    return openvino


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

    Given bytes, onnxruntime (seen on 1.32) and OpenVINO (2026.4) read a tensor's external data from below the working
    directory, so the logits of a hostile model could leak files there, such as `.aws/credentials`.

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

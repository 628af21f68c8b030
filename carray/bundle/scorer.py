"""Scores images with a bundle: on CPUs through onnxruntime, without importing torch; on GPUs through PyTorch.

From: a bundle's URI, and uint8 pixels or image paths. To: logits, and the columns that say what they mean.
Invariants: a scorer answers only after its logits for the bundle's probe images matched the packed ones on this very
machine; an unreadable image is a row with its reason.
Cost: importing onnxruntime takes 0.5 s and 50 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import PROBES, RUNTIME_FILES, BundleInfo, open_bundle, read_bundle_file
from carray.bundle.columns import centred_energy, score_columns
from carray.bundle.runtimes import OnnxRuntime, best_batch, resolve_runtime
from carray.core.errors import BundleError
from carray.core.store.files import absolute
from carray.core.text import readable
from carray.images.read import read_image

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Classifier", "Scorer", "centred_energy", "prediction_text", "resolve_runtime", "score_columns"]

Floats = npt.NDArray[np.float32]

PROBE_TOLERANCE = 1e-3
"""Largest difference of a probe's logit, in units of the logits' own spread, that another CPU may show in fp32."""
INT8_TOLERANCE = 0.7
"""Largest root mean square difference from the packed int8 logits, in units of theirs from fp32's.

Integers add up alike on every CPU, but what lies between them is rounded by another code path here and there: with
all fusions off, the same file differs by 0.34 to 0.47 of that unit (EfficientNet-Lite0, three calibrations). A CPU that
saturates, as U8S8 may without VNNI, loses whole sums, not last bits.
"""
BF16_TOLERANCE = 0.2
"""Largest root mean square difference from fp32's logits, in units of their spread; EfficientNet-Lite0 shows 0.06."""


class Scorer:
    """Holds one opened runtime of a bundle; safe to call from several threads."""

    def __init__(self, uri: str, *, runtime: str = "auto", threads: int | None = None, device: str = "cpu") -> None:
        """Open a bundle on `cpu` or `cuda`, check its hashes and its probes.

        Raises:
            BundleError: damaged, of another version, or this machine computes other logits than were packed.
            SettingsError: a runtime that the bundle does not have.
        """
        self.uri = absolute(uri)
        self.info = open_bundle(self.uri)
        self.runtime = resolve_runtime(runtime, self.info, device=device)
        self.batch_images = best_batch(self.info, self.runtime, device=device)
        """Images of a forward pass that suit the runtime best."""
        self._runtime = self._open(threads, device)
        self._check_probes()

    def score(self, pixels_BHWC: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32, for a batch of `pixels.view` outputs (uint8)."""
        return self._runtime.score(pixels_BHWC)

    def _open(self, threads: int | None, device: str) -> Any:
        file = read_bundle_file(self.uri, self.info, RUNTIME_FILES[self.runtime])
        if self.runtime == "torch-bf16":
            from carray.bundle.torch_runtime import TorchRuntime

            return TorchRuntime(file, self.info, device=device, threads=threads, batch_images=self.batch_images)
        return OnnxRuntime(file, threads=threads, device=device)

    def _check_probes(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            probes = load(read_bundle_file(self.uri, self.info, PROBES))
            pixels_NHWC, fp32_NK = probes["pixels_NHWC"], probes["logits_fp32"]
            int8_NK = probes["logits_int8"] if self.runtime == "int8" else fp32_NK
        except (SafetensorError, KeyError) as err:
            raise BundleError(f"{self.uri} has damaged probe images ({_one_line(err)}); pack it again.") from None
        # A few at a time: what the largest batch once took, the session keeps.
        found_NK = np.concatenate([self.score(part)[0] for part in np.array_split(pixels_NHWC, 4)])
        if self.runtime == "int8":
            difference, limit = _rms(found_NK - int8_NK), _rms(int8_NK - fp32_NK)
            limit *= INT8_TOLERANCE
        elif self.runtime == "torch-bf16":
            difference, limit = _rms(found_NK - fp32_NK), BF16_TOLERANCE * float(fp32_NK.std())
        else:
            difference = float(np.abs(found_NK - fp32_NK).max())
            limit = PROBE_TOLERANCE * max(1.0, float(fp32_NK.std()))
        if not difference <= limit:
            remedy = "pack it again" if self.runtime == "fp32" else "score with --runtime fp32"
            raise BundleError(
                f"{self.uri} gives logits that differ by {difference:.2g} from the packed ones on its probe images "
                f"(at most {limit:.2g} is allowed) with runtime {self.runtime} on this machine; {remedy}."
            )


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())[:200]


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


class Classifier:
    """Classifies a few images in this process: the small sibling of `carray classify`."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    @classmethod
    def load(cls, bundle: str, *, runtime: str = "auto") -> Classifier:
        """Open a bundle, local or S3.

        Raises:
            BundleError: no finished bundle lies there, it is damaged, or it computes other logits here.
        """
        return cls(Scorer(bundle, runtime=runtime))

    @property
    def info(self) -> BundleInfo:
        """Give what the bundle says of itself."""
        return self._scorer.info

    def predict(self, paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
        """Classify images, one row each in the given order; an unreadable one has its status and reason instead."""
        import pandas as pd

        return pd.DataFrame([self._row(absolute(path)) for path in paths], columns=_COLUMNS)

    def _row(self, uri: str) -> dict[str, Any]:
        read = read_image(uri, self.info.pixels, as_input=True)
        row = {"uri": uri, **read.columns}
        if read.pixels_HWC is None:
            return row
        logits_BK, _ = self._scorer.score(read.pixels_HWC[None])
        return row | {name: values[0] for name, values in score_columns(logits_BK, self.info).items()}


def prediction_text(predictions: pd.DataFrame) -> str:
    """Lay predictions out for a terminal: a line an image, and below it its five likeliest classes or its reason."""
    lines = []
    for row in predictions.to_dict("records"):
        name = readable(row["uri"])
        if row["status"] != "ok":
            lines.append(f"{name}\n  {row['status']}: {readable(row['error'])}")
            continue
        top = zip(row["top5_labels"], row["top5_scores"], strict=True)
        lines += [name + _verdict(row["accept"]), *(f"  {score:6.1%}  {readable(label)}" for label, score in top)]
    return "\n".join(lines)


def _verdict(accept: bool | None) -> str:
    """Say whether the bundle's threshold lets the label through; nothing where it has none."""
    return "" if accept is None else "  accepted" if accept else "  not accepted: below the bundle's threshold"


_COLUMNS = [
    *("uri", "status", "error_code", "error", "label", "score", "margin", "entropy", "top5_labels", "top5_scores"),
    "accept",
]

"""Scores images with a bundle, through onnxruntime; imports no torch.

From: a bundle's URI, and uint8 pixels or image paths. To: logits, and the columns that say what they mean.
Invariants: a scorer answers only after its logits for the bundle's probe images matched the packed ones on this very
machine; an unreadable image is a row with its reason.
Cost: importing onnxruntime takes 0.5 s and 50 MB.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.format import PROBES, RUNTIME_FILES, BundleInfo, open_bundle, read_bundle_file
from carray.core.errors import BundleError, DecodeError, FetchError, SettingsError
from carray.core.images import fetch_image
from carray.core.storage import absolute
from carray.pixels import decode, view

__all__ = ["Classifier", "Scorer", "prediction_text", "resolve_runtime", "score_columns"]

Floats = npt.NDArray[np.float32]

PROBE_TOLERANCE = 1e-3
"""Largest difference of a probe's logit, in units of the logits' own spread, that another CPU may show in fp32."""


def resolve_runtime(runtime: str, info: BundleInfo) -> str:
    """Turn `auto` into the runtime this bundle holds a certificate for.

    Raises:
        SettingsError: the runtime is unknown, or the bundle has no file for it.
    """
    if runtime == "auto":
        return "fp32"
    if runtime not in RUNTIME_FILES or RUNTIME_FILES[runtime] not in info.files:
        raise SettingsError(f"runtime is {runtime!r}; this bundle has {', '.join(['auto', *RUNTIME_FILES])}.")
    return runtime


class Scorer:
    """Holds one onnxruntime session of a bundle; safe to call from several threads."""

    def __init__(self, uri: str, *, runtime: str = "auto", threads: int | None = None) -> None:
        """Open a bundle, check its hashes and its probes.

        Raises:
            BundleError: damaged, of another version, or this machine computes other logits than were packed.
            SettingsError: a runtime that the bundle does not have.
        """
        import onnxruntime

        self.uri = absolute(uri)
        self.info = open_bundle(self.uri)
        self.runtime = resolve_runtime(runtime, self.info)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        # A spinning pool burns a neighbour's core while this process decodes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = read_bundle_file(self.uri, self.info, RUNTIME_FILES[self.runtime])
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._check_probes()

    def score(self, pixels_BHWC: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32, for a batch of `pixels.view` outputs (uint8)."""
        logits_BK, embedding_BD = self._session.run(["logits", "embedding"], {"pixels": pixels_BHWC})
        return logits_BK, embedding_BD

    def _check_probes(self) -> None:
        from safetensors.numpy import load

        probes = load(read_bundle_file(self.uri, self.info, PROBES))
        expected_NK = probes[f"logits_{self.runtime}"]
        difference = float(np.abs(self.score(probes["pixels_NHWC"])[0] - expected_NK).max())
        limit = PROBE_TOLERANCE * max(1.0, float(expected_NK.std()))
        if not difference <= limit:
            raise BundleError(
                f"{self.uri} gives logits that differ by {difference:.2g} from the packed ones on its probe images "
                f"(at most {limit:.2g} is allowed) with runtime {self.runtime}; use another runtime or pack it again."
            )


def score_columns(logits_BK: Floats, info: BundleInfo) -> dict[str, list[Any]]:
    """Turn logits into the columns label, score, margin, entropy, top5_labels and top5_scores, one value an image.

    Scores are calibrated probabilities (softmax of logits / temperature), float in 0..1; margin is the first score
    less the second (less 0 with one class); entropy is in nats.
    """
    scaled_BK = logits_BK.astype(np.float64) / info.temperature
    scaled_BK -= scaled_BK.max(axis=1, keepdims=True)
    scores_BK = np.exp(scaled_BK)
    scores_BK /= scores_BK.sum(axis=1, keepdims=True)
    order_B5 = np.argsort(-scores_BK, axis=1, kind="stable")[:, :5]
    top_B5 = np.take_along_axis(scores_BK, order_B5, axis=1)
    runner_up_B = top_B5[:, 1] if top_B5.shape[1] > 1 else np.zeros(len(top_B5))
    entropy_B = -(scores_BK * np.log(np.maximum(scores_BK, 1e-300))).sum(axis=1)
    return {
        "label": [info.classes[i] for i in order_B5[:, 0]],
        "score": top_B5[:, 0].tolist(),
        "margin": (top_B5[:, 0] - runner_up_B).tolist(),
        "entropy": entropy_B.tolist(),
        "top5_labels": [[info.classes[i] for i in order] for order in order_B5],
        "top5_scores": top_B5.tolist(),
    }


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
        return pd.DataFrame([self._row(absolute(path)) for path in paths], columns=_COLUMNS)

    def _row(self, uri: str) -> dict[str, Any]:
        try:
            pixels_HWC = decode(fetch_image(uri).data, self.info.pixels).pixels_HWC
        except (FetchError, DecodeError) as err:
            status = "fetch_error" if isinstance(err, FetchError) else "decode_error"
            return {"uri": uri, "status": status, "error_code": err.code, "error": str(err)}
        logits_BK, _ = self._scorer.score(view(pixels_HWC, self.info.pixels)[None])
        scored = {name: values[0] for name, values in score_columns(logits_BK, self.info).items()}
        return {"uri": uri, "status": "ok", **scored}


def prediction_text(predictions: pd.DataFrame) -> str:
    """Lay predictions out for a terminal: a line an image, and below it its five likeliest classes or its reason."""
    lines = []
    for row in predictions.to_dict("records"):
        # A name may hold a newline or a terminal's control codes: it is shown, never obeyed.
        name = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(row["uri"]))
        if row["status"] != "ok":
            lines.append(f"{name}\n  {row['status']}: {row['error']}")
            continue
        top = zip(row["top5_labels"], row["top5_scores"], strict=True)
        lines.append("\n".join([name, *(f"  {score:6.1%}  {label}" for label, score in top)]))
    return "\n".join(lines)


_COLUMNS = [
    *("uri", "status", "error_code", "error", "label", "score", "margin", "entropy", "top5_labels", "top5_scores"),
]

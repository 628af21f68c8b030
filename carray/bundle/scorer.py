"""Scores images with a bundle, and turns logits into the columns of a prediction row.

A scorer is usable only after its logits for the bundle's probe images matched the packed ones on this machine. Torch is
imported only for the runtime torch-bf16, OpenVINO only for bf16; importing onnxruntime takes 0.5 s and 50 MB.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Hashable, Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import PROBES, RUNTIME_FILES, BundleInfo, open_bundle, read_bundle_file
from carray.bundle.runtimes import (
    OnnxRuntime,
    OpenVinoRuntime,
    TorchRuntime,
    best_batch,
    measure_rates,
    resolve_runtime,
)
from carray.bundle.threshold import calibrated_scores
from carray.core.errors import BundleError, SettingsError
from carray.core.store.files import absolute
from carray.core.text import one_line, readable
from carray.images.read import read_image
from carray.images.vehicles import parse_vehicle

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Classifier",
    "Scorer",
    "centred_energy",
    "measure_runtimes",
    "prediction_text",
    "resolve_runtime",
    "score_columns",
]

Floats = npt.NDArray[np.float32]

TOP = 5
PROBE_TOLERANCE = 1e-3
"""Largest allowed difference of a probe's fp32 logit, in units of the logits' standard deviation."""
INT8_TOLERANCE = 0.7
"""Largest allowed RMS difference from the packed int8 logits, in units of the RMS difference of int8 from fp32.

Integer sums are the same on every CPU, but the rounding between them is not: with all fusions off, the same file
differs by 0.34 to 0.47 of that unit (EfficientNet-Lite0, three calibrations). A CPU on which U8S8 saturates, as without
VNNI, differs by far more.
"""
BF16_TOLERANCE = 0.2
"""Largest allowed RMS difference from fp32's logits, in units of their standard deviation; EfficientNet-Lite0: 0.06."""
MEASURING_SECONDS = 1.0


class Scorer:
    """An opened runtime of a bundle; safe to call from several threads."""

    def __init__(
        self, uri: str, *, runtime: str = "auto", threads: int | None = None, device: str = "cpu", warns: bool = True
    ) -> None:
        """Open a bundle on `cpu` or `cuda`, check its hashes and its probes; `warns` as in `resolve_runtime`.

        Raises:
            BundleError: the bundle is damaged or of another version, or this machine computes other logits.
            SettingsError: the bundle does not have that runtime, or this machine cannot run it.
        """
        self.uri = absolute(uri)
        self.info = open_bundle(self.uri)
        self.runtime = resolve_runtime(runtime, self.info, device=device, warns=warns)
        self.batch_images = best_batch(self.info, self.runtime, device=device)
        """The runtime's fastest batch size."""
        file = read_bundle_file(self.uri, self.info, RUNTIME_FILES[self.runtime])
        self._runtime: OnnxRuntime | OpenVinoRuntime | TorchRuntime
        if self.runtime == "torch-bf16":
            self._runtime = TorchRuntime(
                file, self.info, device=device, threads=threads, batch_images=self.batch_images
            )
        elif self.runtime == "bf16":
            self._runtime = OpenVinoRuntime(file, threads=threads)
        else:
            self._runtime = OnnxRuntime(file, threads=threads, device=device)
        self._check_probes()

    def score(self, pixels_BHWC: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Compute logits_BK and embedding_BD, float32, for a batch of `pixels.view` outputs (uint8)."""
        return self._runtime.score(pixels_BHWC)

    def _check_probes(self) -> None:
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            probes = load(read_bundle_file(self.uri, self.info, PROBES))
            pixels_NHWC, fp32_NK = probes["pixels_NHWC"], probes["logits_fp32"]
            int8_NK = probes["logits_int8"] if self.runtime == "int8" else fp32_NK
        except (SafetensorError, KeyError) as err:
            raise BundleError(f"{self.uri} has damaged probe images ({one_line(err, 200)}); pack it again.") from None
        # A few at a time: a session keeps the memory of its largest batch.
        found_NK = np.concatenate([self.score(part)[0] for part in np.array_split(pixels_NHWC, 4)])
        if self.runtime == "int8":
            difference, limit = _rms(found_NK - int8_NK), _rms(int8_NK - fp32_NK)
            limit *= INT8_TOLERANCE
        elif self.runtime in ("bf16", "torch-bf16"):
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


def _rms(values: Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def measure_runtimes(uri: str, runtimes: Sequence[str]) -> dict[str, float]:
    """Measure runtimes of a bundle on one core of this machine, in turn, each with its own batch size.

    Gives images a second, without the runtimes that this machine cannot open or computes differently.
    Cost: a second of measuring, beside opening the runtimes.
    """
    scorers: dict[str, Scorer] = {}
    for name in runtimes:
        with suppress(BundleError, SettingsError):
            scorers[name] = Scorer(uri, runtime=name, threads=1)
    random, passes = np.random.default_rng(0), {}
    for name, scorer in scorers.items():
        shape = (scorer.batch_images, *2 * (scorer.info.pixels.input_size,), 3)
        passes[name] = partial(scorer.score, random.integers(0, 256, shape, dtype=np.uint8))
    images = {name: scorer.batch_images for name, scorer in scorers.items()}
    if len(passes) < 2:
        return dict.fromkeys(passes, 0.0)  # nothing to choose from
    return measure_rates(passes, images, seconds=MEASURING_SECONDS)


class Classifier(Scorer):
    """A bundle opened to classify a few images in this process."""

    @classmethod
    def load(cls, bundle: str, *, runtime: str = "auto") -> Classifier:
        """Open a bundle, local or in a bucket.

        Raises:
            BundleError: there is no finished bundle, it is damaged, or it computes other logits here.
        """
        return cls(bundle, runtime=runtime)

    def predict(self, paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
        """Classify images, one row each in the given order; an unreadable one has its status and reason."""
        import pandas as pd

        return pd.DataFrame([self._row(absolute(path)) for path in paths], columns=_COLUMNS)

    def _row(self, uri: str) -> dict[str, Any]:
        read = read_image(uri, self.info.pixels, as_input=True)
        row = {"uri": uri, **read.columns}
        if read.pixels_HWC is None:
            return row
        logits_BK, _ = self.score(read.pixels_HWC[None])
        return row | {name: values[0] for name, values in score_columns(logits_BK, self.info).items()}


def prediction_text(predictions: pd.DataFrame) -> str:
    """Format predictions for a terminal: each image with its five likeliest classes or its error."""
    verdicts = {True: "  accepted", False: "  not accepted: below the bundle's threshold"}
    lines = []
    for row in predictions.to_dict("records"):
        name = readable(row["uri"])
        if row["status"] != "ok":
            lines.append(f"{name}\n  {row['status']}: {readable(row['error'])}")
            continue
        top = zip(row["top5_labels"], row["top5_scores"], strict=True)
        lines += [
            name + verdicts.get(row["accept"], ""),
            *(f"  {score:6.1%}  {readable(label)}" for label, score in top),
        ]
    return "\n".join(lines)


_COLUMNS = [
    *("uri", "status", "error_code", "error", "label", "score", "margin", "entropy", "top5_labels", "top5_scores"),
    "accept",
]


def score_columns(
    logits_BK: Floats, info: BundleInfo, *, embedding_BD: Floats | None = None, outputs: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Turn logits into the columns label, score, margin, entropy, top5_labels, top5_scores and accept.

    Scores are calibrated probabilities (softmax of logits / temperature); of equal scores the class with the smaller
    index comes first. Margin is the first score minus the second (0 with one class); entropy is in nats; accept is null
    unless the bundle has a threshold. `outputs` adds: `embedding`, float32; `make_score` and `model_score`, the
    probability of the label's make, and of its make and model, summed over all classes, null where the label is no
    vehicle's name; `ood_score`, see `centred_energy`: higher means less like the training images.
    Cost: 2 microseconds an image with 196 classes in batches of 32, 4 in batches of 8; all optional columns double it.

    Raises:
        ValueError: `embedding` is asked for without embeddings.
    """
    scores_BK = calibrated_scores(logits_BK, temperature=info.temperature)
    first_B5 = _largest(scores_BK)
    top_B5 = np.take_along_axis(scores_BK, first_B5, axis=1)
    runner_up_B = top_B5[:, 1] if top_B5.shape[1] > 1 else np.zeros(len(top_B5))
    entropy_B = -(scores_BK * np.log(np.maximum(scores_BK, np.finfo(scores_BK.dtype).tiny))).sum(axis=1)
    threshold = info.accept_threshold
    columns: dict[str, list[Any]] = {
        "label": [info.classes[i] for i in first_B5[:, 0].tolist()],
        "score": top_B5[:, 0].tolist(),
        "margin": (top_B5[:, 0] - runner_up_B).tolist(),
        "entropy": entropy_B.tolist(),
        "top5_labels": [[info.classes[i] for i in first] for first in first_B5.tolist()],
        "top5_scores": top_B5.tolist(),
        "accept": [None] * len(top_B5) if threshold is None else (top_B5[:, 0] >= threshold).tolist(),
    }
    if "embedding" in outputs:
        if embedding_BD is None:
            raise ValueError("the column embedding is asked for, but no embeddings were given")
        columns["embedding"] = list(embedding_BD)
    groups = _vehicle_groups(tuple(info.classes))
    for name in ("make_score", "model_score"):
        if name in outputs:
            columns[name] = _group_scores(scores_BK, first_B5[:, 0], groups[name])
    if "ood_score" in outputs:
        columns["ood_score"] = centred_energy(logits_BK, temperature=info.temperature).tolist()
    return columns


def centred_energy(logits_BK: Floats, *, temperature: float) -> npt.NDArray[np.float64]:
    """Compute how close an image's scores are to uniform, float64 (B,), in nats; at most 0, where they are uniform.

    It is -KL(uniform || calibrated scores): the energy of Liu et al., 'Energy-based Out-of-distribution Detection',
    2020, of logits minus their mean, minus the energy of equal logits. The mean is removed because softmax ignores a
    constant added to all logits; without this the energy is useless for a network trained with label smoothing
    (results/outliers.csv). Comparable within one bundle only.
    """
    centred_BK = logits_BK.astype(np.float64) / temperature
    centred_BK -= centred_BK.mean(axis=1, keepdims=True)
    largest_B = centred_BK.max(axis=1)  # subtracted first, so that no exponential overflows
    sums_B = np.exp(centred_BK - largest_B[:, None]).sum(axis=1)
    return np.minimum(np.log(logits_BK.shape[1]) - largest_B - np.log(sums_B), 0.0)


def _largest(scores_BK: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Find the classes of the five largest scores (or of all), int64 (B, 5); `argmax` takes the first of equal ones."""
    remaining_BK, rows_B = scores_BK.copy(), np.arange(len(scores_BK))
    first_B5 = np.empty((len(scores_BK), min(TOP, scores_BK.shape[1])), dtype=np.int64)
    for rank in range(first_B5.shape[1]):
        first_B5[:, rank] = remaining_BK.argmax(axis=1)
        remaining_BK[rows_B, first_B5[:, rank]] = -1.0
    return first_B5


def _group_scores(
    scores_BK: npt.NDArray[np.float64], label_B: npt.NDArray[np.int64], group_K: npt.NDArray[np.int64]
) -> list[float | None]:
    """Sum each image's scores over the classes of its label's group; null for a label without a group."""
    wanted_B = group_K[label_B]
    sums_B = (scores_BK * (group_K == wanted_B[:, None])).sum(axis=1)
    # Rounding must not make a sum of all classes exceed 1.
    return [min(value, 1.0) if group >= 0 else None for value, group in zip(sums_B.tolist(), wanted_B, strict=True)]


@lru_cache(maxsize=4)
def _vehicle_groups(classes: tuple[str, ...]) -> dict[str, npt.NDArray[np.int64]]:
    """Number the make, and the make and model, of each class, int64 (K,); -1 where its name has none."""
    vehicles = [parse_vehicle(name) for name in classes]
    models = [vehicle.make and (vehicle.make, vehicle.model) for vehicle in vehicles]
    return {"make_score": _numbered([vehicle.make for vehicle in vehicles]), "model_score": _numbered(models)}


def _numbered(names: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    numbers = {name: i for i, name in enumerate(set(names) - {None})}
    return np.array([numbers.get(name, -1) for name in names], dtype=np.int64)

"""Adds faster runtimes to a bundle, each with a certificate of what it loses against fp32.

From: a finished bundle, and evaluation's views of training and labelled validation images. To: the same bundle, with
model.int8.onnx, its probes and its certificate; without the file, and with the reason, where it loses too much.
Invariants: `bundle_id` stays, since weights, classes, pixels and temperature do; both runtimes score the same images,
so the drop is paired; no image judges that the judged network was trained on. A refit has no such validation image, so
its twin, the network before the refit, is exported, quantised by the same recipe on the same images, and judged.
Cost: half a minute for EfficientNet-Lite0 at 160 pixels and 1,000 images, on one core; twice that for a refit.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import (
    INT8_MODEL,
    MODEL,
    PROBES,
    BundleInfo,
    Certificate,
    open_bundle,
    read_bundle_file,
    write_bundle,
)
from carray.bundle.quantise import CALIBRATION, quantise_model
from carray.bundle.runtimes import OnnxRuntime
from carray.core.errors import BundleError
from carray.core.progress import say
from carray.images.pixels import PixelSettings
from carray.tensors.block import Block

__all__ = [
    "AGREEMENT",
    "AGREEMENT_CONFIDENT",
    "CALIBRATION_IMAGES",
    "CERTIFY_IMAGES",
    "DROP_POINTS",
    "Views",
    "add_int8",
    "block_views",
    "draw_rows",
    "judge",
]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

DROP_POINTS, AGREEMENT, AGREEMENT_CONFIDENT, CONFIDENT = 0.5, 0.95, 0.99, 0.8
CALIBRATION_IMAGES, CALIBRATION_IMAGES_LEAST = 256, 16
CERTIFY_IMAGES, CERTIFY_IMAGES_LEAST = 1024, 100
"""At most: agreement of 95 % is then known to 0.7 points. At least: with fewer, one image is a whole point."""
SPEED_BATCHES, SPEED_SECONDS = (8, 32), 0.7


@dataclass(frozen=True)
class Views:
    """Holds what a certificate is made from: evaluation's views, uint8 NHWC, and the labels of those that judge."""

    calibration_NHWC: Pixels
    """Of training images."""
    judging_NHWC: Pixels
    """Of labelled images that the judged network was not trained on."""
    labels_N: Integers
    split: str = "val"
    """Of the judging images."""
    left_out: int = 0
    """Images of that split that do not judge, since the judged network was trained on them."""
    unknown: str = ""
    """Why nothing is known of which images the network was trained on, so that none may judge."""


def draw_rows(rows_N: Integers, count: int) -> Integers:
    """Draw at most `count` rows, the same ones each time, in their order."""
    if len(rows_N) <= count:
        return rows_N
    return np.sort(np.random.default_rng(0).choice(rows_N, size=count, replace=False))


def block_views(block: Block, unseen_N: Integers, pixels: PixelSettings, *, left_out: int) -> Views:
    """Draw views from a block: of its training images to calibrate on, of unseen validation rows to judge by."""
    from carray.tensors.batches import view_batch

    judging_N = draw_rows(unseen_N, CERTIFY_IMAGES)
    return Views(
        calibration_NHWC=view_batch(block, draw_rows(block.of_split("train"), CALIBRATION_IMAGES), pixels),
        judging_NHWC=view_batch(block, judging_N, pixels),
        labels_N=block.labels_N[judging_N],
        left_out=left_out,
    )


def add_int8(
    uri: str, views: Views, *, keep: bool = False, twin: bytes | None = None, standing: Certificate | None = None
) -> BundleInfo:
    """Quantise a bundle's model, judge it, and write both the file and its certificate.

    Args:
        uri: The bundle's folder.
        views: What it is calibrated and judged on.
        keep: Whether the file stays even if its certificate does not hold; `auto` passes it over all the same.
        twin: The model before a refit, as ONNX: it is judged in place of the bundle's own, which was trained on the
            judging images.
        standing: A certificate of an earlier quantisation by the same recipe, which stays where no image may judge.

    Raises:
        BundleError: no finished bundle lies there, or it is damaged.
        StorageError: storage refused a write.
    """
    from safetensors.numpy import load, save

    info = open_bundle(uri)
    model, probes = read_bundle_file(uri, info, MODEL), load(read_bundle_file(uri, info, PROBES))
    files = {name: entry for name, entry in info.files.items() if name != INT8_MODEL}
    problem = _problem(views)
    if problem and not standing:
        return _written(uri, info, files, _refused(problem, views), {})
    fp32 = OnnxRuntime(model, threads=1)
    try:
        int8_model = quantise_model(model, views.calibration_NHWC)
        int8 = OnnxRuntime(int8_model, threads=1)
    except BundleError:
        raise
    except Exception as err:  # onnxruntime fails on some networks, each in its own way
        problem = f"onnxruntime cannot quantise this network ({type(err).__name__}: {' '.join(str(err).split())[:160]})"
        return _written(uri, info, files, _refused(problem, views), {})
    if problem and standing:
        certificate = standing
    elif twin is None:
        certificate = _certify(fp32, int8, info, views)
    else:
        certificate = _certify_by_twin(fp32, int8, info, views, twin)
    if not (certificate.holds or keep):
        return _written(uri, info, files, certificate, {})
    probes["logits_int8"] = int8.score(probes["pixels_NHWC"])[0]
    return _written(uri, info, files, certificate, {INT8_MODEL: int8_model, PROBES: save(probes)})


def judge(fp32_NK: Floats, other_NK: Floats, labels_N: Integers, *, temperature: float) -> dict[str, Any]:
    """Compare a runtime's logits with fp32's on the same labelled images: the figures of a certificate, and whether.

    It holds where top-1 drops by at most 0.5 points, and labels agree on at least 95 % of all images and on 99 % of
    those that fp32 gives a score over 0.8.
    """
    fp32_N, other_N = fp32_NK.argmax(axis=1), other_NK.argmax(axis=1)
    scaled_NK = (fp32_NK - fp32_NK.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    confident_N = 1.0 / np.exp(scaled_NK).sum(axis=1) > CONFIDENT
    same_N = fp32_N == other_N
    top1_fp32, top1 = float((fp32_N == labels_N).mean()), float((other_N == labels_N).mean())
    drop_points, agreement = 100 * (top1_fp32 - top1), float(same_N.mean())
    agreement_confident = float(same_N[confident_N].mean()) if confident_N.any() else None
    problems = []
    if drop_points > DROP_POINTS + 1e-9:
        problems.append(f"top-1 drops {drop_points:.2f} points, above {DROP_POINTS}")
    if agreement < AGREEMENT:
        problems.append(f"labels agree on {agreement:.1%}, below {AGREEMENT:.0%}")
    if agreement_confident is not None and agreement_confident < AGREEMENT_CONFIDENT:
        problems.append(f"on {agreement_confident:.1%} of the sure ones, below {AGREEMENT_CONFIDENT:.0%}")
    return {
        "holds": not problems,
        "reason": "; ".join(problems),
        "images": len(labels_N),
        "top1_fp32": top1_fp32,
        "top1": top1,
        "drop_points": round(drop_points, 4),
        "agreement": agreement,
        "confident_images": int(confident_N.sum()),
        "agreement_confident": agreement_confident,
    }


def _certify(fp32: OnnxRuntime, int8: OnnxRuntime, info: BundleInfo, views: Views) -> Certificate:
    return Certificate(
        **_judged(fp32, int8, info, views),
        split=views.split,
        images_left_out=views.left_out,
        calibration=CALIBRATION,
        calibration_images=len(views.calibration_NHWC),
        images_per_second={
            name: {images: _speed(runtime, views.judging_NHWC[:images]) for images in SPEED_BATCHES}
            for name, runtime in (("fp32", fp32), ("int8", int8))
        },
        measured_on=_processor(),
    )


def _certify_by_twin(fp32: OnnxRuntime, int8: OnnxRuntime, info: BundleInfo, views: Views, twin: bytes) -> Certificate:
    """Certify by the twin's figures; the bundle's own must pass, too, though images it was trained on flatter it."""
    own = _certify(fp32, int8, info, views)
    twin_int8 = quantise_model(twin, views.calibration_NHWC)
    found = _judged(OnnxRuntime(twin, threads=1), OnnxRuntime(twin_int8, threads=1), info, views)
    if found["holds"] and not own.holds:
        found |= {"holds": False, "reason": f"after the refit, {own.reason}"}
    return own.model_copy(update={**found, "before_refit": True})


def _judged(fp32: OnnxRuntime, int8: OnnxRuntime, info: BundleInfo, views: Views) -> dict[str, Any]:
    fp32_NK, int8_NK = (_logits(runtime, views.judging_NHWC) for runtime in (fp32, int8))
    return judge(fp32_NK, int8_NK, views.labels_N, temperature=info.temperature)


def _logits(runtime: OnnxRuntime, pixels_NHWC: Pixels) -> Floats:
    batch = SPEED_BATCHES[0]
    parts = [runtime.score(pixels_NHWC[i : i + batch])[0] for i in range(0, len(pixels_NHWC), batch)]
    return np.concatenate(parts)


def _speed(runtime: OnnxRuntime, pixels_BHWC: Pixels) -> float:
    """Measure images a second by the fastest of many passes: what else the machine does only ever slows one."""
    runtime.score(pixels_BHWC)
    fastest, until = float("inf"), time.perf_counter() + SPEED_SECONDS
    while (started := time.perf_counter()) < until:
        runtime.score(pixels_BHWC)
        fastest = min(fastest, time.perf_counter() - started)
    return round(len(pixels_BHWC) / fastest, 1)


def _problem(views: Views) -> str:
    """Say why no certificate can be made from these views; empty where one can."""
    if views.unknown:
        return views.unknown
    if (judging := len(views.judging_NHWC)) < CERTIFY_IMAGES_LEAST:
        seen = f" (the network was trained on {views.left_out:,} others)" if views.left_out else ""
        name = {"val": "validation", "train": "training"}.get(views.split, views.split)
        other = "; carray quantize --split test judges by others" if views.left_out and views.split == "val" else ""
        return f"{judging} {name} images are too few to judge by{seen}, {CERTIFY_IMAGES_LEAST} are needed{other}"
    if len(views.calibration_NHWC) < CALIBRATION_IMAGES_LEAST:
        given = len(views.calibration_NHWC)
        return f"{given} training images are too few to calibrate on, {CALIBRATION_IMAGES_LEAST} are needed"
    return ""


def _refused(reason: str, views: Views) -> Certificate:
    """Give the certificate of a runtime that was not even tried."""
    return Certificate(
        holds=False,
        reason=reason,
        split=views.split,
        images=len(views.judging_NHWC),
        images_left_out=views.left_out,
        calibration_images=len(views.calibration_NHWC),
    )


def _written(
    uri: str, info: BundleInfo, entries: dict[str, Any], certificate: Certificate, files: dict[str, bytes]
) -> BundleInfo:
    """Write the bundle with its new certificate, and say what came out."""
    certificates = {**info.certificates, "int8": certificate}
    speeds = {name: max(rates.values()) for name, rates in certificate.images_per_second.items()}
    judged = (
        f"{certificate.images:,} {certificate.split} images{' before the refit' if certificate.before_refit else ''}"
    )
    figures = (
        f"top-1 {certificate.top1:.1%} (fp32 {certificate.top1_fp32:.1%}), labels agree on {certificate.agreement:.1%} "
        f"of {judged}, {speeds['int8']:.0f} images a second a thread (fp32 {speeds['fp32']:.0f})"
        if certificate.top1 is not None
        else ""
    )
    verdict = "holds its certificate" if certificate.holds else f"left out: {certificate.reason}"
    if files and not certificate.holds:
        verdict = f"kept without a certificate: {certificate.reason}"
    say(f"bundle: int8 {verdict}{f'; {figures}' if figures else ''}")
    return write_bundle(uri, info.model_copy(update={"certificates": certificates, "files": entries}), files)


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        return name

"""Adds the int8 runtime to a bundle, with a certificate of its accuracy compared with fp32, and certifies bf16.

Both runtimes score the same labelled images, none of which the network was trained on. After a refit no such
validation image is left; then the network before the refit is exported, quantised by the same recipe on the same
images, and compared instead. `bundle_id` stays the same.
Cost: half a minute for EfficientNet-Lite0 at 160 pixels and 1,000 images, on one core; twice that for a refit.

Quantisation is in bundle.quantise. Where the certificate does not hold with all layers in integers that usually are, a
search leaves some in floats.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import (
    INT8_MODEL,
    MODEL,
    PROBES,
    BundleInfo,
    Certificate,
    FloatSearch,
    open_bundle,
    read_bundle_file,
    write_bundle,
    write_info,
)
from carray.bundle.quantise import CALIBRATION, Judged, Quantiser, as_batches, search_floats
from carray.bundle.runtimes import OnnxRuntime, OpenVinoRuntime, bf16_obstacle, measure_rates
from carray.bundle.threshold import top_scores
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute
from carray.core.text import one_line
from carray.images.read import read_all
from carray.manifest.manifest_file import read_manifest, require_row

__all__ = ["Views", "add_int8", "certify_bf16", "compare_logits", "draw_rows", "quantise_bundle"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

DROP_POINTS, AGREEMENT, AGREEMENT_CONFIDENT, CONFIDENT = 0.5, 0.95, 0.99, 0.8
CALIBRATION_IMAGES, CALIBRATION_IMAGES_LEAST = 256, 16
CERTIFY_IMAGES, CERTIFY_IMAGES_LEAST = 1024, 100
"""With 1,024 images an agreement of 95 % is known to 0.7 points; below 100, one image is more than a point."""
SPEED_BATCHES, SPEED_SECONDS = (8, 32), 0.7


@dataclass(frozen=True)
class Views:
    """The images of a certificate: outputs of `pixels.view` without augmentation, uint8 NHWC."""

    calibration_NHWC: Pixels
    """Training images, to calibrate the ranges of activations on."""
    judging_NHWC: Pixels
    """Labelled images to compare the runtimes on; the network was not trained on them."""
    labels_N: Integers
    split: str = "val"
    """The split of the judging images."""
    left_out: int = 0
    """Images of that split that the network was trained on."""
    unknown: str = ""
    """Why it is not known which images the network was trained on, so that no certificate is possible; else empty."""


def draw_rows(rows_N: Integers, count: int) -> Integers:
    """Draw at most `count` rows, the same ones each time, in their order."""
    if len(rows_N) <= count:
        return rows_N
    return np.sort(np.random.default_rng(0).choice(rows_N, size=count, replace=False))


def quantise_bundle(bundle: str, manifest: str, *, keep: bool = False, split: str = "val") -> BundleInfo:
    """Add int8 and its certificate to a finished bundle, with images of its manifest; `keep` as in `add_int8`.

    The runtimes are compared on the images of `split` that the network was not trained on.

    Raises:
        BundleError: there is no finished bundle, or it is damaged.
        SettingsError: the manifest has other classes than the bundle.
        DataError: an image changed or became unreadable since the manifest was prepared.
        SchemaError: the manifest has no usable training image, or none in `split`.
    """
    info, table = open_bundle(absolute(bundle)), read_manifest(absolute(manifest))
    if table.classes != info.classes:
        raise SettingsError(
            f"{table.uri} has other classes ({len(table.classes)}) than bundle {info.bundle_id} "
            f"({len(info.classes)}); give the manifest that the bundle was trained on."
        )
    fingerprint = info.search.get("manifest_fingerprint")
    if fingerprint not in (None, table.fingerprint):
        say(f"warning: {table.uri} is not the manifest that bundle {info.bundle_id} was trained on, or has changed")
    for name in ("train", split):
        table.of_split(name)  # raises where it is empty
    rows = table.by_content(split)
    seen_N, unknown = mask_trained_on(bundle, info, table, rows), ""
    if seen_N is None:
        # A bundle that names no manifest was packed by hand; then the given manifest is taken for its own.
        seen_N = np.zeros(len(rows), dtype=np.bool_)
        if fingerprint is not None:
            unknown = "the bundle does not say which images it was trained on; give the manifest that it was trained on"
    calibration_NHWC, _ = _read_some(table.by_content("train"), CALIBRATION_IMAGES, info)
    judging_NHWC, labels_N = _read_some(rows[~seen_N], CERTIFY_IMAGES, info)
    left_out = int(seen_N.sum())
    views = Views(calibration_NHWC, judging_NHWC, labels_N, split=split, left_out=left_out, unknown=unknown)
    # The network before a refit is not at hand, but its certificate stays true for the same recipe.
    earlier = info.certificates.get("int8")
    same_recipe = earlier and earlier.before_refit and earlier.calibration == CALIBRATION
    reusable = earlier if same_recipe and fingerprint == table.fingerprint else None
    add_int8(bundle, views, keep=keep, earlier=reusable)
    return certify_bf16(bundle, views)


def _read_some(rows: pd.DataFrame, most: int, info: BundleInfo) -> tuple[Pixels, Integers]:
    """Draw rows of a manifest, and read their images as the network's input; gives them and their class indices."""
    drawn = rows.iloc[draw_rows(np.arange(len(rows)), most)].to_dict("records")
    read = partial(require_row, settings=info.pixels, crop_boxes=info.uses_boxes, as_input=True)
    images, size = list(read_all(drawn, read, what="reading images")), info.pixels.input_size
    images_NHWC = np.stack(images) if images else np.empty((0, size, size, 3), dtype=np.uint8)
    return images_NHWC, np.array([info.classes.index(row["label"]) for row in drawn], dtype=np.int64)


def add_int8(
    uri: str,
    views: Views,
    *,
    keep: bool = False,
    before_refit: bytes | None = None,
    earlier: Certificate | None = None,
) -> BundleInfo:
    """Quantise a bundle's model, compare it with fp32, and write its certificate, and the file if that holds.

    Args:
        uri: The bundle's folder.
        views: The images to calibrate on and to compare on.
        keep: Whether the file stays even if its certificate does not hold; `auto` never chooses it then.
        before_refit: The ONNX model before a refit, compared in place of the bundle's own, which was trained on these
            images.
        earlier: A certificate by the same recipe, which stays valid where `views` cannot give another.

    Raises:
        BundleError: there is no finished bundle, or it is damaged.
    """
    from safetensors.numpy import load, save

    info = open_bundle(uri)
    model, probes = read_bundle_file(uri, info, MODEL), load(read_bundle_file(uri, info, PROBES))
    certificate, files = _unmeasured(views), dict[str, bytes]()
    if certificate.reason and not earlier:
        return _write(uri, info, certificate, files)
    try:
        if certificate.reason and earlier:
            certificate, int8_model = earlier, _quantise(model, views, earlier.float_search)
        elif before_refit is None:
            certificate, int8_model = _certify(model, info, views, certificate)
        else:
            certificate, _ = _certify(before_refit, info, views, certificate)
            int8_model = _quantise(model, views, certificate.float_search)
            certificate = _certify_after_refit(certificate, model, int8_model, info, views)
        int8 = OnnxRuntime(int8_model, threads=1)
    except BundleError:
        raise
    except Exception as err:  # onnxruntime fails on some networks, with various errors
        reason = f"onnxruntime cannot quantise this network ({type(err).__name__}: {one_line(err, 160)})"
        return _write(uri, info, certificate.model_copy(update={"reason": reason}), files)
    if certificate.holds or keep:
        probes["logits_int8"] = int8.score(probes["pixels_NHWC"])[0]
        files = {INT8_MODEL: int8_model, PROBES: save(probes)}
    return _write(uri, info, certificate, files)


def certify_bf16(uri: str, views: Views, *, before_refit: bytes | None = None) -> BundleInfo:
    """Compare bf16 with fp32 by int8's rule, and write its certificate into the bundle, where this machine runs bf16.

    Where these images cannot judge, an earlier certificate stays: bf16 has no file of its own that could have changed.
    Cost: scoring the images twice on all cores, and three seconds for the rates.

    Raises:
        BundleError: there is no finished bundle, or it is damaged.
    """
    info = open_bundle(uri)
    if bf16_obstacle() or views.unknown or len(views.judging_NHWC) < CERTIFY_IMAGES_LEAST:
        return info
    model = read_bundle_file(uri, info, MODEL)
    certificate = Certificate(
        holds=False,
        split=views.split,
        images=len(views.judging_NHWC),
        images_left_out=views.left_out,
        before_refit=before_refit is not None,
        measured_on=_processor(),
    )
    try:
        figures = _judge_bf16(before_refit or model, info, views)
        if before_refit is not None and not (own := _judge_bf16(model, info, views))["holds"]:
            figures |= {"holds": False, "reason": figures["reason"] or f"after the refit, {own['reason']}"}
        figures["images_per_second"] = _rates(
            views, fp32=OnnxRuntime(model, threads=1), bf16=OpenVinoRuntime(model, threads=1)
        )
    except BundleError as err:
        figures = {"reason": one_line(err, 200)}
    certificate = certificate.model_copy(update=figures)
    verdict = "holds its certificate" if certificate.holds else f"is not certified: {certificate.reason}"
    say(f"bundle: bf16 {verdict}" + (f"; labels agree on {certificate.agreement:.1%}" if certificate.agreement else ""))
    info = info.model_copy(update={"certificates": {**info.certificates, "bf16": certificate}})
    write_info(uri, info)
    return info


def _judge_bf16(model: bytes, info: BundleInfo, views: Views) -> dict[str, Any]:
    images_NHWC, most = views.judging_NHWC, max(SPEED_BATCHES)
    parts = [images_NHWC[i : i + most] for i in range(0, len(images_NHWC), most)]
    fp32, bf16 = OnnxRuntime(model), OpenVinoRuntime(model)
    fp32_NK, bf16_NK = (np.concatenate([score(part)[0] for part in parts]) for score in (fp32.score, bf16.score))
    return compare_logits(fp32_NK, bf16_NK, views.labels_N, temperature=info.temperature)


def _unmeasured(views: Views) -> Certificate:
    """Make a certificate without figures; its reason says why these images cannot give any, else it is empty."""
    judging, calibration, problem = len(views.judging_NHWC), len(views.calibration_NHWC), views.unknown
    if not problem and judging < CERTIFY_IMAGES_LEAST:
        seen = f" (the network was trained on {views.left_out:,} others)" if views.left_out else ""
        name = {"val": "validation", "train": "training"}.get(views.split, views.split)
        other = "; carray quantize --split test uses others" if views.left_out and views.split == "val" else ""
        problem = (
            f"{judging} {name} images are too few for a certificate{seen}, {CERTIFY_IMAGES_LEAST} are needed{other}"
        )
    elif not problem and calibration < CALIBRATION_IMAGES_LEAST:
        problem = f"{calibration} training images are too few to calibrate on, {CALIBRATION_IMAGES_LEAST} are needed"
    return Certificate(
        holds=False,
        reason=problem,
        split=views.split,
        images=judging,
        images_left_out=views.left_out,
        calibration_images=calibration,
    )


def compare_logits(fp32_NK: Floats, other_NK: Floats, labels_N: Integers, *, temperature: float) -> dict[str, Any]:
    """Compare a runtime's logits with fp32's on the same labelled images; gives the figures of a certificate.

    It holds where top-1 drops by at most 0.5 points, and labels agree on at least 95 % of all images and on 99 % of
    those with an fp32 score over 0.8.
    """
    fp32_N, other_N = fp32_NK.argmax(axis=1), other_NK.argmax(axis=1)
    confident_N = top_scores(fp32_NK, temperature=temperature) > CONFIDENT
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
        problems.append(f"on {agreement_confident:.1%} of the confident ones, below {AGREEMENT_CONFIDENT:.0%}")
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


def _certify(model: bytes, info: BundleInfo, views: Views, unmeasured: Certificate) -> tuple[Certificate, bytes]:
    """Quantise a model, with layers in floats if its certificate needs them; gives the certificate and the int8 model.

    Where no search helps, they are those with all layers in integers.
    """
    quantiser = Quantiser(model, views.calibration_NHWC)
    judge = _Judge(model, info, views)
    int8_model, trace = quantiser.quantise(), None
    found = plain = judge.compare(OnnxRuntime(int8_model, threads=1))
    if not plain.figures["holds"]:
        say(f"bundle: int8 misses its certificate ({plain.figures['reason']}); looking for layers to leave in floats")
        better, trace = search_floats(
            quantiser,
            judge.fp32,
            views.calibration_NHWC,
            plain=plain,
            judge=judge.compare,
            measure_rate=lambda runtime: max(_rates(views, one=runtime)["one"].values()),
        )
        found = better or plain
        int8_model = quantiser.quantise(in_float=trace.in_float) if better else int8_model
    figures = {**found.figures, "calibration": CALIBRATION, "float_search": trace, "measured_on": _processor()}
    if trace and not figures["holds"]:
        figures["reason"] += f"; {trace.ended}"
    rates = _rates(views, fp32=judge.fp32, int8=OnnxRuntime(int8_model, threads=1))
    return unmeasured.model_copy(update={**figures, "images_per_second": rates}), int8_model


def _quantise(model: bytes, views: Views, search: FloatSearch | None) -> bytes:
    """Quantise a model with the layers in floats that a search found on its twin."""
    return Quantiser(model, views.calibration_NHWC).quantise(in_float=search.in_float if search else [])


def _certify_after_refit(
    twin: Certificate, model: bytes, int8_model: bytes, info: BundleInfo, views: Views
) -> Certificate:
    """Certify by the network before the refit; that after it must hold, too, though its figures are too good."""
    own = _Judge(model, info, views).compare(OnnxRuntime(int8_model, threads=1)).figures
    failed = {"holds": False, "reason": f"after the refit, {own['reason']}"}
    return twin.model_copy(update={"before_refit": True, **(failed if twin.holds and not own["holds"] else {})})


class _Judge:
    """fp32 on the judging images, with which int8 networks are compared."""

    def __init__(self, model: bytes, info: BundleInfo, views: Views) -> None:
        self.fp32 = OnnxRuntime(model, threads=1)
        self._temperature, self._labels_N = info.temperature, views.labels_N
        self._batches = as_batches(views.judging_NHWC)
        self._fp32_NK = self._score(self.fp32)

    def compare(self, int8: OnnxRuntime) -> Judged:
        """Compare a network's labels with fp32's."""
        figures = compare_logits(self._fp32_NK, self._score(int8), self._labels_N, temperature=self._temperature)
        # Of labels that change, some get right, and confident ones need large differences: both grow with its square.
        drop, confident = figures["drop_points"] / DROP_POINTS, figures["agreement_confident"]
        lost = 0.0 if confident is None else (1 - confident) / (1 - AGREEMENT_CONFIDENT)
        return Judged(figures, max((1 - figures["agreement"]) / (1 - AGREEMENT), max(drop, lost, 0.0) ** 0.5))

    def _score(self, runtime: OnnxRuntime) -> Floats:
        return np.concatenate([runtime.score(batch)[0] for batch in self._batches])


def _rates(views: Views, **runtimes: OnnxRuntime | OpenVinoRuntime) -> dict[str, dict[int, float]]:
    """Measure each runtime's images a second of a core, by batch size."""
    rates: dict[str, dict[int, float]] = {name: {} for name in runtimes}
    for images in SPEED_BATCHES:
        passes = {name: partial(one.score, views.judging_NHWC[:images]) for name, one in runtimes.items()}
        found = measure_rates(passes, dict.fromkeys(runtimes, images), seconds=len(runtimes) * SPEED_SECONDS)
        for name, rate in found.items():
            rates[name][images] = rate
    return rates


def _write(uri: str, info: BundleInfo, certificate: Certificate, files: dict[str, bytes]) -> BundleInfo:
    """Write the bundle with its new certificate, and print the outcome."""
    figures = ""
    if certificate.top1 is not None:
        speeds = {name: max(rates.values()) for name, rates in certificate.images_per_second.items()}
        when = " before the refit" if certificate.before_refit else ""
        figures = (
            f"; top-1 {certificate.top1:.1%} (fp32 {certificate.top1_fp32:.1%}), labels agree on "
            f"{certificate.agreement:.1%} of {certificate.images:,} {certificate.split} images{when}, "
            f"{speeds['int8']:.0f} images a second a thread (fp32 {speeds['fp32']:.0f})"
        )
    verdict = "holds its certificate" if certificate.holds else f"left out: {certificate.reason}"
    if files and not certificate.holds:
        verdict = f"kept without a certificate: {certificate.reason}"
    say(f"bundle: int8 {verdict}{figures}")
    certificates = {**info.certificates, "int8": certificate}
    entries = {name: entry for name, entry in info.files.items() if name != INT8_MODEL}
    return write_bundle(uri, info.model_copy(update={"certificates": certificates, "files": entries}), files)


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        return name

"""Packs a trial's best weights into a bundle, and checks that the exported model is the same model.

The ONNX model's logits on real validation pixels must agree with torch's (search.train.export), or nothing is packed.
Cost: about 15 s, most of it importing torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.bundle.bundle_folder import (
    MODEL,
    PROBES,
    TRAINED_ON,
    VERSION,
    WEIGHTS,
    Acceptance,
    BundleInfo,
    bundle_id_of,
    write_bundle,
)
from carray.bundle.certificates import (
    CALIBRATION_IMAGES,
    CERTIFY_IMAGES,
    Views,
    add_int8,
    draw_rows,
    read_originals,
)
from carray.bundle.threshold import calibrated_metrics, choose_on_logits, fit_temperature
from carray.bundle.trained_on import content_ids, pack_trained_on
from carray.core.errors import BundleError, DataError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, join, read_bytes
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest, row_box
from carray.search import run_folder
from carray.search.train.export import export_onnx
from carray.tensors.block import Block, ensure_block

__all__ = ["generate_probes", "measure_full_decode", "pack_bundle", "pack_winner"]

PARITY_IMAGES = 256
PROBE_IMAGES = 16
FULL_DECODE_IMAGES = 300
"""Enough to see a difference of one point, and read in 10 s."""

Pixels = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


def pack_winner(
    run: str,
    *,
    trial: str | None = None,
    to: str | None = None,
    weights: str | None = None,
    note: Mapping[str, Any] = {},
) -> BundleInfo:
    """Pack a run's best trial (or the named one) into RUN/bundle (or `to`).

    Args:
        run: The run's folder.
        trial: Id of the trial.
        to: Folder of the bundle.
        weights: File of a refit's weights, to pack in place of the trial's own. Temperature and metrics are those of
            the trial: a refit has no images left to measure them on.
        note: Further entries for `search` in bundle.json.

    Raises:
        SettingsError: no search was started there, it has no such trial, or its manifest has changed.
        SearchError: no trial has a result, or the named one has none.
        BundleError: the exported model is not the same model, or the weights are not of the epoch in the table.
    """
    run = absolute(run)
    search = run_folder.read_search(run)
    trials = run_folder.read_trials(run)
    if trial is not None and trial not in set(trials["trial_id"]):
        raise SettingsError(f"{run} has no trial {trial!r}; allowed are those of carray leaderboard {run}.")
    row, best = _row_and_weights(run, trials, trial)
    packed = best if weights is None else _read_weights(weights, note.get("refit_epochs"))
    say(f"bundle: packing {row['trial_id']} ({row['val_top1']:.1%} validation top-1){', refitted' if weights else ''}")
    return _pack_trial(run, search, row, to or join(run, "bundle"), best, packed, note)


def _row_and_weights(run: str, trials: Any, trial: str | None) -> tuple[dict[str, Any], bytes]:
    """Read the row of a trial, or of the best one, and its weights, which a running search may change in between."""
    tries = 1 if exists(join(run, run_folder.TRIALS)) else 5
    for tries_left in reversed(range(tries)):
        row = run_folder.best_trial(trials if trial is None else trials[trials["trial_id"] == trial])
        try:
            return row, _read_weights(run_folder.best_weights(run, row["trial_id"]), int(row["best_epoch"]))
        except BundleError:
            if not tries_left:
                raise
        time.sleep(1)  # a trial writes its weights before it logs their epoch
        trials = run_folder.read_trials(run)
    raise AssertionError("unreachable: the last try returns or raises")


def _read_weights(uri: str, epoch: int | None) -> bytes:
    """Read a trial's weights, which must be those of that epoch."""
    data = read_bytes(uri)
    found = run_folder.weights_epoch(data)
    if found != epoch:
        raise BundleError(
            f"{uri} holds the weights of epoch {found}, and the table says {epoch}, so another process has trained "
            "there, too; nothing was packed: choose another trial, or start a search in another folder."
        )
    return data


def _pack_trial(
    run: str,
    search: Mapping[str, Any],
    row: Mapping[str, Any],
    to: str,
    best: bytes,
    packed: bytes,
    note: Mapping[str, Any],
) -> BundleInfo:
    """Measure the trial's best weights, and pack `packed`: the same weights, or those of a refit."""
    from safetensors.torch import load

    from carray.search.space import TuneSettings
    from carray.search.train.hyperparameters import read_hyper
    from carray.search.train.nets import build_net, predict_logits
    from carray.tensors.batches import view_batch

    settings = TuneSettings.model_validate(search["settings"])
    values = json.loads(row["hyper"])
    hyper = read_hyper(values)
    manifest = _trained_manifest(run, search)
    net = build_net(hyper, class_count=len(manifest.classes), load_weights=False)
    net.load_state_dict(load(best))
    refitted = packed is not best
    pixels = settings.trial_pixels(hyper)
    block = ensure_block(manifest, pixels)
    val_rows_N = block.of_split("val")
    logits_NK, labels_N = predict_logits(net, block, val_rows_N, pixels), block.labels_N[val_rows_N]
    unseen_N = _unseen(manifest)
    temperature = fit_temperature(logits_NK[unseen_N], labels_N[unseen_N]) if unseen_N.any() else 1.0
    metrics = {"val_before_refit" if refitted else "val": calibrated_metrics(logits_NK, labels_N, temperature)}
    if full_decode := measure_full_decode(net, manifest, pixels, logits_NK):
        metrics["val_full_decode"] = full_decode
    parity_pixels_NHWC = view_batch(block, val_rows_N[:PARITY_IMAGES], pixels)
    before_refit = None
    if refitted:
        before_refit, _ = export_onnx(net.cpu().eval(), parity_pixels_NHWC)
        net.load_state_dict(load(packed))
    found = {
        "run_trials": len(search["configurations"]),
        "trial_id": row["trial_id"],
        "epoch": int(row["best_epoch"]),
        "seed": settings.search.seed,
        "manifest_fingerprint": search["manifest_fingerprint"],
    }
    pack_bundle(
        net,
        to,
        classes=manifest.classes,
        pixels=pixels,
        uses_boxes=manifest.crop_boxes,
        temperature=temperature,
        metrics=metrics,
        net_note=values,
        search_note=found | dict(note),
        accept=choose_on_logits(
            logits_NK[unseen_N],
            labels_N[unseen_N],
            temperature=temperature,
            target_precision=settings.search.target_precision,
            manifest_fingerprint=search["manifest_fingerprint"],
            before_refit=refitted,
        ),
        parity_pixels_NHWC=parity_pixels_NHWC,
        trained_on=manifest.by_content("train", *(["val"] if refitted else []))["sha256"],
    )
    views = _int8_views(block, val_rows_N[unseen_N], pixels, left_out=int((~unseen_N).sum()))
    return add_int8(to, views, before_refit=before_refit)


def _int8_views(block: Block, judging_N: npt.NDArray[np.int64], pixels: PixelSettings, *, left_out: int) -> Views:
    """Draw the images of the int8 certificate from a block: training images, and the given validation rows."""
    from carray.tensors.batches import view_batch

    judging_N = draw_rows(judging_N, CERTIFY_IMAGES)
    return Views(
        calibration_NHWC=view_batch(block, draw_rows(block.of_split("train"), CALIBRATION_IMAGES), pixels),
        judging_NHWC=view_batch(block, judging_N, pixels),
        labels_N=block.labels_N[judging_N],
        left_out=left_out,
    )


def _trained_manifest(run: str, search: Mapping[str, Any]) -> Manifest:
    """Read a run's manifest, and check that it is still the one that the run was trained on."""
    manifest = read_manifest(search["manifest"])
    if manifest.fingerprint != search["manifest_fingerprint"]:
        raise SettingsError(
            f"{manifest.uri} is no longer the manifest that {run} was trained on (images, labels or splits differ), so "
            "the bundle's metrics cannot be measured; prepare it again as it was."
        )
    return manifest


def _unseen(manifest: Manifest) -> Booleans:
    """Mask the validation images, in a block's order, whose content is not in the training split."""
    train, val = (content_ids(manifest.by_content(split)["sha256"]) for split in ("train", "val"))
    unseen_N = ~np.isin(val, train)
    if seen := int((~unseen_N).sum()):
        say(
            f"bundle: {seen:,} of {len(val):,} validation images are in train, too, so they are not used for the "
            "temperature, the threshold and the int8 certificate"
        )
    return unseen_N


def measure_full_decode(net: Any, manifest: Manifest, pixels: PixelSettings, logits_NK: Floats) -> dict[str, float]:
    """Measure what decoding at reduced scale costs: top-1 with and without it, on large validation images.

    `logits_NK` are those of all validation images at reduced scale, in the order of `Manifest.by_content`. Empty, with
    a line that says why, where no image is large enough, or originals cannot be read any more.
    """
    from carray.search.train.nets import predict_logits

    rows = manifest.by_content("val").to_dict("records")
    reduced_N = np.flatnonzero([_is_reduced(row, pixels, boxes=manifest.crop_boxes) for row in rows])
    if not len(reduced_N):
        say(f"bundle: no validation image is twice decode_size ({pixels.decode_size}), so none is decoded reduced")
        return {}
    chosen_N = draw_rows(reduced_N, FULL_DECODE_IMAGES)
    full = pixels.model_copy(update={"reduced_scale": False})
    try:
        full_NHWC = np.stack(read_originals([rows[i] for i in chosen_N], full, crop_boxes=manifest.crop_boxes))
    except DataError as err:
        say(f"bundle: decoding at reduced scale was not compared with decoding in full: {err}")
        return {}
    index = {name: i for i, name in enumerate(manifest.classes)}
    labels_N = np.array([index[rows[i]["label"]] for i in chosen_N], dtype=np.int64)
    block = Block(full_NHWC, labels_N, np.ones(len(labels_N), dtype=np.int8))
    full_N = predict_logits(net, block, np.arange(len(labels_N)), full).argmax(axis=1)
    reduced_label_N = logits_NK[chosen_N].argmax(axis=1)
    figures = {
        "images": float(len(chosen_N)),
        "top1": float((full_N == labels_N).mean()),
        "top1_reduced": float((reduced_label_N == labels_N).mean()),
        "agreement": float((full_N == reduced_label_N).mean()),
    }
    say(
        f"bundle: {len(chosen_N)} large validation images, top-1 {figures['top1']:.1%} decoded in full and "
        f"{figures['top1_reduced']:.1%} at reduced scale"
    )
    return figures


def _is_reduced(row: Mapping[Any, Any], pixels: PixelSettings, *, boxes: bool) -> bool:
    """Whether an image (or its box) is at least twice decode_size, so that half its scale is enough."""
    box = row_box(row) if boxes else None
    sides = (box[2] - box[0], box[3] - box[1]) if box else (int(row["width"]), int(row["height"]))
    return pixels.reduced_scale and min(sides) >= 2 * pixels.decode_size


def pack_bundle(
    net: Any,
    uri: str,
    *,
    classes: list[str],
    pixels: PixelSettings,
    uses_boxes: bool,
    temperature: float,
    metrics: dict[str, dict[str, float]],
    net_note: dict[str, Any],
    search_note: dict[str, Any],
    parity_pixels_NHWC: Pixels,
    trained_on: Iterable[str] = (),
    accept: tuple[float | None, Acceptance | None] = (None, None),
) -> BundleInfo:
    """Write a `search.train.nets.Net` as a bundle; torch and ONNX are compared on `parity_pixels_NHWC`, uint8 views.

    `accept` is the result of `choose_threshold`, `trained_on` the sha256 of the images that the network was trained on.

    Raises:
        BundleError: the exported model's logits or labels differ from torch's.
    """
    from safetensors.torch import save

    net = net.cpu().eval()
    model, parity = export_onnx(net, parity_pixels_NHWC)
    probes_NHWC = generate_probes(pixels.input_size)
    files = {
        WEIGHTS: save({name: value.detach().contiguous() for name, value in net.state_dict().items()}),
        MODEL: model,
        PROBES: _probe_file(model, probes_NHWC),
    }
    if digests := list(trained_on):
        files[TRAINED_ON] = pack_trained_on(digests)
    info = BundleInfo(
        version=VERSION,
        bundle_id=bundle_id_of(
            hashlib.sha256(files[WEIGHTS]).hexdigest(),
            classes=classes,
            pixels=pixels,
            temperature=temperature,
            flip_average=net.flip_average,
        ),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=classes,
        pixels=pixels,
        uses_boxes=uses_boxes,
        temperature=temperature,
        embedding_size=net.embedding_size,
        files={},
        metrics=metrics,
        parity={"fp32": parity},
        accept_threshold=accept[0],
        acceptance=accept[1],
        net=net_note,
        search=search_note,
        software=_software(),
    )
    return write_bundle(uri, info, files)


def generate_probes(input_size: int) -> Pixels:
    """Generate 16 smooth random images, uint8 (16, size, size, 3), to which networks react as to photographs."""
    import cv2

    rng = np.random.default_rng(20_24)
    coarse = rng.integers(0, 256, (PROBE_IMAGES, 9, 9, 3), dtype=np.uint8)
    fine = rng.normal(0, 12, (PROBE_IMAGES, input_size, input_size, 3))
    smooth = np.stack([cv2.resize(image, (input_size, input_size), interpolation=cv2.INTER_CUBIC) for image in coarse])
    return (smooth + fine).clip(0, 255).astype(np.uint8)


def _probe_file(model: bytes, probes_NHWC: Pixels) -> bytes:
    import onnxruntime
    from safetensors.numpy import save

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits_NK = np.asarray(session.run(["logits"], {"pixels": probes_NHWC})[0])
    return save({"pixels_NHWC": probes_NHWC, "logits_fp32": logits_NK})


_SOFTWARE = "carray torch timm onnx onnxruntime numpy opencv-python-headless simplejpeg pillow".split()


def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions

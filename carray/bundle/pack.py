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
from carray.bundle.certificates import CALIBRATION_IMAGES, CERTIFY_IMAGES, Views, add_int8, certify_bf16, draw_rows
from carray.bundle.runtimes import OnnxRuntime
from carray.bundle.threshold import calibrated_metrics, choose_on_logits, fit_temperature
from carray.bundle.trained_on import content_ids, pack_trained_on
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, join, read_bytes
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.train.export import export_onnx
from carray.tensors.block import ensure_block

__all__ = ["generate_probes", "pack_bundle", "pack_winner"]

PARITY_IMAGES, PROBE_IMAGES = 256, 16

Pixels = npt.NDArray[np.uint8]
Booleans = npt.NDArray[np.bool_]


def pack_winner(
    run: str,
    *,
    trial: str | None = None,
    to: str | None = None,
    weights: str | None = None,
    note: Mapping[str, Any] = {},
) -> BundleInfo:
    """Pack a run's best trial (or the named one) into RUN/bundle (or `to`).

    `weights` is the file of a refit's weights, to pack in place of the trial's own; temperature and metrics stay those
    of the trial, since a refit has no images left to measure them on. `note` is added to `search` in bundle.json.

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
    found = {
        "run_trials": len(search["configurations"]),
        "trial_id": row["trial_id"],
        "epoch": int(row["best_epoch"]),
        "seed": search["settings"]["search"]["seed"],
        "manifest_fingerprint": search["manifest_fingerprint"],
        **note,
    }
    return _pack_trial(run, search, row, to or join(run, "bundle"), best, packed, found)


def _row_and_weights(run: str, trials: Any, trial: str | None) -> tuple[dict[str, Any], bytes]:
    """Read the row of a trial, or of the best one, and its weights, which a running search may change in between."""
    tries = 1 if exists(join(run, run_folder.TRIALS)) else 5
    while True:
        row = run_folder.best_trial(trials if trial is None else trials[trials["trial_id"] == trial])
        try:
            return row, _read_weights(run_folder.best_weights(run, row["trial_id"]), int(row["best_epoch"]))
        except BundleError:
            if (tries := tries - 1) == 0:
                raise
        time.sleep(1)  # a trial writes its weights before it logs their epoch
        trials = run_folder.read_trials(run)


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
    parity_pixels_NHWC = view_batch(block, val_rows_N[:PARITY_IMAGES], pixels)
    before_refit = None
    if refitted:
        before_refit, _ = export_onnx(net.cpu().eval(), parity_pixels_NHWC)
        net.load_state_dict(load(packed))
    pack_bundle(
        net,
        to,
        classes=manifest.classes,
        pixels=pixels,
        uses_boxes=manifest.crop_boxes,
        temperature=temperature,
        metrics=metrics,
        net_note=values,
        search_note=dict(note),
        accept=choose_on_logits(
            logits_NK[unseen_N],
            labels_N[unseen_N],
            temperature=temperature,
            target_precision=settings.search.target_precision,
            manifest_fingerprint=manifest.fingerprint,
            before_refit=refitted,
        ),
        parity_pixels_NHWC=parity_pixels_NHWC,
        trained_on=manifest.by_content("train", *(["val"] if refitted else []))["sha256"],
    )
    calibration_N = draw_rows(block.of_split("train"), CALIBRATION_IMAGES)
    judging_N = draw_rows(val_rows_N[unseen_N], CERTIFY_IMAGES)
    views = Views(
        view_batch(block, calibration_N, pixels),
        view_batch(block, judging_N, pixels),
        block.labels_N[judging_N],
        left_out=int((~unseen_N).sum()),
    )
    add_int8(to, views, before_refit=before_refit)
    return certify_bf16(to, views, before_refit=before_refit)


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
    from safetensors.numpy import save as save_arrays
    from safetensors.torch import save

    net = net.cpu().eval()
    model, parity = export_onnx(net, parity_pixels_NHWC)
    probes_NHWC = generate_probes(pixels.input_size)
    files = {
        WEIGHTS: save({name: value.detach().contiguous() for name, value in net.state_dict().items()}),
        MODEL: model,
        PROBES: save_arrays({"pixels_NHWC": probes_NHWC, "logits_fp32": OnnxRuntime(model).score(probes_NHWC)[0]}),
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


_SOFTWARE = "carray torch timm onnx onnxruntime numpy opencv-python-headless simplejpeg pillow".split()


def _software() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions

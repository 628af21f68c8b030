"""Reads labelled originals of a manifest again, for what a bundle measures on them besides its training block.

From: rows of a manifest. To: the bundle that `carray quantize` completes; what decoding at reduced scale costs.
Invariants: pixels are `pixels.decode` and `pixels.view` by the bundle's own settings; an original whose bytes are no
longer the manifest's is refused, never measured on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.bundle_folder import BundleInfo, Certificate, open_bundle
from carray.bundle.certificates import CALIBRATION_IMAGES, CERTIFY_IMAGES, Views, add_int8, draw_rows
from carray.bundle.quantise import CALIBRATION
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import DataError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest, require_row, row_box
from carray.search.train.nets import predict_logits
from carray.tensors.block import Block

__all__ = ["measure_full_decode", "quantise_bundle"]

Pixels = npt.NDArray[np.uint8]

FULL_DECODE_IMAGES = 300
"""Of the validation images that are decoded at reduced scale: enough to see a point of difference, 10 s to read."""


def quantise_bundle(bundle: str, manifest: str, *, keep: bool = False, split: str = "val") -> BundleInfo:
    """Add int8 and its certificate to a finished bundle, with images of its manifest; `keep` as in `add_int8`.

    Images of `split` judge, without those that the network was trained on.

    Raises:
        BundleError: no finished bundle lies there, or it is damaged.
        SettingsError: the manifest has other classes than the bundle.
        DataError: an image changed or became unreadable since the manifest was prepared.
        SchemaError: the manifest has no usable training image, or none in `split`.
        StorageError: storage refused to read the manifest or to write the bundle.
    """
    info, table = open_bundle(absolute(bundle)), read_manifest(absolute(manifest))
    if table.classes != info.classes:
        raise SettingsError(
            f"{table.uri} has other classes ({len(table.classes)}) than bundle {info.bundle_id} "
            f"({len(info.classes)}); give the manifest that the bundle was trained on."
        )
    if info.search.get("manifest_fingerprint") not in (None, table.fingerprint):
        say(f"warning: {table.uri} is not the manifest that bundle {info.bundle_id} was trained on, or has changed")
    for name in ("train", split):
        table.of_split(name)  # raises where it is empty
    rows = table.by_content(split)
    seen_N, unknown = mask_trained_on(bundle, info, table, rows), ""
    if seen_N is None:
        # A bundle that names no manifest was packed by hand; its own manifest is then what the user says.
        seen_N = np.zeros(len(rows), dtype=np.bool_)
        if info.search.get("manifest_fingerprint") is not None:
            unknown = "the bundle does not say which images it was trained on; give the manifest that it was trained on"
    index = {name: i for i, name in enumerate(info.classes)}
    judging = _draw(rows[~seen_N], CERTIFY_IMAGES)
    views = Views(
        _views(_draw(table.by_content("train"), CALIBRATION_IMAGES), info),
        _views(judging, info),
        np.array([index[row["label"]] for row in judging], dtype=np.int64),
        split=split,
        left_out=int(seen_N.sum()),
        unknown=unknown,
    )
    return add_int8(bundle, views, keep=keep, standing=_standing(info, table))


def _standing(info: BundleInfo, table: Manifest) -> Certificate | None:
    """Give the certificate of the network before a refit, where quantising by this manifest is the same recipe."""
    found = info.certificates.get("int8")
    same = info.search.get("manifest_fingerprint") == table.fingerprint
    return found if found and same and found.before_refit and found.calibration == CALIBRATION else None


def _draw(rows: pd.DataFrame, count: int) -> list[dict[Any, Any]]:
    return rows.iloc[draw_rows(np.arange(len(rows)), count)].to_dict("records")


def _views(rows: list[dict[Any, Any]], info: BundleInfo) -> Pixels:
    size = info.pixels.input_size
    views = _read(rows, info.pixels, crop_boxes=info.uses_boxes, as_input=True)
    return np.stack(views) if views else np.empty((0, size, size, 3), dtype=np.uint8)


def measure_full_decode(
    net: Any, manifest: Manifest, pixels: PixelSettings, logits_NK: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Measure what decoding at reduced scale costs: top-1 of both decodes on validation images that it concerns.

    `logits_NK` are those of the validation images, in the order of `Manifest.by_content`, as they are decoded
    otherwise. Empty, with a line that says why, where no image is large enough to be reduced, or originals cannot be
    read any more.
    """
    rows = manifest.by_content("val").to_dict("records")
    reduced_N = np.flatnonzero([_is_reduced(row, pixels, boxes=manifest.crop_boxes) for row in rows])
    if not len(reduced_N):
        say(f"bundle: no validation image is twice decode_size ({pixels.decode_size}), so none is decoded reduced")
        return {}
    chosen_N = draw_rows(reduced_N, FULL_DECODE_IMAGES)
    full = pixels.model_copy(update={"reduced_scale": False})
    try:
        full_NHWC = np.stack(_read([rows[i] for i in chosen_N], full, crop_boxes=manifest.crop_boxes))
    except DataError as err:
        say(f"bundle: reduced-scale decoding was not compared with the full one: {err}")
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
    """Say whether a JPEG of that size (or its box) is at least twice decode_size, so that half its scale covers it."""
    box = row_box(row) if boxes else None
    sides = (box[2] - box[0], box[3] - box[1]) if box else (int(row["width"]), int(row["height"]))
    return pixels.reduced_scale and min(sides) >= 2 * pixels.decode_size


def _read(
    rows: list[dict[Any, Any]], pixels: PixelSettings, *, crop_boxes: bool, as_input: bool = False
) -> list[Pixels]:
    read = partial(require_row, settings=pixels, crop_boxes=crop_boxes, as_input=as_input)
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(read, rows))

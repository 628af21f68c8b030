"""The files of a bundle, a folder that is complete once `bundle.json` exists, and how they are read.

    weights.safetensors   the network's weights, for further training
    model.onnx            uint8 NHWC in (batch is dynamic); logits_BK and embedding_BD out; normalisation is inside;
                          fp32 and bf16 read it
    model.int8.onnx       the same in 8-bit integers, if its certificate holds
    probes.safetensors    16 generated images and the logits that each runtime gave for them
    trained_on.safetensors  hashes of the images that the network was trained on (bundle.trained_on)
    bundle.json           everything below, written last

`bundle_id` is a hash of weights, classes, pixels and temperature, not of metrics or the threshold. Each file's sha256
is checked before its bytes are used. Nothing in a bundle can run code. Version 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, model_validator

from carray.core.errors import BundleError
from carray.core.settings import Settings
from carray.core.store.files import absolute, delete, exists, join, read_bytes, read_json, write_bytes
from carray.images.pixels import PixelSettings

__all__ = [
    "BUNDLE_JSON",
    "Acceptance",
    "BundleInfo",
    "Certificate",
    "FileEntry",
    "FloatSearch",
    "FloatStep",
    "bundle_id_of",
    "open_bundle",
    "read_bundle_file",
    "write_bundle",
    "write_info",
]

VERSION = 1
BUNDLE_JSON = "bundle.json"
WEIGHTS, MODEL, INT8_MODEL, PROBES = "weights.safetensors", "model.onnx", "model.int8.onnx", "probes.safetensors"
TRAINED_ON = "trained_on.safetensors"
RUNTIME_FILES = {"fp32": MODEL, "int8": INT8_MODEL, "bf16": MODEL, "torch-bf16": WEIGHTS}
"""The file that each runtime reads; a bundle has the runtimes whose files it has."""


class FileEntry(Settings):
    """Hash and size of a bundle's file."""

    sha256: str
    size_bytes: int


class FloatStep(Settings):
    """One int8 network of a search for layers to leave in floats, compared with fp32 on the certificate's images."""

    blocks_in_float: int
    rms: float
    """RMS difference of its logits from fp32's, on calibration images."""
    agreement: float
    agreement_confident: float | None
    drop_points: float
    times_fp32: float
    """Its images a second, in units of fp32's."""


class FloatSearch(Settings):
    """The search for layers that int8 leaves in floats, made where it misses its certificate without them."""

    in_float: list[str]
    """Nodes of the network with folded BatchNorm that are computed in floats because of it; empty if none sufficed."""
    blocks: int
    """Blocks that the network was divided into."""
    tried: dict[str, float]
    """By a block's first node: RMS difference of the logits from fp32's if only this block is quantised."""
    steps: list[FloatStep]
    """The networks compared; the first one has all blocks in integers."""
    ended: str
    """Why it ended."""
    cpu_seconds: float


class Certificate(Settings):
    """The accuracy of a runtime compared with fp32 on labelled images, and whether `auto` may choose it."""

    holds: bool
    reason: str = ""
    """Why it does not hold."""
    split: str = "val"
    """Split of the labelled images."""
    images: int
    """Images scored by both runtimes; the network was not trained on them."""
    images_left_out: int = 0
    """Images of that split that are left out, since the network was trained on them."""
    before_refit: bool = False
    """Whether the figures are of the network before a refit, quantised by the same recipe, since the refitted one was
    trained on these images."""
    images_seen_in_training: bool = False
    """In bundles of earlier versions: the network was trained on these images, so the certificate is void."""
    top1_fp32: float | None = None
    top1: float | None = None
    drop_points: float | None = None
    """Top-1 of fp32 minus that of the runtime on the same images, in percentage points."""
    agreement: float | None = None
    """Fraction of the images with the same label; null, like all figures, if there were too few images."""
    confident_images: int = 0
    """Images with an fp32 score over 0.8."""
    agreement_confident: float | None = None
    """Agreement on them; null without any."""
    calibration: str = ""
    """How the ranges of activations were chosen; empty if not needed."""
    calibration_images: int = 0
    """Images of the training split."""
    images_per_second: dict[str, dict[int, float]] = Field(default_factory=dict)
    """By runtime and batch size, on one thread."""
    measured_on: str = ""
    """The processor that this was measured on."""
    float_search: FloatSearch | None = None
    """How layers to leave in floats were looked for; null if int8 did without, or was made by an earlier version."""

    @model_validator(mode="before")
    @classmethod
    def _not_by_trained_images(cls, values: Any) -> Any:
        """Void a certificate of an earlier version that used training images."""
        if not (isinstance(values, dict) and values.get("images_seen_in_training") and values.get("holds")):
            return values
        reason = "it was judged by images that the network was trained on; carray quantize --split test judges it again"
        return {**values, "holds": False, "reason": reason}


class Acceptance(Settings):
    """What to expect of accepting labels from the bundle's threshold up, or why there is none.

    Figures are of fp32's calibrated scores, and null without a threshold.
    """

    target_precision: float
    """Wanted fraction of right labels among the accepted."""
    confidence: float
    """Confidence that the true precision is at least that."""
    split: str
    """Split that it was chosen on."""
    images: int
    """Readable images of that split."""
    manifest_fingerprint: str = ""
    before_refit: bool = False
    """Whether the scores are of the model before a refit, since the refitted one was trained on all these images."""
    reason: str = ""
    """Why no threshold could be chosen."""
    accepted: int = 0
    """Images whose score reaches the threshold."""
    coverage: float | None = None
    """Fraction of images accepted, with its two-sided 95 % interval."""
    coverage_low: float | None = None
    coverage_high: float | None = None
    precision: float | None = None
    """Fraction of the accepted that are right, with one-sided bounds at `confidence`."""
    precision_low: float | None = None
    precision_high: float | None = None


class BundleInfo(Settings):
    """The content of bundle.json."""

    version: int
    bundle_id: str
    created_at: str
    classes: list[str] = Field(min_length=1)
    pixels: PixelSettings
    uses_boxes: bool
    """Whether images were cut to their boxes in training; classify then needs boxes, too."""
    temperature: float = Field(gt=0)
    """Divisor of logits before the softmax, fitted on the validation split."""
    embedding_size: int
    files: dict[str, FileEntry]
    metrics: dict[str, dict[str, float]]
    """Measured at packing, by split."""
    parity: dict[str, dict[str, float]]
    """The exported graph compared with torch on validation images."""
    certificates: dict[str, Certificate] = Field(default_factory=dict)
    """By runtime, each compared with fp32."""
    accept_threshold: float | None = Field(default=None, ge=0, le=1)
    """Score from which labels are accepted without review; null if none was or could be chosen."""
    acceptance: Acceptance | None = None
    """What to expect of that threshold; null in older bundles."""
    net: dict[str, Any]
    """Family, name and hyperparameters, from which the network is built."""
    search: dict[str, Any]
    """How it was found: run, trial, epoch, seed, manifest fingerprint."""
    software: dict[str, str]


def bundle_id_of(
    weights_sha256: str, *, classes: list[str], pixels: PixelSettings, temperature: float, flip_average: bool = False
) -> str:
    """Hash what decides a prediction: 16 hex digits."""
    decided_by: list[Any] = [weights_sha256, classes, pixels.model_dump(mode="json"), round(temperature, 6)]
    # Only if it is on, so that the ids of older bundles stay the same.
    decided_by += ["flip_average"] if flip_average else []
    return hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:16]


def write_bundle(uri: str, info: BundleInfo, files: Mapping[str, bytes]) -> BundleInfo:
    """Write files into a bundle, and last its description with their hashes, which is returned."""
    uri = absolute(uri)
    entries = {
        name: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)) for name, data in files.items()
    }
    info = info.model_copy(update={"files": {**info.files, **entries}})
    delete(join(uri, BUNDLE_JSON))  # the folder must not look finished while its files change
    for name, data in files.items():
        write_bytes(join(uri, name), data)
    write_info(uri, info)
    return info


def write_info(uri: str, info: BundleInfo) -> None:
    """Replace a finished bundle's description, atomically, without changing its files."""
    write_bytes(join(absolute(uri), BUNDLE_JSON), info.model_dump_json(indent=1).encode() + b"\n")


def open_bundle(uri: str) -> BundleInfo:
    """Read and check a bundle's description.

    Raises:
        BundleError: there is no finished bundle, it is of another version, or its description was changed.
    """
    uri = absolute(uri)
    path = join(uri, BUNDLE_JSON)
    if not exists(path):
        raise BundleError(
            f"{uri} holds no {BUNDLE_JSON}, so it is not a finished bundle; give RUN/bundle of a finished tune."
        )
    values = read_json(path)
    version = values.get("version") if isinstance(values, Mapping) else None
    if version != VERSION:
        raise BundleError(f"{path} is of version {version!r}, but this carray reads version {VERSION}; pack it again.")
    try:
        info = BundleInfo.model_validate(values)
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path} is damaged: {where} {first['msg'].lower()}; pack the bundle again.") from None
    expected = bundle_id_of(
        info.files[WEIGHTS].sha256 if WEIGHTS in info.files else "",
        classes=info.classes,
        pixels=info.pixels,
        temperature=info.temperature,
        flip_average=bool(info.net.get("flip_average")),
    )
    if info.bundle_id != expected:
        raise BundleError(
            f"{path} says bundle_id {info.bundle_id}, but its content hashes to {expected}; it was changed."
        )
    return info


def read_bundle_file(uri: str, info: BundleInfo, name: str) -> bytes:
    """Read one file of a bundle and check its hash.

    Raises:
        BundleError: the bundle has no such file, or its bytes are not the ones that were packed.
    """
    if name not in info.files:
        raise BundleError(f"{uri} has no {name}; it has {', '.join(info.files)}.")
    data = read_bytes(join(absolute(uri), name))
    found = hashlib.sha256(data).hexdigest()
    if found != info.files[name].sha256:
        raise BundleError(
            f"{join(uri, name)} has sha256 {found[:16]}…, but {info.files[name].sha256[:16]}… was packed; "
            "the file is damaged, copy the bundle again."
        )
    return data

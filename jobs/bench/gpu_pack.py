"""Packs what a search needs on a machine that has torch and reaches nobody: photographs, weights, a few wheels.

From: a manifest, the weights packages, the package index. To: a folder of parts, none over a limit, so that they can be
carried one after another.
    1/pack.json   classes, and of every image its part, label and split
    1/wheels/     of packages that a machine with torch, torchvision, numpy and Pillow may lack
    1/weights/    BACKBONE.safetensors, float16, since the package index's files are twice as large
    N/images.zip  the files themselves, as they lie in the data set
Invariants: no pixel is changed here, so the other machine decodes what this one would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

__all__ = ["BACKBONES", "WHEELS", "pack"]

BACKBONES = [f"tf_efficientnet_lite{i}" for i in range(3)]
WHEELS = {
    "timm": "timm",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic",
    "annotated-types": "pydantic",
    "typing-inspection": "pydantic",
    "typing-extensions": "typing_extensions",
    "PyYAML": "yaml",
    "safetensors": "safetensors",
    "simplejpeg": "simplejpeg",
    "filelock": "filelock",
}
"""Distribution, and the module whose absence says that its wheel is needed there."""
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)] + ["manylinux2014_x86_64"]


def pack(manifest_uri: str, out: Path, *, limit_mib: float, python: str, commit: str) -> list[tuple[Path, float]]:
    """Write the parts below `out`, which must not exist; gives each part and its MiB."""
    from carray.manifest.format import read_manifest

    manifest = read_manifest(manifest_uri)
    first = out / "1"
    (first / "wheels").mkdir(parents=True)
    _fetch_wheels(first / "wheels", python)
    _write_weights(first / "weights")
    index = {name: i for i, name in enumerate(manifest.classes)}
    records = manifest.usable.to_dict("records")
    images = _write_images(records, index, out, first_free=limit_mib * 2**20 - _bytes(first), limit=limit_mib * 2**20)
    note = {"commit": commit, "manifest": manifest.fingerprint, "classes": manifest.classes, "images": images}
    (first / "pack.json").write_text(json.dumps(note))
    parts = sorted(out.iterdir(), key=lambda place: int(place.name))
    return [(place, _bytes(place) / 2**20) for place in parts]


def _fetch_wheels(place: Path, python: str) -> None:
    names = {distribution: _installed(distribution) for distribution in WHEELS}
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(place)]
    command += [word for platform in _PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={version}" for name, version in names.items())], check=True)


def _installed(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)


def _write_weights(place: Path) -> None:
    from safetensors.torch import save_file

    from carray.trials.weights import build_trunk

    place.mkdir()
    for backbone in BACKBONES:
        trunk, _ = build_trunk(backbone, "auto")
        tensors = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in trunk.state_dict().items()
        }
        save_file(tensors, place / f"{backbone}.safetensors")


def _write_images(
    records: list[Any], index: dict[str, int], out: Path, *, first_free: float, limit: float
) -> list[dict[str, Any]]:
    """Put files into part after part, each filled before the next is begun."""
    images: list[dict[str, Any]] = []
    part, free = 1, first_free
    archive = zipfile.ZipFile(out / "1" / "images.zip", "w", zipfile.ZIP_STORED)
    for number, record in enumerate(records):
        data = Path(record["uri"]).read_bytes()
        taken = len(data) + 200  # what the archive says of a file, and its line in pack.json
        if taken > free:
            archive.close()
            part, free = part + 1, limit
            (out / str(part)).mkdir()
            archive = zipfile.ZipFile(out / str(part) / "images.zip", "w", zipfile.ZIP_STORED)
        archive.writestr(f"{number}.jpg", data)
        free -= taken
        images.append({"part": part, "label": index[record["label"]], "split": record["split"]})
    archive.close()
    return images


def _bytes(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file())

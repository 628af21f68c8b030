"""Makes carray's fit run on a machine that has torch and little else.

From: a pack. To: a Python that imports carray.trials.fit, and the decoded blocks.
Invariants: only what is missing is put in place, and what was is said in the result: wheels unpacked beside the
machine's own packages; two modules of ours that need pandas and pyarrow, for the two names that fit needs of them; a
resize for OpenCV's.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.bench.gpu_pack import WHEELS

__all__ = ["decode_pack", "open_blocks", "prepare_imports", "resize_area", "unpack_wheels"]

_SPLITS = ("train", "val", "test")
"""carray.manifest.format.SPLITS, which cannot be imported without pandas."""


def unpack_wheels(pack: Path, site: Path) -> list[str]:
    """Unpack the wheels of packages that this machine lacks and give their names."""
    lacking = {module for module in WHEELS.values() if importlib.util.find_spec(module) is None}
    wanted = sorted(name for name, module in WHEELS.items() if module in lacking)
    for name in wanted:
        stem = name.replace("-", "_").lower()
        for wheel in (pack / "1" / "wheels").glob("*.whl"):
            if wheel.name.lower().startswith(f"{stem}-"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
    if wanted:
        sys.path.insert(0, str(site))
        # Child processes are new Pythons.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
        importlib.invalidate_caches()
    return wanted


def prepare_imports() -> list[str]:
    """Put stand-ins where pandas, pyarrow or OpenCV are missing; gives what was stood in for."""
    stood_in = []
    if any(importlib.util.find_spec(name) is None for name in ("pandas", "pyarrow")):
        _module("carray.core.storage", read_bytes=lambda uri: Path(uri).read_bytes())
        _module("carray.manifest.format", SPLITS=_SPLITS)
        stood_in += ["carray.core.storage", "carray.manifest.format"]
    if "cv2" in sys.modules or importlib.util.find_spec("cv2") is None:
        _module("cv2", resize=resize_area, INTER_AREA=3, INTER_LINEAR=1, INTER_CUBIC=2)
        stood_in.append("cv2.resize")
    return stood_in


def _module(name: str, **values: Any) -> None:
    module = types.ModuleType(name)

    def absent(attribute: str) -> Any:
        if attribute.startswith("__"):  # Python asks a module for its path and the like
            raise AttributeError(attribute)

        def unusable(*_: Any, **__: Any) -> Any:
            raise RuntimeError(f"{name}.{attribute} is not to be had on this machine")

        return unusable

    vars(module).update(values, __getattr__=absent)
    sys.modules[name] = module


def resize_area(pixels_HWC: Any, size: tuple[int, int], interpolation: int = 3) -> Any:
    """Give what cv2.resize does with INTER_AREA, give or take one level; on the GPU where there is one.

    It averages areas where both sides shrink; where one grows, OpenCV takes two neighbours in both directions.
    """
    import torch

    if interpolation != 3:
        raise RuntimeError("only pixels.interpolation=area is to be had on this machine")
    width, height = size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values_HWC = torch.from_numpy(pixels_HWC).to(device).float()
    sides = ((values_HWC.shape[0], height), (values_HWC.shape[1], width))
    weigh = _areas if all(given >= wanted for given, wanted in sides) else _neighbours
    rows, columns = (torch.from_numpy(weigh(given, wanted)).to(device) for given, wanted in sides)
    resized_HWC = torch.einsum("wx,hxc->hwc", columns, torch.einsum("hy,yxc->hxc", rows, values_HWC))
    return resized_HWC.round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _areas(given: int, wanted: int) -> Any:
    """Give the share that each of `given` pixels has in each of `wanted` equal stretches: float32 (wanted, given)."""
    import numpy as np

    edges = np.arange(wanted + 1) * (given / wanted)
    starts = np.arange(given)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    overlap = overlap.clip(0)
    return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _neighbours(given: int, wanted: int) -> Any:
    """Give OpenCV's weights of a pixel and its neighbour where it does not average: float32 (wanted, given)."""
    import numpy as np

    places = np.arange(wanted)
    left = np.floor(places * (given / wanted)).astype(int)
    beyond = (places + 1) - (left + 1) * (wanted / given)
    share = np.where(beyond <= 0, 0.0, beyond - np.floor(beyond))
    weights = np.zeros((wanted, given), dtype=np.float32)
    np.add.at(weights, (places, left), 1 - share)
    np.add.at(weights, (places, np.minimum(left + 1, given - 1)), share)
    return weights


def decode_pack(pack: Path, work: Path, pixels: Any, *, classes: int | None = None) -> None:
    """Decode every image of a pack once, into work/{search,test}-*.npy; `classes` keeps the first few of them only."""
    import numpy as np
    import torch

    from carray.pixels import decode

    torch.set_num_threads(1)  # the resize that stands in for OpenCV's runs in every one of the threads below
    images = json.loads((pack / "1" / "pack.json").read_text())["images"]
    archives = {part: zipfile.ZipFile(pack / str(part) / "images.zip") for part in {image["part"] for image in images}}
    chosen = [i for i, image in enumerate(images) if classes is None or image["label"] < classes]
    for name, is_test in (("search", False), ("test", True)):
        numbers = [i for i in chosen if (images[i]["split"] == "test") == is_test]
        data = [archives[images[i]["part"]].read(f"{i}.jpg") for i in numbers]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = list(pool.map(lambda one: decode(one, pixels).pixels_HWC, data))
        np.save(work / f"{name}-pixels.npy", np.stack(decoded))
        np.save(work / f"{name}-labels.npy", np.array([images[i]["label"] for i in numbers], dtype=np.int64))
        splits = np.array([_SPLITS.index(images[i]["split"]) for i in numbers], dtype=np.int8)
        np.save(work / f"{name}-splits.npy", splits)


def open_blocks(work: Path, *names: str) -> list[Any]:
    """Map decoded blocks: `search` has training and validation images, `test` those of cars_test."""
    import numpy as np

    from carray.tensors.format import Block

    return [
        Block(
            pixels_NHWC=np.load(work / f"{name}-pixels.npy", mmap_mode="r"),
            labels_N=np.load(work / f"{name}-labels.npy"),
            splits_N=np.load(work / f"{name}-splits.npy"),
            key=f"gpu-{name}",
        )
        for name in names
    ]

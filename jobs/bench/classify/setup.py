"""Makes what the classification benchmark works with: photographs, bundles, the same network for other tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from carray.bundle.bundle_folder import BUNDLE_JSON, RUNTIME_FILES, open_bundle
from carray.images.pixels import PixelSettings, decode, view
from jobs.bench.rows import cores, prepare_cars, run_carray, set_words

EPOCHS = 3
"""Of the network that is trained if no bundle is given."""
PACKING_IMAGES = 128
"""Of a network with random weights: for calibrating int8, and as many again for judging it."""

LONG_SIDE = 1600
"""Pixels of an enlarged photograph."""
DAFT_SCRIPT = Path(__file__).with_name("daft_classify.py")


@dataclass(frozen=True)
class Bench:
    """What every part works with; folders and bundles below `work` are made on first use and kept."""

    data: Path
    work: Path
    images: int | None
    """The first so many photographs; None is all."""
    peer_images: int | None
    """At most so many for the slow peers; None is all for timm and 2,000 for the recipe."""
    sizes: tuple[int, ...]
    engine: str
    """Of `carray classify` in the parts that compare it with no peer."""
    input_size: int
    given_bundle: str | None

    def manifest(self) -> str:
        """Return the manifest of all photographs."""
        return str(prepare_cars(self.data, self.work))

    def bundle(self) -> str:
        """Return the given bundle, else one of EfficientNet-Lite0 trained here."""
        if self.given_bundle:
            return self.given_bundle
        run, manifest, epochs, started = self.work / "run", self.manifest(), EPOCHS, time.monotonic()
        if not (run / "bundle" / BUNDLE_JSON).exists():
            if self.images:  # a try
                manifest, epochs = str(self.work / "few.parquet"), 1
                run_carray("prepare", self.data, "--out", manifest, "--balance", 2)
            sizes = set_words(f"{name}.input_size={self.input_size}" for name in ("hyper", "pixels"))
            run_carray("train", "--manifest", manifest, "--out", run, "--epochs", epochs, *sizes)
            print(f"trained a bundle in {(time.monotonic() - started) / 60:.1f} minutes, {epochs} epochs", flush=True)
        return str(run / "bundle")

    def folder(self, count: int | None = None) -> str:
        """Return a folder of so many photographs, by default all of cars_train and cars_test."""
        photographs = sorted(path for half in ("cars_train", "cars_test") for path in (self.data / half).iterdir())
        count = count or self.images or len(photographs)
        return str(link_images(photographs, self.work / f"images-{count}", count))

    def out(self, name: str) -> Path:
        """Return a path for a job's output that does not exist."""
        path = self.work / "out" / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that gets its name when it is filled, so that it is there whole or not at all."""
    making = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    yield making
    making.rename(folder)


def link_images(photographs: Sequence[Path], folder: Path, count: int) -> Path:
    """Fill a folder with `count` photographs, repeated if there are too few; whole or not at all.

    The first of each photograph is a copy, and repetitions are hard links to it.
    """
    if not folder.exists():
        with whole_folder(folder) as making:
            for i in range(count):
                photograph = photographs[i % len(photographs)]
                name = f"{photograph.parent.name}-{photograph.name}"
                if i < len(photographs):
                    shutil.copyfile(photograph, making / f"0-{name}")
                else:
                    os.link(making / f"0-{name}", making / f"{i // len(photographs)}-{name}")
    return folder


def few(folder: str, count: int) -> str:
    """Return a folder with the first `count` photographs of another, as hard links."""
    part = Path(f"{folder}-first-{count}")
    if not part.exists():
        with whole_folder(part) as making:
            for path in sorted(Path(folder).iterdir())[:count]:
                os.link(path, making / path.name)
    return str(part)


def runtimes_of(bundle: str) -> list[str]:
    """List the runtimes for processors that a bundle has files for, fastest first."""
    return [name for name in ("int8", "fp32") if RUNTIME_FILES.get(name) in open_bundle(bundle).files]


def about_bundle(bundle: str) -> dict[str, Any]:
    """Return the columns that describe a bundle, of a row about local files."""
    info = open_bundle(bundle)
    return {"net": info.net.get("backbone", "cnn"), "input_size": info.pixels.input_size, "storage": "local"}


def peer_network(bundle: str, folder: Path) -> Path:
    """Write a bundle's network as timm reads it, and a JSON file of its sizes and views; returns that file."""
    import timm
    from safetensors.numpy import load_file, save_file

    info = open_bundle(bundle)
    if info.net.get("family") != "transfer" or info.net.get("flip_average"):
        raise SystemExit(f"{bundle} holds no plain timm network, so its peers cannot run it; give another --bundle")
    name, weights = info.net["backbone"], load_file(Path(bundle) / "weights.safetensors")
    cfg: Any = timm.get_pretrained_cfg(name)
    renamed = {key.removeprefix("trunk."): value for key, value in weights.items() if key.startswith("trunk.")}
    renamed |= {f"{cfg.classifier}.{part}": weights[f"head.{part}"] for part in ("weight", "bias")}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(renamed, folder / "network.safetensors")
    crops = {"squash": "squash", "crop": "center", "pad": "border"}
    network = {
        "model": name,
        "checkpoint": str(folder / "network.safetensors"),
        "classes": len(info.classes),
        "input_size": info.pixels.input_size,
        "crop_pct": info.pixels.view_crop,
        "crop_mode": crops[info.pixels.aspect],
        "mean": (weights["mean"].reshape(3) / 255).round(6).tolist(),
        "std": (weights["std"].reshape(3) / 255).round(6).tolist(),
    }
    (folder / "network.json").write_text(json.dumps(network))
    return folder / "network.json"


def pack_random(backbone: str, bench: Bench) -> str:
    """Pack a backbone with random weights, to measure its speed, with int8 whatever it loses."""
    import numpy as np
    import torch

    from carray.bundle.certificates import Views, add_int8
    from carray.bundle.pack import pack_bundle
    from carray.search.train.hyperparameters import TransferHyper
    from carray.search.train.nets import build_net

    bundle = bench.work / "nets" / backbone
    if (bundle / BUNDLE_JSON).exists():
        return str(bundle)
    torch.manual_seed(0)
    pixels = PixelSettings(input_size=bench.input_size)
    hyper = TransferHyper(backbone=backbone, weights="none", input_size=bench.input_size)
    photographs = sorted((bench.data / "cars_train").iterdir())[: 2 * PACKING_IMAGES]
    views_NHWC = np.stack([view(decode(path.read_bytes(), pixels).pixels_HWC, pixels) for path in photographs])
    making = str(bundle.with_name(f"{bundle.name}.making"))
    pack_bundle(
        build_net(hyper, class_count=196, load_weights=False),
        making,
        classes=[f"class {i}" for i in range(196)],
        pixels=pixels,
        uses_boxes=False,
        temperature=1.0,
        metrics={},
        net_note=hyper.model_dump(mode="json"),
        search_note={"weights": "random"},
        parity_pixels_NHWC=views_NHWC[:16],
    )
    # There are no true labels, so the certificate says nothing and is not asked for.
    labels_N = np.zeros(PACKING_IMAGES, dtype=np.int64)
    add_int8(making, Views(views_NHWC[:PACKING_IMAGES], views_NHWC[PACKING_IMAGES:], labels_N), keep=True)
    Path(making).rename(bundle)
    return str(bundle)


def enlarge_test(bench: Bench) -> str:
    """Return a folder of cars_test enlarged to large JPEGs of quality 90."""
    photographs = sorted((bench.data / "cars_test").iterdir())[: bench.images]
    folder = bench.work / f"enlarged-{len(photographs)}"
    if not folder.exists():
        with whole_folder(folder) as making, ProcessPoolExecutor(cores()) as pool:
            list(pool.map(_enlarge_one, photographs, [making] * len(photographs)))
    return str(folder)


def _enlarge_one(path: Path, folder: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        scale = LONG_SIDE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / path.name, "JPEG", quality=90)


@cache
def daft_python() -> str | None:
    """Return the Python of an environment for Daft, which is made on first use; None, with a line, where it fails."""
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    try:
        for words in (["sync", "--python", sys.executable], ["python", "find"]):
            command = [uv, *words, "--script", DAFT_SCRIPT]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        reason = (getattr(err, "stderr", "") or str(err)).strip().splitlines()[-1]
        print(f"Daft is left out, since its environment cannot be made: {reason}", flush=True)
        return None
    return done.stdout.strip()

"""Measures how many images a second a trial's network classifies end to end, decoding included, on this machine.

Writes RUN/throughput.json; trials.parquet stays as it is. Speed depends on architecture and sizes, not on weights, so
each distinct network is measured once a machine, with random weights, about 4 s each.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.core.errors import DataError
from carray.core.progress import say
from carray.core.settings import parse_settings
from carray.core.store.files import absolute, exists, join, read_json, write_json
from carray.core.store.image_bytes import FetchedImage
from carray.images.pixels import Box, PixelSettings
from carray.images.read import ReadImage, decode_fetched, fetch_original
from carray.manifest.manifest_file import Manifest, read_manifest, row_box
from carray.search import run_folder
from carray.search.space import TuneSettings
from carray.search.train.export import export_onnx
from carray.search.train.hyperparameters import CnnHyper, TransferHyper, read_hyper

__all__ = ["measure_throughput", "read_throughput", "trial_speeds"]

THROUGHPUT = "throughput.json"
_DECIDING = {"cnn": ("stages", "blocks", "width", "kernel"), "transfer": ("backbone",)}
"""Hyperparameters that decide a network's speed, besides its size and flip_average."""
_RUNTIME = "onnxruntime fp32"
_BATCH_IMAGES = 16
_SLICES = 4

Pixels = npt.NDArray[np.uint8]
Fetched = tuple[FetchedImage, Box | None]
Logits = Callable[[Pixels], npt.NDArray[np.float32]]


def measure_throughput(run: str, *, images: int = 48, seconds: float = 2.0) -> dict[str, float]:
    """Measure every distinct network of a run's trials with a result; give images a second by trial_id.

    `images` of the validation split are fetched once; each network scores them again and again for `seconds`.

    Raises:
        SettingsError: no search was ever started there, or it has no table yet.
        DataError: no image of the validation split can be read.
        BundleError: a network cannot be exported.
        StorageError: the manifest cannot be read, or the result not be written.
    """
    run = absolute(run)
    search, trials = run_folder.read_search(run), run_folder.read_trials(run)
    settings = parse_settings(TuneSettings, search["settings"])
    manifest = read_manifest(search["manifest"])
    wanted = {_network_key(hyper): hyper for hyper in _hypers(trials).values()}
    machine = _machine()
    before = read_throughput(run)
    found = dict(before["networks"]) if before.get("machine") == machine else {}
    missing = [key for key in wanted if key not in found]
    if missing:
        data = _fetch(manifest, images)
        for number, key in enumerate(missing, start=1):
            pixels = settings.trial_pixels(wanted[key])
            score = _scorer(wanted[key], pixels.input_size, len(manifest.classes))
            rate = _measure(score, data, pixels, seconds)
            found[key] = {"images_per_second": round(rate, 2), "runtime": _RUNTIME}
            say(f"throughput: {number} of {len(missing)} networks: {key}: {rate:.0f} images a second ({_RUNTIME})")
        note = {"machine": machine, "measured_at": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(join(run, THROUGHPUT), {**note, "images": len(data), "networks": found})
    return trial_speeds(run, trials)


def read_throughput(run: str) -> dict[str, Any]:
    """Read the measurements: machine, measured_at, images and networks, which is empty where nothing was measured."""
    uri = join(run, THROUGHPUT)
    return dict(read_json(uri)) if exists(uri) else {"networks": {}}


def trial_speeds(run: str, trials: pd.DataFrame) -> dict[str, float]:
    """Give measured end-to-end images a second by trial_id, for the trials whose network was measured."""
    networks: Mapping[str, Any] = read_throughput(run)["networks"]
    if not networks:
        return {}
    keys = {trial: _network_key(hyper) for trial, hyper in _hypers(trials).items()}
    return {trial: networks[key]["images_per_second"] for trial, key in keys.items() if key in networks}


def _hypers(trials: pd.DataFrame) -> dict[str, CnnHyper | TransferHyper]:
    """Read the configuration of each trial with a result, by trial_id."""
    hypers = trials[trials["val_top1"].notna()].set_index("trial_id")["hyper"]
    return {str(trial): read_hyper(json.loads(values)) for trial, values in hypers.items()}


def _network_key(hyper: CnnHyper | TransferHyper) -> str:
    """Name what a network's speed depends on, in words."""
    parts = [hyper.family, *(f"{name} {getattr(hyper, name)}" for name in _DECIDING[hyper.family])]
    parts.append(f"at {hyper.eval_size or hyper.input_size} pixels")
    return ", ".join([*parts, "and mirrored"] if hyper.flip_average else parts)


def _machine() -> str:
    """Name the processor and how many cores this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {_cores()} cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _fetch(manifest: Manifest, images: int) -> list[Fetched]:
    rows = manifest.of_split("val")
    chosen = rows.iloc[np.linspace(0, len(rows) - 1, min(images, len(rows))).astype(int)].to_dict("records")

    def fetch(row: Mapping[Any, Any]) -> Fetched | None:
        fetched = fetch_original(row["uri"], escaped=bool(row["escaped"]))
        box = row_box(row) if manifest.crop_boxes else None
        if isinstance(fetched, ReadImage) or decode_fetched(fetched, PixelSettings(), box=box).pixels_HWC is None:
            return None
        return fetched, box

    with ThreadPoolExecutor(_BATCH_IMAGES) as pool:
        found = [pair for pair in pool.map(fetch, chosen) if pair is not None]
    if not found:
        raise DataError(
            f"none of {len(chosen)} validation images of {manifest.uri} can be read, the first is "
            f"{chosen[0]['uri']!r}; speed is measured on real images, so bring them back."
        )
    return found


def _scorer(hyper: CnnHyper | TransferHyper, input_size: int, class_count: int) -> Logits:
    """Export a network with random weights, and give a function from uint8 pixels_BHWC to logits_BK."""
    import onnxruntime

    from carray.search.train.nets import build_net

    net = build_net(hyper, class_count=class_count, load_weights=False).eval()
    probe_BHWC = np.random.default_rng(0).integers(0, 256, (2, input_size, input_size, 3), dtype=np.uint8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as bundle.scorer does
    model = export_onnx(net, probe_BHWC, fast=True)[0]
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda pixels_BHWC: np.asarray(session.run(["logits"], {"pixels": pixels_BHWC})[0])


def _measure(score: Logits, data: list[Fetched], pixels: PixelSettings, seconds: float) -> float:
    """Decode and score batch after batch; give images a second, of the best slice of the time."""
    import cv2

    def see(pair: Fetched) -> Pixels:
        seen = decode_fetched(pair[0], pixels, box=pair[1], as_input=True)
        assert seen.pixels_HWC is not None, "it was decoded when it was fetched"
        return seen.pixels_HWC

    batches = [data[start : start + _BATCH_IMAGES] for start in range(0, len(data), _BATCH_IMAGES)]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # images are decoded side by side already
    try:
        with ThreadPoolExecutor(_cores()) as pool:
            score(np.stack(list(pool.map(see, batches[0]))))  # the first pass sets things up
            passing = cycle(batches)
            best = 0.0
            for _ in range(_SLICES):  # the best of several: whatever else runs here slows some of them
                done, started = 0, time.monotonic()
                while (elapsed := time.monotonic() - started) < seconds / _SLICES:
                    batch = next(passing)
                    score(np.stack(list(pool.map(see, batch))))
                    done += len(batch)
                best = max(best, done / elapsed)
            return best
    finally:
        cv2.setNumThreads(threads)

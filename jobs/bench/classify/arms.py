"""Runs one arm of a comparison as a whole process: `carray classify`, Daft, timm's inference, or Ray's recipe.

All arms score the same files with the same weights and normalisation, and all but Daft with the same crop; carray
writes its whole table (top 5, entropy, hashes), timm a CSV with one label, Daft and the recipe Parquet with one label.
A slow peer runs once in a process: what it did with the same images is kept.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from carray.bundle.bundle_folder import RUNTIME_FILES, open_bundle
from carray.bundle.runtimes import best_batch
from carray.classify.predictions_folder import ClassifySettings
from carray.core.store.files import join, list_files
from jobs.bench.classify.setup import DAFT_SCRIPT, Bench, daft_python
from jobs.bench.classify.watch import Finished, headline, run_watched, steady_rate
from jobs.bench.rows import cores


@dataclass(frozen=True)
class Arm:
    """The outcome of one run of an arm."""

    row: dict[str, Any]
    labels: dict[str, int]
    """Index of each image's likeliest class, by file name; empty if not requested."""


@dataclass(frozen=True)
class TimmSettings:
    """A way to run timm's script."""

    batch: int
    workers: int
    compiled: bool = False
    frozen: bool = False
    """Whether inductor folds weights and batch normalisations into what it compiles."""


def median_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows of the same arm: medians of figures, the first of everything else, and their number."""
    joined: dict[str, Any] = {"repeats": len(rows)}
    for name, value in rows[0].items():
        values = [row[name] for row in rows if row.get(name) is not None]
        alike = len(set(values)) <= 1 or any(isinstance(value, str) for value in values)
        joined[name] = value if alike else round(statistics.median(values), 3)
    return joined


def batch_images(bundle: str, runtime: str) -> int:
    """Return the images per forward pass of `carray classify`: its setting's, else the bundle's best."""
    chosen = ClassifySettings().batch_images
    return chosen if chosen is not None else best_batch(open_bundle(bundle), runtime)


def count_images(folder: str) -> int:
    """Count the files of a local folder."""
    return len(os.listdir(folder))


def classify(
    bench: Bench, bundle: str, source: str, *, runtime: str, engine: str, name: str, labels: bool = False
) -> Arm:
    """Run `carray classify` on an engine."""
    out, settings = str(bench.out(name)), ["--engine", engine, "--set", f"runtime={runtime}"]
    command = ["-m", "carray", "classify", bundle, source, "--out", out, *settings]
    finished = run_watched(command, log=bench.work / "log" / f"{name}.log")
    images = finished.result["rows"]
    if finished.result["ok"] != images:
        raise SystemExit(f"{images - finished.result['ok']} of {images} rows of {out} are errors; see {out}")
    entries = _ledger(out)
    row = _row(finished, images) | {
        "arm": "carray",
        "engine": finished.result["engine"],
        "runtime": runtime,
        "batch_images": batch_images(bundle, runtime),
        "steady_images_per_second": _rounded(steady_rate(entries)),
        "ray_seconds": finished.result["ray_seconds"] if engine == "ray" else None,
        "first_seconds": round(min(entries)[0] - finished.started_at, 2),
    }
    return Arm(row, _our_labels(bundle, out) if labels else {})


def daft(bench: Bench, bundle: str, source: str, *, runtime: str, name: str) -> Arm:
    """Run Daft with a bundle's ONNX file."""
    out, batch = bench.out(name), batch_images(bundle, runtime)
    model, size = Path(bundle) / RUNTIME_FILES[runtime], open_bundle(bundle).pixels.input_size
    command = ["-P", DAFT_SCRIPT, source, model, size, batch, out]
    log, environment = bench.work / "log" / f"{name}.log", {"DO_NOT_TRACK": "1"}  # it would report each run
    finished = run_watched(command, log=log, environment=environment, python=str(daft_python()))
    import pandas as pd

    table = pd.read_parquet(out)
    row = _row(finished, len(table)) | {
        "arm": "daft",
        "runtime": runtime,
        "batch_images": batch,
        "steady_images_per_second": None,
        "note": "from_glob_path, download, decode_image, resize of the whole image to the input, a class UDF with one "
        "onnxruntime session a core, write_parquet; no row for a broken image, no resume, no checks",
    }
    names = table["path"].str.rsplit("/", n=1).str[-1]
    return Arm(row, dict(zip(names, table["label"].astype(int), strict=True)))


@cache
def timm_inference(
    bench: Bench,
    network: Path,
    folder: str,
    settings: TimmSettings,
    *,
    most_seconds: float = float("inf"),
) -> Arm:
    """Run the loop of timm's `inference.py`."""
    name = f"timm-{Path(folder).name}"
    out = bench.work / "out" / f"{name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    task = {**json.loads(network.read_text()), "images": folder, "out": str(out), **asdict(settings)}
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(bench.out("inductor"))}
    environment |= {"TORCHINDUCTOR_FREEZING": "1"} if settings.frozen else {}
    command = ["-m", "jobs.bench.classify.timm_loop", json.dumps(task)]
    log = bench.work / "log" / f"{name}.log"
    finished = run_watched(command, log=log, environment=environment, most_seconds=most_seconds)
    images = count_images(folder)
    row = _row(finished, images) | {
        "arm": "timm",
        "runtime": "torch fp32",
        "batch_images": settings.batch,
        "steady_images_per_second": _rounded(finished.result.get("steady_images_per_second")),
        "note": f"the loop of timm's inference.py, with timm's dataset, loader and model, channels_last; {settings}",
    }
    import pandas as pd

    table = pd.read_csv(out)
    return Arm(row, dict(zip(table["filename"], table["index"].astype(int), strict=True)))


@cache
def recipe(bench: Bench, network: Path, source: str, images: int) -> Arm:
    """Run the recipe of Ray's documentation."""
    name = f"recipe-{Path(source).name}"
    out = bench.out(name)
    command = ["-m", "jobs.bench.classify.ray_recipe", source, out, network]
    finished = run_watched(command, log=bench.work / "log" / f"{name}.log")
    import pandas as pd

    table = pd.read_parquet(out)
    if len(table) != images:
        raise SystemExit(f"the recipe gave {len(table)} rows for {images} images; see {bench.work / 'log'}")
    names = table["path"].str.rsplit("/", n=1).str[-1]
    # Its two stages alternate on few cores, so neither stage's rate is that of the whole.
    span_seconds = float(table["scored_at"].max() - table["transformed_at"].min())
    row = _row(finished, images) | {
        "arm": "ray recipe",
        "runtime": "torch fp32",
        "batch_images": 32,
        "steady_images_per_second": _rounded(images / span_seconds),
        "note": "read_images, torchvision transforms, eager actor, write_parquet",
    }
    return Arm(row, dict(zip(names, table["predicted_label"].astype(int), strict=True)))


def _row(finished: Finished, images: int) -> dict[str, Any]:
    figures = headline(images, wall_seconds=finished.wall_seconds, core_seconds=finished.core_seconds, cores=cores())
    return figures | {
        "images": images,
        "wall_seconds": round(finished.wall_seconds, 2),
        "core_seconds": round(finished.core_seconds, 1),
        "driver_peak_mb": round(finished.driver_peak_mb),
        "worker_peak_mb": round(finished.worker_peak_mb) or None,
        "worker_pss_mb": round(finished.worker_pss_mb) or None,
    }


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


def _ledger(out: str) -> list[tuple[float, int]]:
    """List when each shard was finished (Unix time, seconds), and its images."""
    entries = [Path(uri) for uri in list_files(join(out, "_carray", "ledger"))]
    return [(path.stat().st_mtime, json.loads(path.read_text())["rows"]) for path in entries]


def _our_labels(bundle: str, out: str) -> dict[str, int]:
    import pandas as pd

    classes = {name: i for i, name in enumerate(open_bundle(bundle).classes)}
    table = pd.read_parquet(out, columns=["uri", "label"])
    names = table["uri"].str.rsplit("/", n=1).str[-1]
    return dict(zip(names, table["label"].map(classes), strict=True))

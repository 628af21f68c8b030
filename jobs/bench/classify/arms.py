"""Runs one arm of a comparison as a whole process: `carray classify`, timm's inference, or Ray's recipe.

All arms score the same files with the same weights, input size, crop and normalisation; carray writes its whole table
(top 5, entropy, hashes), timm a CSV with one label, the recipe Parquet with one label.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carray.bundle.bundle_folder import open_bundle
from carray.bundle.runtimes import best_batch
from carray.classify.predictions_folder import ClassifySettings
from carray.core.store.files import join, list_files
from jobs.bench.classify.setup import Bench
from jobs.bench.classify.watch import Finished, headline, run_watched, steady_rate
from jobs.bench.rows import cores

_RAY_READY = "Ray: "
"""Begins the line that `carray classify` writes once Ray runs."""


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

    def text(self) -> str:
        """Describe it for a row."""
        compiled = ", torch.compile" + (" with frozen weights" if self.frozen else "") if self.compiled else ", eager"
        return f"channels_last, batch {self.batch}, {self.workers} loader processes{compiled}"


def batch_images(bundle: str, runtime: str) -> int:
    """Return the images per forward pass of `carray classify`: its setting's, else the bundle's best."""
    chosen = ClassifySettings().batch_images
    return chosen if chosen is not None else best_batch(open_bundle(bundle), runtime)


def count_images(folder: str) -> int:
    """Count the files of a local folder."""
    return len(os.listdir(folder))


def classify(
    bench: Bench, bundle: str, source: str, *, runtime: str, name: str, out: str = "", labels: bool = False
) -> Arm:
    """Run `carray classify`, into a local folder unless `out` is given."""
    out = out or str(bench.out(name))
    command = ["-m", "carray", "classify", bundle, source, "--out", out, "--set", f"runtime={runtime}"]
    finished = run_watched(command, log=bench.work / "log" / f"{name}.log")
    images = finished.result["rows"]
    if finished.result["ok"] != images:
        raise SystemExit(f"{images - finished.result['ok']} of {images} rows of {out} are errors; see {out}")
    local = "://" not in out
    entries = _ledger(out) if local else []
    row = _row(finished, images) | {
        "arm": "carray",
        "runtime": runtime,
        "batch_images": batch_images(bundle, runtime),
        "steady_images_per_second": _rounded(steady_rate(entries)),
        "ray_seconds": finished.result.get("ray_seconds"),
        "first_seconds": finished.result.get("first_seconds"),
    }
    ready = finished.seconds_of_line(_RAY_READY)
    if row["first_seconds"] is None and ready is not None and entries:
        row["first_seconds"] = round(min(entries)[0] - finished.started_at - ready, 2)
    if ready is not None:
        row["ray_ready_seconds"] = round(ready, 2)
    return Arm(row, _our_labels(bundle, out) if labels else {})


def timm_inference(
    bench: Bench, network: Path, folder: str, settings: TimmSettings, *, name: str, fresh: bool = True
) -> Arm:
    """Run the loop of timm's `inference.py`; if not `fresh`, with the last run's compile cache."""
    out = bench.work / "out" / f"{name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    task = {**json.loads(network.read_text()), "images": folder, "out": str(out), **asdict(settings)}
    cache = "inductor-frozen" if settings.frozen else "inductor"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(bench.out(cache) if fresh else bench.work / "out" / cache)}
    environment |= {"TORCHINDUCTOR_FREEZING": "1"} if settings.frozen else {}
    command = ["-m", "jobs.bench.classify.timm_loop", json.dumps(task)]
    finished = run_watched(command, log=bench.work / "log" / f"{name}.log", environment=environment)
    images = count_images(folder)
    row = _row(finished, images) | {
        "arm": "timm",
        "runtime": "torch fp32",
        "batch_images": settings.batch,
        "steady_images_per_second": _rounded(finished.result.get("steady_images_per_second")),
        "note": f"the loop of timm's inference.py, with timm's dataset, loader and model; {settings.text()}",
    }
    import pandas as pd

    table = pd.read_csv(out)
    return Arm(row, dict(zip(table["filename"], table["index"].astype(int), strict=True)))


def recipe(bench: Bench, network: Path, source: str, images: int, *, name: str) -> Arm:
    """Run the recipe of Ray's documentation."""
    out = bench.out(name)
    command = ["-m", "jobs.bench.classify.ray_recipe", "--images", source, "--out", out, "--network", network]
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

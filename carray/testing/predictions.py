"""Writes folders of predictions without classifying: the files and records that a job would have left."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carray.classify.predictions_folder import KIND, VERSION, part_name, prediction_schema, record_place
from carray.core.store.files import join, write_json
from carray.core.store.image_bytes import fetch_image
from carray.core.tables import table_from_rows, write_table
from carray.images.pixels import PixelSettings, decode
from carray.images.vehicles import vehicle_columns

__all__ = [
    "BROKEN",
    "LABELS",
    "NOON",
    "RUN",
    "SHARDS",
    "failed",
    "of_files",
    "row",
    "scored",
    "write_predictions",
]

NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
RUN = {"run_id": "00000000000000aa", "bundle_id": "00000000000000bb", "runtime": "int8"}
LABELS = ["Audi A5 Coupe 2012", "BMW X5 SUV 2007", "Ram C/V Cargo Van Minivan 2012", "unknown"]
BROKEN = {"status": "decode_error", "error_code": "truncated", "error": "image file is truncated"}


def row(uri: str, **values: Any) -> dict[str, Any]:
    """Make a short scored row: an Audi, unless `values` say otherwise."""
    car = {"label": LABELS[0], "make": "Audi", "model": "A5", "body": "Coupe", "year": 2012}
    scores = {"score": 0.9, "margin": 0.8, "top5_labels": [LABELS[0]], "top5_scores": [0.9]}
    facts = {"uri": uri, "status": "ok", "size_bytes": 100, "phash": 1 - 2**63, "scored_at": NOON}
    return facts | car | scores | values


SHARDS = [
    [row("a"), row("b", score=0.25, margin=0.1, phash=7), {"uri": "c", **BROKEN}],
    [
        row("d", label="unknown", make=None, model=None, body=None, year=None, score=0.4, margin=0.05),
        row("e", label="BMW X5 SUV 2007", make="BMW", year=2007, phash=8),
        {"uri": "f", "status": "fetch_error", "error_code": "denied", "error": "the store refused the object"},
        {"uri": "g", **BROKEN},
    ],
]
"""Seven images, a to g, in two files."""


def scored(
    uri: str, *, label: str = LABELS[0], score: float = 0.9, second: float = 0.05, **values: Any
) -> dict[str, Any]:
    """Make a whole scored row; `phash` is drawn from the uri, so no two rows share it."""
    other = next(name for name in LABELS if name != label)
    bits = np.random.default_rng(list(uri.encode())).permutation(64) < 32
    found = {
        "uri": uri,
        "etag": "e",
        "size_bytes": 100_000,
        "width": 640,
        "height": 480,
        "status": "ok",
        "label": label,
        "score": score,
        "margin": score - second,
        "entropy": 0.5,
        "top5_labels": [label, other],
        "top5_scores": [score, second],
        "phash": int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True),
        "scored_at": NOON,
        **{name: column[0] for name, column in vehicle_columns([label]).items()},
    }
    return found | RUN | values


def failed(uri: str, code: str = "truncated", **values: Any) -> dict[str, Any]:
    """Make the row of an image without a prediction."""
    status = "fetch_error" if code in ("not_found", "denied", "timeout", "unavailable") else "decode_error"
    found = {"uri": uri, "status": status, "error_code": code, "error": f"{code}, as a job says it", "scored_at": NOON}
    return found | RUN | values


def of_files(uris: Sequence[str], **values: Any) -> list[dict[str, Any]]:
    """Make the rows of images that exist, with their true etags, sizes and hashes."""
    rows = []
    for i, uri in enumerate(uris):
        fetched = fetch_image(uri)
        seen = decode(fetched.data, PixelSettings())
        facts = {"etag": fetched.etag, "size_bytes": len(fetched.data), "width": seen.width, "height": seen.height}
        score = 0.2 + 0.75 * i / max(1, len(uris) - 1)
        found = scored(uri, label=LABELS[i % len(LABELS)], score=score, second=score / 2, phash=seen.phash)
        rows.append(found | facts | values)
    return rows


def write_predictions(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]] = SHARDS,
    *,
    files: int = 2,
    finished: bool = True,
    **record: Any,
) -> str:
    """Write a run's folder, local or S3, with its records; `rows` are of all files, or a list for each file.

    `record` goes into run.json. Returns the folder.
    """
    out, each = str(folder), -(-len(rows) // files)
    flat = not rows or isinstance(rows[0], Mapping)
    shards: Any = [rows[i * each : (i + 1) * each] for i in range(files)] if flat else rows
    for shard, of_shard in enumerate(shards):
        table = table_from_rows(of_shard, prediction_schema())
        write_table(table, join(out, part_name(shard)), kind=KIND, version=VERSION)
    write_json(record_place(out, "run.json"), {**RUN, **record})
    if finished:
        write_json(record_place(out, "done.json"), {"rows": sum(map(len, shards))})
    return out

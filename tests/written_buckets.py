"""Writes folders of predictions without classifying anything: what a job would have left there."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from carray.classify.predictions_folder import KIND, VERSION, part_name, prediction_schema, record_place
from carray.core.store.files import join, write_json
from carray.core.store.image_bytes import fetch_image
from carray.core.tables import table_from_rows, write_table
from carray.images.pixels import PixelSettings, decode
from carray.images.vehicles import vehicle_columns

NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
RUN = {"run_id": "00000000000000aa", "bundle_id": "00000000000000bb", "runtime": "int8"}
LABELS = ["Audi A5 Coupe 2012", "BMW X5 SUV 2007", "Ram C/V Cargo Van Minivan 2012", "unknown"]


def scored(
    uri: str, *, label: str = LABELS[0], score: float = 0.9, second: float = 0.05, **values: Any
) -> dict[str, Any]:
    """Give the row of a scored image; `phash` is drawn from the uri, so that no two share it."""
    other = next(name for name in LABELS if name != label)
    bits = np.random.default_rng(list(uri.encode())).permutation(64) < 32
    row = {
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
        "phash": int.from_bytes(np.packbits(bits).tobytes(), "big"),
        "scored_at": NOON,
        **{name: column[0] for name, column in vehicle_columns([label]).items()},
    }
    return row | RUN | values


def failed(uri: str, code: str = "truncated", **values: Any) -> dict[str, Any]:
    """Give the row of an image without a prediction."""
    status = "fetch_error" if code in ("not_found", "denied", "timeout", "unavailable") else "decode_error"
    row = {"uri": uri, "status": status, "error_code": code, "error": f"{code}, as a job says it", "scored_at": NOON}
    return row | RUN | values


def of_files(uris: Sequence[str], **values: Any) -> list[dict[str, Any]]:
    """Give the rows of images that are there, with their true etags, sizes and hashes."""
    rows = []
    for i, uri in enumerate(uris):
        fetched = fetch_image(uri)
        seen = decode(fetched.data, PixelSettings())
        facts = {"etag": fetched.etag, "size_bytes": len(fetched.data), "width": seen.width, "height": seen.height}
        score = 0.2 + 0.75 * i / max(1, len(uris) - 1)
        row = scored(uri, label=LABELS[i % len(LABELS)], score=score, second=score / 2, phash=seen.phash)
        rows.append(row | facts | values)
    return rows


def write_predictions(
    folder: str | Path, rows: Sequence[dict[str, Any]], *, files: int = 2, finished: bool = True, **record: Any
) -> str:
    """Write rows into so many files of a run's folder, local or S3, with its records; gives the folder."""
    out, each = str(folder), -(-len(rows) // files)
    for shard in range(files):
        table = table_from_rows(rows[shard * each : (shard + 1) * each], prediction_schema())
        write_table(table, join(out, part_name(shard)), kind=KIND, version=VERSION)
    write_json(record_place(out, "run.json"), {**RUN, **record})
    if finished:
        write_json(record_place(out, "done.json"), {"rows": len(rows)})
    return out

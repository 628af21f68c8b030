"""Writes small runs of predictions whose every row is known."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from carray.classify.predictions_folder import PREDICTION_SCHEMA
from carray.core.store.files import write_json
from carray.core.tables import table_from_rows, write_table

NOON = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)


def row(uri: str, **values: Any) -> dict[str, Any]:
    """Give a scored row: an Audi, unless `values` say otherwise."""
    car = {"label": "Audi A5 Coupe 2012", "make": "Audi", "model": "A5", "body": "Coupe", "year": 2012}
    scores = {"score": 0.9, "margin": 0.8, "top5_labels": ["Audi A5 Coupe 2012"], "top5_scores": [0.9]}
    return (
        {"uri": uri, "status": "ok", "size_bytes": 100, "phash": 2**63 + 1, "scored_at": NOON} | car | scores | values
    )


BROKEN = {"status": "decode_error", "error_code": "truncated", "error": "image file is truncated"}

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


def write_predictions(folder: str, shards: Sequence[Sequence[Mapping[str, Any]]] = SHARDS) -> str:
    """Write a finished run; gives its folder."""
    for i, rows in enumerate(shards):
        table = table_from_rows(rows, PREDICTION_SCHEMA)
        write_table(table, f"{folder}/part-{i:06d}.parquet", kind="predictions", version=1)
    write_json(f"{folder}/_carray/done.json", {"rows": sum(map(len, shards))})
    return folder

"""The files of an evaluation's folder, and the columns of its tables.

    metrics.json             the headline, and what it was measured on; the marker, written last
    report.html              everything below as one page that opens from disk
    predictions.parquet      one row an image of the split: truth beside label, score and top five, or the reason
    per_class.parquet        precision and recall with intervals, f1 and support of every class
    confused_pairs.parquet   truth, label, images, fraction of truth's images
    examples.parquet         small pictures of mistaken images of the most confused pairs
    levels.parquet           accuracy of make, make and model, body, year and exact class
    confusion_kinds.parquet  mistakes by the coarsest part that is wrong
    calibration.parquet      accuracy by score, before (temperature 1) and after calibration
    coverage.parquet         accuracy of what every threshold accepts
    confusion.png            counts by class as a picture, rows add up to 1

Fractions lie in 0..1; `_low` and `_high` are the ends of a two-sided 95 % interval; what could not be measured is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from carray.core.errors import SettingsError
from carray.core.store.files import exists, read_json

__all__ = ["TABLES", "read_finished", "table_kind"]

VERSION = 2
METRICS_JSON, REPORT_HTML, CONFUSION_PNG = "metrics.json", "report.html", "confusion.png"
ROBUSTNESS_JSON, OUTSIDE_JSON = "robustness.json", "outside.json"
"""Markers of evaluation.stress, whose files may be in the same folder."""

TABLES = {
    "predictions": pa.schema(
        [
            ("uri", pa.string()),
            ("truth", pa.string()),
            ("status", pa.string()),  # ok, fetch_error or decode_error
            ("error_code", pa.string()),
            ("error", pa.string()),
            ("label", pa.string()),
            ("score", pa.float64()),  # calibrated probability of label
            ("margin", pa.float64()),
            ("entropy", pa.float64()),  # nats
            ("top5_labels", pa.list_(pa.string())),
            ("top5_scores", pa.list_(pa.float64())),
            ("accept", pa.bool_()),  # null where the bundle has no threshold
        ]
    ),
    "per_class": pa.schema(
        [
            ("label", pa.string()),
            ("precision", pa.float64()),
            ("precision_low", pa.float64()),
            ("precision_high", pa.float64()),
            ("recall", pa.float64()),
            ("recall_low", pa.float64()),
            ("recall_high", pa.float64()),
            ("f1", pa.float64()),
            ("support", pa.int64()),  # images of the class
            ("predicted", pa.int64()),  # images that were taken for it
        ]
    ),
    "confused_pairs": pa.schema(
        [("truth", pa.string()), ("label", pa.string()), ("images", pa.int64()), ("fraction", pa.float64())]
    ),
    "examples": pa.schema(
        [
            ("truth", pa.string()),
            ("label", pa.string()),
            ("uri", pa.string()),
            ("score", pa.float64()),
            ("jpeg", pa.binary()),  # null where the image could not be read again
            ("width", pa.int32()),  # of the small picture
            ("height", pa.int32()),
            ("reason", pa.string()),
        ]
    ),
    "levels": pa.schema(
        [
            ("level", pa.string()),  # make, make_model, body, year or exact
            ("images", pa.int64()),  # whose class name tells that level
            ("accuracy", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
        ]
    ),
    "confusion_kinds": pa.schema(
        [
            ("kind", pa.string()),  # make, model, body, year, variant or unnamed
            ("images", pa.int64()),
            ("fraction_of_mistakes", pa.float64()),
            ("fraction", pa.float64()),  # of all scored images
        ]
    ),
    "calibration": pa.schema(
        [
            ("stage", pa.string()),  # before or after
            ("score_low", pa.float64()),  # the bin's ends; a score on a border belongs to the bin below it
            ("score_high", pa.float64()),
            ("images", pa.int64()),
            ("mean_score", pa.float64()),
            ("accuracy", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
        ]
    ),
    "coverage": pa.schema(
        [
            ("threshold", pa.float64()),  # a score that occurs: it and all above are accepted
            ("images", pa.int64()),
            ("coverage", pa.float64()),
            ("accuracy", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
        ]
    ),
}
"""By the name of their file, without `.parquet`."""


def table_kind(name: str) -> str:
    """Name the kind that a table's file metadata states."""
    return f"evaluation {name}"


def read_finished(marker: str, identity: Mapping[str, Any], *, what: str) -> dict[str, Any] | None:
    """Read the marker of a finished measurement, `what`; None where there is none.

    Raises:
        SettingsError: it is of another measurement than `identity` names.
    """
    if not exists(marker):
        return None
    found: dict[str, Any] = read_json(marker)
    if any(found.get(name) != value for name, value in identity.items()):
        seen = ", ".join(f"{name} {found.get(name)}" for name in identity)
        raise SettingsError(f"{marker} is of another {what} ({seen}); choose another folder with --out.")
    return found

"""Summarises a run: rows by status, reasons of failures, makes and labels, in six lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from carray.core.store.files import absolute
from carray.core.text import readable
from carray.queries.questions import UNCERTAIN_SCORE
from carray.queries.reading import check_columns, open_predictions
from carray.queries.sql import connect

__all__ = ["summarize", "summary_text"]


def summarize(path: str, *, top: int = 10) -> dict[str, Any]:
    """Count rows by status, error kind, make and label (the `top` most frequent), with mean score and uncertain ones.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    data = open_predictions(path)
    check_columns(["status", "error_code", "score", "make", "label"], data.schema)
    with connect({"predictions": data}) as connection:

        def counts(column: str, where: str, limit: int) -> dict[str, int]:
            rows = connection.execute(
                f"SELECT {column} AS name, count(*) AS images FROM predictions WHERE {where} AND {column} IS NOT NULL "
                f"GROUP BY {column} ORDER BY images DESC, name LIMIT {limit}"
            ).fetchall()
            return dict(rows)

        by_status = counts("status", "true", 100)
        mean_score, uncertain = connection.execute(
            f"SELECT avg(score), count(*) FILTER (score < {UNCERTAIN_SCORE}) FROM predictions WHERE status = 'ok'"
        ).fetchall()[0]
        return {
            "path": absolute(path),
            "rows": sum(by_status.values()),
            "by_status": by_status,
            "error_codes": counts("error_code", "status <> 'ok'", 100),
            "mean_score": mean_score,
            "uncertain": uncertain,
            "top_makes": counts("make", "status = 'ok'", top),
            "top_labels": counts("label", "status = 'ok'", top),
        }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Say a summary in a few lines for a person."""

    def listed(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{readable(name)} {count:,}" for name, count in counts.items()) or "none"

    score = "none" if summary["mean_score"] is None else f"{summary['mean_score']:.3f}"
    return "\n".join(
        [
            f"{summary['rows']:,} images in {summary['path']}",
            f"  status      {listed(summary['by_status'])}",
            f"  errors      {listed(summary['error_codes'])}",
            f"  mean score  {score}; {summary['uncertain']:,} images below {UNCERTAIN_SCORE}",
            f"  makes       {listed(summary['top_makes'])}",
            f"  labels      {listed(summary['top_labels'])}",
        ]
    )

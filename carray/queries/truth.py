"""The questions that need a second table: how right a run is, and where two runs differ.

Invariants: rows are joined by the exact uri; an image without a label, without a prediction, or that could not be
scored is counted, and is in no accuracy; intervals are Wilson's, 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError
from carray.core.progress import say
from carray.evaluation.metrics import wilson_interval
from carray.queries.labels import open_labels
from carray.queries.reading import check_columns, open_predictions, to_frame
from carray.queries.sql import ask, connect

__all__ = ["accuracy", "accuracy_by_class", "accuracy_by_split", "disagreements", "limit_clause"]

_JOINED = """
CREATE TEMP TABLE joined AS
WITH truth AS (
    SELECT uri, min(label) AS truth{split} FROM labels WHERE uri IS NOT NULL AND label IS NOT NULL GROUP BY uri
)
SELECT truth.* EXCLUDE (uri), status, label FROM truth LEFT JOIN predictions USING (uri)
"""
_COUNTS = """
count(*) FILTER (status = 'ok') AS images, count(*) FILTER (status = 'ok' AND label = truth) AS hits,
count(*) FILTER (status <> 'ok') AS not_scored, count(*) FILTER (status IS NULL) AS without_prediction
"""


def accuracy(path: str, labels: str, *, column: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Measure a run against a table of true labels: one row, with counts of all that is in no accuracy.

    Columns: images (labelled and scored), hits, accuracy, low, high; never_predicted (of the images, those whose label
    no image of the run was given: a class that the bundle lacks, or that it never chose; they count as wrong);
    not_scored (labelled, but they failed), without_prediction (labelled, but not in the run), without_label (scored,
    but not labelled).

    `column` says which column of the labels is which, such as {"uri": "path"}, where their names do not say it.

    Raises:
        SchemaError: either table is none, no uri is in both, or one uri has two labels.
        StorageError: a table cannot be read.
    """
    frame = _accuracy(
        path,
        labels,
        f"SELECT {_COUNTS}, count(*) FILTER (status = 'ok' AND truth NOT IN (SELECT DISTINCT label FROM predictions "
        "WHERE status = 'ok' AND label IS NOT NULL)) AS never_predicted, "
        "(SELECT count(*) FROM predictions WHERE status = 'ok') - images AS without_label FROM joined",
        column,
    )
    return frame[[*_MEASURED, "never_predicted", *_LEFT_OUT, "without_label"]]


def accuracy_by_class(path: str, labels: str, *, column: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Measure a run against a table of true labels, class by class, the least accurate first."""
    frame = _accuracy(
        path, labels, f"SELECT truth AS label, {_COUNTS} FROM joined GROUP BY truth ORDER BY truth", column
    )
    frame = frame.sort_values(["accuracy", "label"], ignore_index=True)
    return frame[["label", *_MEASURED, *_LEFT_OUT]]


def accuracy_by_split(path: str, labels: str, *, column: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Measure a run against a manifest, split by split: the training images flatter.

    Raises:
        SchemaError: the table of labels has no column split, or what `accuracy` says.
    """
    sql = f"SELECT split, {_COUNTS} FROM joined GROUP BY split ORDER BY split"
    frame = _accuracy(path, labels, sql, column, by_split=True)
    return frame[["split", *_MEASURED, *_LEFT_OUT]]


_MEASURED = ["images", "hits", "accuracy", "low", "high"]
_LEFT_OUT = ["not_scored", "without_prediction"]


def _accuracy(
    path: str, labels: str, sql: str, column: Mapping[str, str] | None, *, by_split: bool = False
) -> pd.DataFrame:
    tables = {"predictions": open_predictions(path), "labels": open_labels(labels, column)}
    check_columns(["label"], tables["predictions"].schema)
    _check_labels(tables["labels"], labels)
    has_split = "split" in tables["labels"].schema.names
    if by_split and not has_split:
        raise SchemaError(f"{labels} has no column split; ask for accuracy, or give a manifest.")
    with connect(tables) as connection:
        connection.execute(_JOINED.format(split=", min(split) AS split" if has_split else ""))
        joined, found = connection.execute("SELECT count(*), count(status) FROM joined").fetchall()[0]
        if not found:
            example = connection.execute("SELECT min(uri) FROM labels").fetchall()[0][0]
            there = connection.execute("SELECT uri FROM predictions LIMIT 1").fetchall()
            spelled = f"such as {there[0][0]!r}" if there else "which are none"
            raise SchemaError(
                f"none of the {joined:,} labelled uris of {labels}, such as {example!r}, is among those of {path}, "
                f"{spelled}; spell them alike."
            )
        if has_split and not by_split:
            _warn_of_training(connection, labels)
        frame = to_frame(connection.sql(sql).to_arrow_table())
    return frame.assign(**_fractions(frame["hits"].tolist(), frame["images"].tolist()))


def _fractions(hits: list[int], images: list[int]) -> dict[str, Any]:
    """Give accuracy, low and high of each pair of counts; accuracy is null where there is nothing to measure."""
    intervals = [wilson_interval(*pair) for pair in zip(hits, images, strict=True)]
    accuracy = [right / total if total else None for right, total in zip(hits, images, strict=True)]
    values = {"accuracy": accuracy, "low": [low for low, _ in intervals], "high": [high for _, high in intervals]}
    return {name: pd.Series(column, dtype="Float64") for name, column in values.items()}


def _check_labels(data: pads.Dataset, labels: str) -> None:
    odd = ask(
        {"labels": data},
        "SELECT count(*) AS uris, min(uri) AS example FROM "
        "(SELECT uri FROM labels WHERE uri IS NOT NULL GROUP BY uri HAVING min(label) <> max(label))",
    ).iloc[0]
    if odd["uris"]:
        raise SchemaError(
            f"{labels} gives {odd['uris']:,} uris more than one label, such as {odd['example']!r}; an image has one."
        )
    if not ask({"labels": data}, "SELECT count(*) AS labels FROM labels WHERE label IS NOT NULL").iloc[0]["labels"]:
        raise SchemaError(f"{labels} holds no label; give a table with labelled rows.")


def _warn_of_training(connection: Any, labels: str) -> None:
    sql = "SELECT count(*) FROM joined WHERE split = 'train' AND status = 'ok'"
    training = connection.execute(sql).fetchall()[0][0]
    if training:
        say(f"warning: {training:,} of these images are of the split train of {labels}; ask for accuracy-by-split.")


def disagreements(path: str, other: str, *, limit: int | None = 1_000) -> pd.DataFrame:
    """List the images that two runs label differently, first those of which both are sure.

    Raises:
        SchemaError: either folder holds no predictions, or no uri is in both.
        StorageError: the files cannot be read.
    """
    tables = {"predictions": open_predictions(path), "other": open_predictions(other)}
    for data in tables.values():
        check_columns(["label", "score"], data.schema)
    found = ask(
        tables,
        "SELECT uri, a.label, a.score, b.label AS other_label, b.score AS other_score "
        "FROM predictions a JOIN other b USING (uri) "
        "WHERE a.status = 'ok' AND b.status = 'ok' AND a.label <> b.label "
        f"ORDER BY least(a.score, b.score) DESC, uri {limit_clause(limit)}",
    )
    if found.empty and ask(tables, "SELECT uri FROM predictions SEMI JOIN other USING (uri) LIMIT 1").empty:
        raise SchemaError(f"{path} and {other} have no uri in common; compare runs over the same images.")
    return found


def limit_clause(limit: int | None) -> str:
    """Give the end of a query that gives so many rows at most.

    Raises:
        SettingsError: it is no number of rows.
    """
    if limit is None:
        return ""
    if limit < 1:
        raise SettingsError(f"limit is {limit}; give 1 or more, or None for all rows.")
    return f"LIMIT {int(limit)}"

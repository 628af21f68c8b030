"""The named questions, each a function from a path to a frame that reads only the columns it names; and the summary.

Lists begin with the most informative rows and end after LIST_ROWS by default; counts are complete. Labels are joined by
uri; images without a label, a prediction or a score are counted, but not in an accuracy. Intervals: Wilson's, 95 %.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute
from carray.core.text import did_you_mean, readable
from carray.evaluation.metrics import wilson_interval
from carray.queries.reading import check_columns, open_labels, open_predictions, to_frame
from carray.queries.sql import ask, connect

__all__ = [
    "LIST_ROWS",
    "QUESTIONS",
    "UNCERTAIN_SCORE",
    "accuracy",
    "accuracy_by_class",
    "accuracy_by_split",
    "ask_question",
    "by_label",
    "by_make",
    "by_year",
    "count_by",
    "disagreements",
    "failed",
    "near_duplicates",
    "summarize",
    "summary_text",
    "uncertain",
]

UNCERTAIN_SCORE = 0.5
"""With calibrated scores, a label below it is more likely wrong than right."""
LIST_ROWS = 1_000
"""The default limit of a list."""

_MEASURED = ["images", "hits", "accuracy", "low", "high"]
_LEFT_OUT = ["not_scored", "without_prediction"]
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


def by_make(path: str) -> pd.DataFrame:
    """Count images by make, the most frequent first, with their mean score and how many are uncertain."""
    return count_by(path, "make")


def by_label(path: str) -> pd.DataFrame:
    """Count images by label, the most frequent first, with their mean score and how many are uncertain."""
    return count_by(path, "label")


def by_year(path: str) -> pd.DataFrame:
    """Count images by model year, in order, with their mean score and how many are uncertain."""
    return count_by(path, "year").sort_values("year", ignore_index=True)


def uncertain(path: str, *, limit: int | None = LIST_ROWS) -> pd.DataFrame:
    """List the images whose best score is below 0.5, the smallest margin first: a list for labelling."""
    return _rows(
        path,
        ["uri", "label", "score", "margin", "top5_labels", "top5_scores"],
        f"WHERE status = 'ok' AND score < {UNCERTAIN_SCORE} ORDER BY margin, uri",
        limit,
    )


def failed(path: str, *, limit: int | None = LIST_ROWS) -> pd.DataFrame:
    """List the images that could not be scored, by kind, with the reason."""
    return _rows(
        path, ["uri", "status", "error_code", "error"], "WHERE status <> 'ok' ORDER BY status, error_code, uri", limit
    )


def near_duplicates(path: str, *, limit: int | None = LIST_ROWS) -> pd.DataFrame:
    """List the images that share their perceptual hash with another one, the largest group first."""
    data = open_predictions(path)
    check_columns(["phash", "label", "score"], data.schema)
    rows = _limit(limit)
    # Counting hashes first takes eight bytes a row; a window function would hold every uri.
    groups = (
        "SELECT phash, count(*) AS images FROM predictions WHERE phash IS NOT NULL GROUP BY phash HAVING count(*) > 1 "
        f"ORDER BY images DESC, phash {rows}"
    )
    return ask(
        {"predictions": data},
        f"SELECT phash, images, uri, label, score FROM predictions JOIN ({groups}) USING (phash) "
        f"ORDER BY images DESC, phash, uri {rows}",
    )


def accuracy(path: str, labels: str, *, column: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Measure a run against a table of true labels; gives one row, with counts of the images left out.

    Columns: images (labelled and scored), hits, accuracy, low, high; never_predicted (images whose label the run never
    gave, as the bundle lacks it or never chose it; they count as wrong); not_scored (labelled, but failed),
    without_prediction (labelled, but not in the run), without_label (scored, but not labelled).

    `column` gives the labels' column names, such as {"uri": "path"}, where they differ from uri, label and split.

    Raises:
        SchemaError: a table is not what it should be, they have no uri in common, or one uri has two labels.
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
    """Measure a run against a table of true labels by class, the least accurate first."""
    frame = _accuracy(
        path, labels, f"SELECT truth AS label, {_COUNTS} FROM joined GROUP BY truth ORDER BY truth", column
    )
    frame = frame.sort_values(["accuracy", "label"], ignore_index=True)
    return frame[["label", *_MEASURED, *_LEFT_OUT]]


def accuracy_by_split(path: str, labels: str, *, column: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Measure a run against a manifest by split; accuracy on training images is too high.

    Raises:
        SchemaError: the table of labels has no column split, or as in `accuracy`.
    """
    sql = f"SELECT split, {_COUNTS} FROM joined GROUP BY split ORDER BY split"
    frame = _accuracy(path, labels, sql, column, by_split=True)
    return frame[["split", *_MEASURED, *_LEFT_OUT]]


def disagreements(path: str, other: str, *, limit: int | None = LIST_ROWS) -> pd.DataFrame:
    """List the images that two runs label differently, first those for which both scores are high.

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
        f"ORDER BY least(a.score, b.score) DESC, uri {_limit(limit)}",
    )
    if found.empty and ask(tables, "SELECT uri FROM predictions SEMI JOIN other USING (uri) LIMIT 1").empty:
        raise SchemaError(f"{path} and {other} have no uri in common; compare runs over the same images.")
    return found


QUESTIONS: Mapping[str, Callable[..., pd.DataFrame]] = {
    "by-make": by_make,
    "by-label": by_label,
    "by-year": by_year,
    "uncertain": uncertain,
    "failed": failed,
    "near-duplicates": near_duplicates,
    "accuracy": accuracy,
    "accuracy-by-class": accuracy_by_class,
    "accuracy-by-split": accuracy_by_split,
    "disagreements": disagreements,
}
"""The named questions of the command line."""


def ask_question(name: str, path: str, **given: Any) -> pd.DataFrame:
    """Ask a question by its name; `given` may hold labels, column, other and limit, None where not given.

    Raises:
        SettingsError: there is no such question, it lacks the table it needs, or was given what it does not take.
    """
    question = QUESTIONS.get(name.replace("_", "-"))
    if question is None:
        hint = did_you_mean(name, QUESTIONS, f"there are {', '.join(QUESTIONS)}, or write SQL.", cutoff=0.5)
        raise SettingsError(f"{name!r} is no question; {hint}")
    taken = inspect.signature(question).parameters
    given = {key: value for key, value in given.items() if value is not None}
    for key in given:
        if key not in taken:
            raise SettingsError(f"{name} takes no {key}; leave --{key} out.")
    for key in ("labels", "other"):
        if key in taken and key not in given:
            what = "a table of true labels" if key == "labels" else "another run"
            raise SettingsError(f"{name} needs {what}; give it with --{key}.")
    if given.get("limit") == 0:  # all rows, on the command line
        given["limit"] = None
    return question(path, **given)


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
    """Format a summary as six lines of text."""

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


def count_by(path: str, column: str) -> pd.DataFrame:
    """Count scored images by a column, the most frequent first, with their mean score and how many are uncertain.

    Raises:
        SchemaError: the folder holds no predictions, or they lack the column.
        StorageError: the files cannot be read.
    """
    data = open_predictions(path)
    check_columns([column, "score"], data.schema)
    return ask(
        {"predictions": data},
        f"SELECT {column}, count(*) AS images, avg(score) AS mean_score, "
        f"count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain "
        f"FROM predictions WHERE status = 'ok' GROUP BY {column} ORDER BY images DESC, {column}",
    )


def _rows(path: str, columns: Sequence[str], clauses: str, limit: int | None) -> pd.DataFrame:
    data = open_predictions(path)
    check_columns(columns, data.schema)
    return ask({"predictions": data}, f"SELECT {', '.join(columns)} FROM predictions {clauses} {_limit(limit)}")


def _limit(limit: int | None) -> str:
    if limit is None:
        return ""
    if limit < 1:
        raise SettingsError(f"limit is {limit}; give 1 or more, or None for all rows.")
    return f"LIMIT {int(limit)}"


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
            predicted = connection.execute("SELECT uri FROM predictions LIMIT 1").fetchall()
            such_as = f"such as {predicted[0][0]!r}" if predicted else "which are none"
            raise SchemaError(
                f"none of the {joined:,} labelled uris of {labels}, such as {example!r}, is among those of {path}, "
                f"{such_as}; spell them alike."
            )
        if has_split and not by_split:
            _warn_of_training(connection, labels)
        frame = to_frame(connection.sql(sql).to_arrow_table())
    counts = list(zip(frame["hits"].tolist(), frame["images"].tolist(), strict=True))
    rows = [(hits / images if images else None, *wilson_interval(hits, images)) for hits, images in counts]
    return frame.join(pd.DataFrame(rows, columns=["accuracy", "low", "high"], dtype="Float64"))


def _check_labels(data: pads.Dataset, labels: str) -> None:
    ambiguous = ask(
        {"labels": data},
        "SELECT count(*) AS uris, min(uri) AS example FROM "
        "(SELECT uri FROM labels WHERE uri IS NOT NULL GROUP BY uri HAVING min(label) <> max(label))",
    ).iloc[0]
    if ambiguous["uris"]:
        raise SchemaError(
            f"{labels} gives {ambiguous['uris']:,} uris more than one label, such as {ambiguous['example']!r}; "
            "an image has one."
        )
    if not ask({"labels": data}, "SELECT count(*) AS labels FROM labels WHERE label IS NOT NULL").iloc[0]["labels"]:
        raise SchemaError(f"{labels} holds no label; give a table with labelled rows.")


def _warn_of_training(connection: Any, labels: str) -> None:
    sql = "SELECT count(*) FROM joined WHERE split = 'train' AND status = 'ok'"
    training = connection.execute(sql).fetchall()[0][0]
    if training:
        say(f"warning: {training:,} of these images are of the split train of {labels}; ask for accuracy-by-split.")

"""The named questions: plain functions from a path to a frame, each of which reads only the columns it names.

Invariants: what may be as long as the run is a list, which ends after LIST_ROWS rows unless told otherwise, and says
the most telling rows first; counts are whole. A question about a column that an older table lacks is a sentence.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from carray.core.errors import SettingsError
from carray.queries.reading import check_columns, open_predictions
from carray.queries.sql import ask
from carray.queries.truth import accuracy, accuracy_by_class, accuracy_by_split, disagreements, limit_clause

__all__ = [
    "LIST_ROWS",
    "QUESTIONS",
    "UNCERTAIN_SCORE",
    "ask_question",
    "by_label",
    "by_make",
    "by_year",
    "failed",
    "near_duplicates",
    "uncertain",
]

UNCERTAIN_SCORE = 0.5
"""Below it a label is more likely wrong than right, if the scores are calibrated."""

LIST_ROWS = 1_000
"""Rows of a list unless the caller says otherwise; None is all of them."""


def by_make(path: str) -> pd.DataFrame:
    """Count images by make, the most frequent first, with their mean score and how many are uncertain."""
    return _counts(path, "make", order="images DESC, make")


def by_label(path: str) -> pd.DataFrame:
    """Count images by label, the most frequent first, with their mean score and how many are uncertain."""
    return _counts(path, "label", order="images DESC, label")


def by_year(path: str) -> pd.DataFrame:
    """Count images by model year, in order, with their mean score and how many are uncertain."""
    return _counts(path, "year", order="year")


def uncertain(path: str, *, limit: int | None = LIST_ROWS) -> pd.DataFrame:
    """List the images whose best score is below 0.5, the closest races first: a list for labelling."""
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
    """List the images that share their perceptual hash with another, the largest group first."""
    data = open_predictions(path)
    check_columns(["phash", "label", "score"], data.schema)
    rows = limit_clause(limit)
    # The hashes alone are counted first: eight bytes a row, where a window would hold every uri. A group has two rows
    # or more, so `limit` groups are enough.
    groups = (
        "SELECT phash, count(*) AS images FROM predictions WHERE phash IS NOT NULL GROUP BY phash HAVING count(*) > 1 "
        f"ORDER BY images DESC, phash {rows}"
    )
    return ask(
        {"predictions": data},
        f"SELECT phash, images, uri, label, score FROM predictions JOIN ({groups}) USING (phash) "
        f"ORDER BY images DESC, phash, uri {rows}",
    )


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
"""The named questions, as the command line calls them."""


def ask_question(name: str, path: str, **given: Any) -> pd.DataFrame:
    """Ask a question by its name; `given` may hold labels, other and limit, None where nothing was said.

    Raises:
        SettingsError: there is no such question, it lacks the table it needs, or was given what it does not take.
    """
    question = QUESTIONS.get(name.replace("_", "-"))
    if question is None:
        close = difflib.get_close_matches(name, QUESTIONS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(QUESTIONS)}, or write SQL."
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
    if given.get("limit") == 0:  # as the command line says "all"
        given["limit"] = None
    return question(path, **given)


def _counts(path: str, column: str, *, order: str) -> pd.DataFrame:
    data = open_predictions(path)
    check_columns([column, "score"], data.schema)
    return ask(
        {"predictions": data},
        f"SELECT {column}, count(*) AS images, avg(score) AS mean_score, "
        f"count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain "
        f"FROM predictions WHERE status = 'ok' GROUP BY {column} ORDER BY {order}",
    )


def _rows(path: str, columns: Sequence[str], clauses: str, limit: int | None) -> pd.DataFrame:
    data = open_predictions(path)
    check_columns(columns, data.schema)
    return ask({"predictions": data}, f"SELECT {', '.join(columns)} FROM predictions {clauses} {limit_clause(limit)}")

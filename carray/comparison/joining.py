"""Joins two tables of predictions by uri and counts, in one pass: rows become cells, and only cells are kept.

From: two opened tables. To: the temporary tables `cells` and `changes` in a DuckDB connection.
Invariants: an image counts once. Labels, scores and truth are compared only where both runs scored the image; where the
two etags are known and differ, its bytes were others, so the cell says `changed`. A join of 100 million uris exceeds
memory and spills to disk; cells are few: as many as there are pairs of labels and of score bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow.dataset as pads

from carray.core.errors import SchemaError
from carray.queries import connect

__all__ = ["BINS", "CHANGE_STEP", "SURE_SCORE", "join_runs"]

BINS = 20
"""Equal bins of scores between 0 and 1."""
CHANGE_STEP = 0.001
"""Width of the bins of score changes: quantiles are exact to half of it."""
SURE_SCORE = 0.8
"""Above it a run is sure of its label."""

_COLUMNS = ("label", "score")

_JOIN = """
CREATE TEMP TABLE counted AS
WITH joined AS (
    SELECT a.status AS status_a, b.status AS status_b, a.status = 'ok' AND b.status = 'ok' AS scored,
        CASE WHEN scored THEN a.label END AS label_a, CASE WHEN scored THEN b.label END AS label_b,
        CASE WHEN scored THEN a.score::DOUBLE END AS score_a, CASE WHEN scored THEN b.score::DOUBLE END AS score_b,
        {changed} AS changed, {right_a} AS right_a, {right_b} AS right_b
    FROM a FULL JOIN b USING ({keys})
),
binned AS (
    SELECT *, score_a > {sure} AS sure_a, score_b > {sure} AS sure_b,
        least(floor(score_a * {bins}), {bins} - 1)::TINYINT AS bin_a,
        least(floor(score_b * {bins}), {bins} - 1)::TINYINT AS bin_b,
        CASE WHEN NOT changed THEN round((score_b - score_a) / {step})::SMALLINT END AS change
    FROM joined
)
SELECT status_a, status_b, changed, label_a, label_b, right_a, right_b, sure_a, sure_b, bin_a, bin_b, change,
    grouping(status_a) AS by_change, count(*) AS images,
    coalesce(sum(score_a), 0) AS score_a, coalesce(sum(score_b), 0) AS score_b,
    coalesce(sum(score_b - score_a), 0) AS score_change, coalesce(sum((score_b - score_a) ** 2), 0) AS score_change_2
FROM binned
GROUP BY GROUPING SETS (
    (status_a, status_b, changed, label_a, label_b, right_a, right_b, sure_a, sure_b, bin_a, bin_b), (change)
)
"""
_CELLS = "CREATE TEMP VIEW cells AS SELECT * FROM counted WHERE by_change = 0"
_CHANGES = "CREATE TEMP VIEW changes AS SELECT change, images FROM counted WHERE by_change = 1 AND change IS NOT NULL"


@contextmanager
def join_runs(
    a: pads.Dataset, b: pads.Dataset, *, names: tuple[str, str], keys: Sequence[str] = ("uri",)
) -> Iterator[Any]:
    """Give a DuckDB connection that holds the cells and the changes of two runs.

    Args:
        a: the first table, with uri, status, label and score; perhaps with etag, and with truth.
        b: the second one.
        names: what to call them in a sentence.
        keys: what an image is known by.

    Raises:
        SchemaError: a table lacks a column, no image is in both, or several rows of one run have the same key.
    """
    for data, name in zip((a, b), names, strict=True):
        missing = [column for column in _COLUMNS if column not in data.schema.names]
        if missing:
            raise SchemaError(f"{name} lacks the column {', '.join(missing)}; give the --out of carray classify.")
    in_both = set(a.schema.names) & set(b.schema.names)
    etags = "scored AND coalesce(a.etag <> b.etag, false)" if "etag" in in_both else "false"
    right = {
        f"right_{side}": f"CASE WHEN scored THEN {side}.label = {side}.truth END" if "truth" in in_both else "NULL"
        for side in ("a", "b")
    }
    with connect({"a": a, "b": b}) as connection:
        sizes = {"sure": SURE_SCORE, "bins": BINS, "step": CHANGE_STEP}
        connection.execute(_JOIN.format(keys=", ".join(keys), changed=etags, **right, **sizes))
        connection.execute(_CELLS)
        connection.execute(_CHANGES)
        _check_keys(connection, names)
        yield connection


def _check_keys(connection: Any, names: tuple[str, str]) -> None:
    both, with_a, with_b = connection.execute(
        "SELECT coalesce(sum(images) FILTER (status_a IS NOT NULL AND status_b IS NOT NULL), 0), "
        "coalesce(sum(images) FILTER (status_a IS NOT NULL), 0), "
        "coalesce(sum(images) FILTER (status_b IS NOT NULL), 0) FROM cells"
    ).fetchall()[0]
    if not both:
        raise SchemaError(
            f"{names[0]} ({with_a:,} images) and {names[1]} ({with_b:,} images) have no uri in common; compare runs "
            "over the same images."
        )
    for side, name, joined in (("a", names[0], with_a), ("b", names[1], with_b)):
        rows = connection.execute(f"SELECT count(*) FROM {side}").fetchall()[0][0]
        if rows != joined:
            other = names[1] if side == "a" else names[0]
            raise SchemaError(
                f"{other} has several rows of one uri, as a run over boxes has, so {name} cannot be joined with it; "
                "compare the bundles over a manifest."
            )

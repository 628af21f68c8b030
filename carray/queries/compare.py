"""Joins two tables of predictions by uri, and computes a comparison's figures.

`join_runs` counts the joined rows once into the temporary tables `cells` (by label, score bin and so on) and `changes`
(of the score); everything else reads those. Labels, scores and truth are compared only where both runs scored the image
and its etag did not change; images whose etags differ are counted separately. Without a compared image, figures are
None. A join that exceeds memory spills to disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads

from carray.core.errors import SchemaError
from carray.evaluation.metrics import wilson_interval
from carray.queries import connect, to_frame

__all__ = ["BINS", "Tables", "join_runs", "mcnemar_p", "mean_interval", "paired_change", "psi_words", "stability_index"]

_Z = 1.959964
"""Of a two-sided 95 % interval."""


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Compute the p-value of McNemar's exact test: how likely so uneven a split is if both are right equally often.

    Args:
        only_a: images that A alone has right.
        only_b: images that B alone has right.

    Source: McNemar (1947), Psychometrika 12(2), 153-157; exact form: the binomial test of `only_a` of both, at 1/2.
    """
    from scipy.stats import binomtest

    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_change(gained: int, lost: int, images: int) -> tuple[float, float, float]:
    """Compute the change of a share between two labellings of the same images: (change, low, high), 95 %.

    Args:
        gained: images that only B counts in.
        lost: images that only A counts in.
        images: all images, at least 1.

    Source: the adjusted Wald interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics
    37(4), 479-488, which also holds for small counts.
    """
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    spread = _Z * math.sqrt(max(0.0, up + down - (up - down) ** 2) / (images + 2))
    return (gained - lost) / images, max(-1.0, up - down - spread), min(1.0, up - down + spread)


def mean_interval(total: float, squares: float, images: int) -> tuple[float, float, float]:
    """Compute the mean of `images` values and its 95 % interval, from their sum and the sum of their squares."""
    mean = total / images
    variance = max(0.0, squares / images - mean**2) * images / max(1, images - 1)
    spread = _Z * math.sqrt(variance / images)
    return mean, mean - spread, mean + spread


def stability_index(counts_a: Sequence[int], counts_b: Sequence[int]) -> float:
    """Compute the population stability index (PSI) of two distributions over the same cells; 0 if they are equal.

    It is the sum of (b - a) ln(b / a) over the shares a and b. Half an image is added to every cell, so that an empty
    one counts much but not infinitely.

    Source: Siddiqi (2006), Credit Risk Scorecards, Wiley, chapter 9.
    """
    shares_a, shares_b = (
        (np.asarray(counts, dtype=float) + 0.5) / (sum(counts) + 0.5 * len(counts)) for counts in (counts_a, counts_b)
    )
    return float(((shares_b - shares_a) * np.log(shares_b / shares_a)).sum())


def psi_words(index: float) -> str:
    """Describe a PSI by Siddiqi's rule of thumb: below 0.1 stable, to 0.25 some drift, above it much."""
    return "stable" if index < 0.1 else "some drift" if index <= 0.25 else "much drift"


BINS = 20
"""Equal bins of scores between 0 and 1."""
CHANGE_STEP = 0.001
"""Width of the bins of score changes: quantiles are exact to half of it."""
SURE_SCORE = 0.8
"""A run is sure of a label with a higher score."""

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
    """Open a DuckDB connection with the tables `cells` and `changes` of two runs.

    Args:
        a: The first table: uri, status, label and score, optionally etag and truth.
        b: The second one.
        names: Their names in error sentences.
        keys: The columns that identify an image.

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


_COMPARED = "label_a IS NOT NULL AND label_b IS NOT NULL AND NOT changed"
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Tables:
    """The tables of a comparison besides its headline."""

    statuses: pd.DataFrame
    """status_a, status_b (null where the run does not have the image), images; all images."""
    flips: pd.DataFrame
    """label_a, label_b, images, mean_score_a, mean_score_b: every change of label, the most frequent first."""
    classes: pd.DataFrame
    """Images, shares and mean scores of every label in A and in B, the largest change of share first."""
    scores_a: list[int]
    """Compared images by score, in BINS equal bins."""
    scores_b: list[int]
    changes: list[tuple[float, int]]
    """(score in B less score in A, compared images), ascending."""


def read_tables(connection: Any) -> Tables:
    """Read the tables of a comparison."""
    return Tables(
        statuses=_status_table(connection),
        flips=_flip_table(connection),
        classes=_class_table(connection),
        scores_a=_binned(connection, "a"),
        scores_b=_binned(connection, "b"),
        changes=_change_counts(connection),
    )


def headline(connection: Any, tables: Tables) -> dict[str, Any]:
    """Compute the figures of comparison.json."""
    statuses, classes = tables.statuses, tables.classes
    here_a, here_b = statuses["status_a"].notna(), statuses["status_b"].notna()
    only = {
        f"only_{side}": classes.loc[classes[f"images_{other}"] == 0, "label"].tolist()
        for side, other in (("a", "b"), ("b", "a"))
    }
    return {
        "images": {
            "both": int(statuses.loc[here_a & here_b, "images"].sum()),
            "only_a": int(statuses.loc[here_a & ~here_b, "images"].sum()),
            "only_b": int(statuses.loc[~here_a & here_b, "images"].sum()),
        },
        "agreement": _agreement(connection, _COMPARED),
        "agreement_where_a_is_sure": {"above": SURE_SCORE} | _agreement(connection, f"{_COMPARED} AND sure_a"),
        "agreement_where_b_is_sure": {"above": SURE_SCORE} | _agreement(connection, f"{_COMPARED} AND sure_b"),
        "other_bytes": _agreement(connection, "label_a IS NOT NULL AND label_b IS NOT NULL AND changed"),
        "score": _scores(connection, tables),
        "psi": _stability(tables),
        "labels": {"both": int(((classes["images_a"] > 0) & (classes["images_b"] > 0)).sum()), **only},
        "truth": _truth(connection),
    }


def _status_table(connection: Any) -> pd.DataFrame:
    """Count images by their status in A and in B; null where the run does not have the image."""
    return _frame(
        connection,
        "SELECT status_a, status_b, sum(images)::BIGINT AS images FROM cells GROUP BY ALL "
        "ORDER BY images DESC, status_a, status_b",
    )


def _flip_table(connection: Any) -> pd.DataFrame:
    """List every change of label, the most frequent first: label_a, label_b, images, mean_score_a, mean_score_b."""
    return _frame(
        connection,
        "SELECT label_a, label_b, sum(images)::BIGINT AS images, sum(score_a) / sum(images) AS mean_score_a, "
        f"sum(score_b) / sum(images) AS mean_score_b FROM cells WHERE {_COMPARED} AND label_a <> label_b "
        "GROUP BY ALL ORDER BY images DESC, label_a, label_b",
    )


def _class_table(connection: Any) -> pd.DataFrame:
    """Compute images, shares and mean score of each label in A and in B, largest change of share first.

    Columns: label, images_a, images_b, images_both (that label in both), share_a, share_b, share_change with its 95 %
    interval share_change_low and share_change_high, mean_score_a, mean_score_b (null without an image).
    """
    frame = _frame(
        connection,
        f"""
        WITH sides AS (
            SELECT label_a AS label, images AS images_a, 0 AS images_b, score_a AS total_a, 0.0 AS total_b,
                CASE WHEN label_a = label_b THEN images ELSE 0 END AS same FROM cells WHERE {_COMPARED}
            UNION ALL
            SELECT label_b, 0, images, 0.0, score_b, 0 FROM cells WHERE {_COMPARED}
        )
        SELECT label, sum(images_a)::BIGINT AS images_a, sum(images_b)::BIGINT AS images_b,
            sum(same)::BIGINT AS images_both, sum(total_a) / nullif(sum(images_a), 0) AS mean_score_a,
            sum(total_b) / nullif(sum(images_b), 0) AS mean_score_b
        FROM sides GROUP BY label ORDER BY label
        """,
    )
    total = int(frame["images_a"].sum())
    changes = [
        paired_change(int(row["images_b"] - row["images_both"]), int(row["images_a"] - row["images_both"]), total)
        for row in frame.to_dict("records")
    ]
    for side in ("a", "b"):
        frame[f"share_{side}"] = (frame[f"images_{side}"] / max(total, 1)).astype("float64")
    for i, name in enumerate(("share_change", "share_change_low", "share_change_high")):
        frame[name] = pd.Series([change[i] for change in changes], dtype="float64", index=frame.index)
    order = frame["share_change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _change_counts(connection: Any) -> list[tuple[float, int]]:
    """Count the compared images by the change of their score: (change, images), ascending."""
    rows = connection.execute("SELECT change, images FROM changes ORDER BY change").fetchall()
    return [(change * CHANGE_STEP, images) for change, images in rows]


def _agreement(connection: Any, where: str) -> dict[str, Any]:
    images, same = connection.execute(
        "SELECT coalesce(sum(images), 0)::BIGINT, coalesce(sum(images) FILTER (label_a = label_b), 0)::BIGINT "
        f"FROM cells WHERE {where}"
    ).fetchall()[0]
    low, high = wilson_interval(same, images)
    rate = same / images if images else None
    return {"images": images, "same": same, "rate": rate, "low": low, "high": high}


def _scores(connection: Any, tables: Tables) -> dict[str, Any] | None:
    images, total_a, total_b, change, squares = connection.execute(
        "SELECT sum(images)::BIGINT, sum(score_a), sum(score_b), sum(score_change), sum(score_change_2) "
        f"FROM cells WHERE {_COMPARED}"
    ).fetchall()[0]
    if not images:
        return None
    mean, low, high = mean_interval(change, squares, images)
    return {
        "mean_a": total_a / images,
        "mean_b": total_b / images,
        "mean_change": mean,
        "low": low,
        "high": high,
        "quantiles": _quantiles(tables.changes, images),
    }


def _quantiles(counts: list[tuple[float, int]], images: int) -> dict[str, float]:
    """Compute quantiles of the change, each the smallest change that so many images do not exceed."""
    found: dict[str, float] = {}
    for share in _QUANTILES:
        seen = 0
        for change, count in counts:
            seen += count
            if seen >= share * images:
                found[f"{share:g}"] = round(change, 6)
                break
    return found


def _stability(tables: Tables) -> dict[str, float] | None:
    if tables.classes.empty:
        return None
    # Ten bins: the number for which the rule of thumb was made.
    scores = [[sum(side[i : i + 2]) for i in range(0, BINS, 2)] for side in (tables.scores_a, tables.scores_b)]
    return {
        "classes": stability_index(tables.classes["images_a"].tolist(), tables.classes["images_b"].tolist()),
        "scores": stability_index(*scores),
    }


def _truth(connection: Any) -> dict[str, Any] | None:
    """Count which side is right, where the truth is known."""
    rows = connection.execute(
        f"SELECT right_a, right_b, sum(images)::BIGINT FROM cells WHERE {_COMPARED} AND right_a IS NOT NULL "
        "AND right_b IS NOT NULL GROUP BY ALL"
    ).fetchall()
    if not rows:
        return None
    counts = {(bool(right_a), bool(right_b)): images for right_a, right_b, images in rows}
    both, only_a, only_b = (counts.get(key, 0) for key in ((True, True), (True, False), (False, True)))
    images = sum(counts.values())
    change, low, high = paired_change(only_b, only_a, images)
    return {
        "images": images,
        "both_right": both,
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_wrong": counts.get((False, False), 0),
        "accuracy_a": (both + only_a) / images,
        "accuracy_b": (both + only_b) / images,
        "accuracy_change": change,
        "accuracy_change_low": low,
        "accuracy_change_high": high,
        "mcnemar_p": mcnemar_p(only_a, only_b),
    }


def _binned(connection: Any, side: str) -> list[int]:
    rows = connection.execute(
        f"SELECT bin_{side}, sum(images)::BIGINT FROM cells WHERE {_COMPARED} GROUP BY 1"
    ).fetchall()
    found = dict(rows)
    return [found.get(i, 0) for i in range(BINS)]


def _frame(connection: Any, sql: str) -> pd.DataFrame:
    return to_frame(connection.sql(sql).to_arrow_table())

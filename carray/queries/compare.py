"""Joins two tables of predictions by uri in DuckDB, and computes a comparison's figures and tables.

Labels, scores and truth are compared only where both runs scored the image and its etag did not change; images whose
etags differ are counted separately. Without a compared image, figures are None. A join that exceeds memory spills to
disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.dataset as pads

from carray.core.errors import SchemaError
from carray.evaluation.metrics import wilson_interval
from carray.queries import connect, to_frame

__all__ = ["BINS", "compare_tables", "mcnemar_p", "paired_change", "psi_words", "stability_index"]

BINS = 20
"""Equal bins of scores between 0 and 1."""
SURE_SCORE = 0.8
"""A run is sure of a label with a higher score."""
_Z = 1.959964
"""Of a two-sided 95 % interval."""
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

_JOIN = """
CREATE TEMP TABLE joined AS
SELECT a.status AS status_a, b.status AS status_b, coalesce({changed}, false) AS changed,
    a.label AS label_a, b.label AS label_b, a.score::DOUBLE AS score_a, b.score::DOUBLE AS score_b,
    {right_a} AS right_a, {right_b} AS right_b
FROM a FULL JOIN b USING ({keys});
CREATE TEMP VIEW scored AS FROM joined
WHERE status_a = 'ok' AND status_b = 'ok' AND label_a IS NOT NULL AND label_b IS NOT NULL;
CREATE TEMP VIEW compared AS SELECT *, score_b - score_a AS change FROM scored WHERE NOT changed;
"""
_TABLES = {
    "statuses": """
        SELECT status_a, status_b, count(*) AS images FROM joined
        GROUP BY ALL ORDER BY images DESC, status_a, status_b
    """,
    "flips": """
        SELECT label_a, label_b, count(*) AS images, avg(score_a) AS mean_score_a, avg(score_b) AS mean_score_b
        FROM compared WHERE label_a <> label_b GROUP BY ALL ORDER BY images DESC, label_a, label_b
    """,
    "classes": """
        WITH in_a AS (
            SELECT label_a AS label, count(*) AS images_a, count(*) FILTER (label_a = label_b) AS images_both,
                avg(score_a) AS mean_score_a FROM compared GROUP BY label_a
        ), in_b AS (
            SELECT label_b AS label, count(*) AS images_b, avg(score_b) AS mean_score_b FROM compared GROUP BY label_b
        )
        SELECT label, coalesce(images_a, 0) AS images_a, coalesce(images_b, 0) AS images_b,
            coalesce(images_both, 0) AS images_both, mean_score_a, mean_score_b
        FROM in_a FULL JOIN in_b USING (label) ORDER BY label
    """,
    "scores": f"""
        SELECT least(floor(score_a * {BINS}), {BINS} - 1) AS bin_a, least(floor(score_b * {BINS}), {BINS} - 1) AS bin_b,
            count(*) AS images FROM compared GROUP BY ALL
    """,
    "changes": "SELECT round(change * 1000) / 1000 AS change, count(*) AS images FROM compared GROUP BY 1 ORDER BY 1",
}


def compare_tables(
    a: pads.Dataset, b: pads.Dataset, *, names: tuple[str, str], keys: Sequence[str] = ("uri",)
) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Join two runs, and return the figures of comparison.json and the tables below.

        statuses  status_a, status_b (null where the run does not have the image), images; all images
        flips     label_a, label_b, images, mean_score_a, mean_score_b: every change of label, the most frequent first
        classes   label, images_a, images_b, images_both (that label in both), mean_score_a, mean_score_b, share_a,
                  share_b, share_change with its 95 % interval share_change_low and share_change_high; the largest
                  change of share first
        scores    bin (0..BINS - 1), images_a, images_b
        changes   change (score in B less score in A, to 0.001), images

    Args:
        a: The first table: uri, status, label and score, optionally etag and truth.
        b: The second one.
        names: Their names in error sentences.
        keys: The columns that identify an image.

    Raises:
        SchemaError: a table lacks a column, no image is in both, or several rows of one run have the same key.
    """
    for data, name in zip((a, b), names, strict=True):
        missing = [column for column in ("label", "score") if column not in data.schema.names]
        if missing:
            raise SchemaError(f"{name} lacks the column {', '.join(missing)}; give the --out of carray classify.")
    in_both = set(a.schema.names) & set(b.schema.names)
    with connect({"a": a, "b": b}) as connection:
        join = _JOIN.format(
            keys=", ".join(keys),
            changed="a.etag <> b.etag" if "etag" in in_both else "false",
            right_a="a.label = a.truth" if "truth" in in_both else "NULL::BOOLEAN",
            right_b="b.label = b.truth" if "truth" in in_both else "NULL::BOOLEAN",
        )
        connection.execute(join)
        _check_keys(connection, names)
        tables = {name: to_frame(connection.sql(sql).to_arrow_table()) for name, sql in _TABLES.items()}
        tables["classes"] = _with_shares(tables["classes"])
        sides = [
            tables["scores"].groupby(f"bin_{side}")["images"].sum().rename(f"images_{side}") for side in ("a", "b")
        ]
        tables["scores"] = pd.concat(sides, axis=1).reindex(range(BINS)).fillna(0).astype("int64")
        return _headline(connection, tables), tables


def _check_keys(connection: Any, names: tuple[str, str]) -> None:
    both, joined_a, joined_b, rows_a, rows_b = connection.execute(
        "SELECT count(*) FILTER (status_a IS NOT NULL AND status_b IS NOT NULL), count(status_a), count(status_b), "
        "(SELECT count(*) FROM a), (SELECT count(*) FROM b) FROM joined"
    ).fetchall()[0]
    if not both:
        raise SchemaError(
            f"{names[0]} ({joined_a:,} images) and {names[1]} ({joined_b:,} images) have no uri in common; compare "
            "runs over the same images."
        )
    for name, other, rows, joined in ((*names, rows_a, joined_a), (*names[::-1], rows_b, joined_b)):
        if rows != joined:
            raise SchemaError(
                f"{other} has several rows of one uri, as a run over boxes has, so {name} cannot be joined with it; "
                "compare the bundles over a manifest."
            )


def _with_shares(classes: pd.DataFrame) -> pd.DataFrame:
    classes = classes.astype({name: "int64" for name in ("images_a", "images_b", "images_both")})
    total, same = int(classes["images_a"].sum()), classes["images_both"]
    change, low, high = paired_change(classes["images_b"] - same, classes["images_a"] - same, total)
    classes = classes.assign(
        share_a=classes["images_a"] / total,
        share_b=classes["images_b"] / total,
        share_change=change,
        share_change_low=low,
        share_change_high=high,
    )
    return classes.sort_values("share_change", key=abs, ascending=False, kind="stable", ignore_index=True)


def _headline(connection: Any, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    statuses, classes = tables["statuses"], tables["classes"]
    in_a, in_b = statuses["status_a"].notna(), statuses["status_b"].notna()
    images = {"both": in_a & in_b, "only_a": in_a & ~in_b, "only_b": ~in_a & in_b}
    has_a, has_b = classes["images_a"] > 0, classes["images_b"] > 0
    return {
        "images": {name: int(statuses.loc[chosen, "images"].sum()) for name, chosen in images.items()},
        "agreement": _agreement(connection, "compared"),
        **{
            f"agreement_where_{side}_is_sure": {"above": SURE_SCORE}
            | _agreement(connection, f"compared WHERE score_{side} > {SURE_SCORE}")
            for side in ("a", "b")
        },
        "other_bytes": _agreement(connection, "scored WHERE changed"),
        "score": _scores(connection, tables["changes"]),
        "psi": _stability(tables),
        "labels": {
            "both": int((has_a & has_b).sum()),
            "only_a": classes.loc[~has_b, "label"].tolist(),
            "only_b": classes.loc[~has_a, "label"].tolist(),
        },
        "truth": _truth(connection),
    }


def _agreement(connection: Any, rows: str) -> dict[str, Any]:
    sql = f"SELECT count(*), count(*) FILTER (label_a = label_b) FROM {rows}"
    images, same = connection.execute(sql).fetchall()[0]
    low, high = wilson_interval(same, images)
    return {"images": images, "same": same, "rate": same / images if images else None, "low": low, "high": high}


def _scores(connection: Any, changes: pd.DataFrame) -> dict[str, Any] | None:
    """Compare mean scores; quantiles of the change are exact to 0.0005."""
    images, mean_a, mean_b, mean, deviation = connection.execute(
        "SELECT count(*), avg(score_a), avg(score_b), avg(change), coalesce(stddev_samp(change), 0) FROM compared"
    ).fetchall()[0]
    if not images:
        return None
    spread, seen = _Z * deviation / images**0.5, changes["images"].cumsum()
    return {
        "mean_a": mean_a,
        "mean_b": mean_b,
        "mean_change": mean,
        "low": mean - spread,
        "high": mean + spread,
        "quantiles": {
            f"{share:g}": float(changes["change"].iloc[seen.searchsorted(share * images)]) for share in _QUANTILES
        },
    }


def _stability(tables: Mapping[str, pd.DataFrame]) -> dict[str, float] | None:
    classes, scores = tables["classes"], tables["scores"]
    if classes.empty:
        return None
    tenths = scores.groupby(scores.index // 2).sum()  # ten bins: the number for which the rule of thumb was made
    return {
        name: stability_index(counts["images_a"].tolist(), counts["images_b"].tolist())
        for name, counts in (("classes", classes), ("scores", tenths))
    }


def _truth(connection: Any) -> dict[str, Any] | None:
    """Count which side is right, where the truth is known."""
    images, both, only_a, only_b = connection.execute(
        "SELECT count(*), count(*) FILTER (right_a AND right_b), count(*) FILTER (right_a AND NOT right_b), "
        "count(*) FILTER (right_b AND NOT right_a) FROM compared WHERE right_a IS NOT NULL AND right_b IS NOT NULL"
    ).fetchall()[0]
    if not images:
        return None
    change, low, high = paired_change(only_b, only_a, images)
    return {
        "images": images,
        "both_right": both,
        "only_a_right": only_a,
        "only_b_right": only_b,
        "both_wrong": images - both - only_a - only_b,
        "accuracy_a": (both + only_a) / images,
        "accuracy_b": (both + only_b) / images,
        "accuracy_change": change,
        "accuracy_change_low": float(low),
        "accuracy_change_high": float(high),
        "mcnemar_p": mcnemar_p(only_a, only_b),
    }


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Compute the p-value of McNemar's exact test: how likely so uneven a split is if both are right equally often.

    Args:
        only_a: images that A alone has right.
        only_b: images that B alone has right.

    Source: McNemar (1947), Psychometrika 12(2), 153-157; exact form: the binomial test of `only_a` of both, at 1/2.
    """
    from scipy.stats import binomtest

    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_change(gained: Any, lost: Any, images: int) -> tuple[Any, Any, Any]:
    """Compute the change of a share between two labellings of the same images: (change, low, high), 95 %.

    Args:
        gained: images that only B counts in; a number, or one for each share.
        lost: images that only A counts in.
        images: all images, at least 1.

    Source: the adjusted Wald interval of Bonett and Price (2012), Journal of Educational and Behavioral Statistics
    37(4), 479-488, which also holds for small counts.
    """
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    spread = _Z * np.sqrt(np.maximum(0.0, up + down - (up - down) ** 2) / (images + 2))
    return (gained - lost) / images, np.maximum(-1.0, up - down - spread), np.minimum(1.0, up - down + spread)


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

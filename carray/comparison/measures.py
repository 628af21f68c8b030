"""Makes a comparison's figures out of its cells: the headline, the changes of label, the classes, the scores.

From: a connection with `cells` and `changes` (joining). To: plain numbers and small frames.
Invariants: what both runs scored and whose bytes did not change is compared; images of other bytes are counted apart,
with an agreement of their own. Shares, means and intervals are of the compared images. Nothing compared, nothing
claimed: the figures are None then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from carray.comparison.joining import BINS, CHANGE_STEP, SURE_SCORE
from carray.comparison.statistics import mcnemar_p, mean_interval, paired_change, stability_index
from carray.evaluation.metrics import wilson_interval
from carray.queries import to_frame

__all__ = ["Tables", "headline", "read_tables"]

_COMPARED = "label_a IS NOT NULL AND label_b IS NOT NULL AND NOT changed"
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Tables:
    """Is what a page shows beside the headline."""

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
    """Give the tables of a comparison."""
    return Tables(
        statuses=_status_table(connection),
        flips=_flip_table(connection),
        classes=_class_table(connection),
        scores_a=_binned(connection, "a"),
        scores_b=_binned(connection, "b"),
        changes=_change_counts(connection),
    )


def headline(connection: Any, tables: Tables) -> dict[str, Any]:
    """Give the figures of comparison.json."""
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
    """Give each label's images, shares and mean score in A and in B, the largest change of share first.

    Columns: label, images_a, images_b, images_both (so labelled by both), share_a, share_b, share_change with its 95 %
    interval share_change_low and share_change_high, mean_score_a, mean_score_b (null without an image).
    """
    frame = _frame(
        connection,
        f"""
        WITH sides AS (
            SELECT label_a AS label, images AS images_a, 0 AS images_b, score_a AS total_a, 0.0 AS total_b,
                CASE WHEN label_a = label_b THEN images ELSE 0 END AS kept FROM cells WHERE {_COMPARED}
            UNION ALL
            SELECT label_b, 0, images, 0.0, score_b, 0 FROM cells WHERE {_COMPARED}
        )
        SELECT label, sum(images_a)::BIGINT AS images_a, sum(images_b)::BIGINT AS images_b,
            sum(kept)::BIGINT AS images_both, sum(total_a) / nullif(sum(images_a), 0) AS mean_score_a,
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
    for place, name in enumerate(("share_change", "share_change_low", "share_change_high")):
        frame[name] = pd.Series([change[place] for change in changes], dtype="float64", index=frame.index)
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
    """Give the quantiles of the change, each the smallest change that so many images do not exceed."""
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
    """Count who is right, where the truth is known."""
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
    return [found.get(place, 0) for place in range(BINS)]


def _frame(connection: Any, sql: str) -> pd.DataFrame:
    return to_frame(connection.sql(sql).to_arrow_table())

"""Prepares what a page shows of a bundle under stress: sections/robustness.html.j2 and outliers.html.j2.

From: the tables and markers of evaluation.stress. To: one context a section, for a page that includes them.
Invariants: kinds and sources of outside images are text, never markup; each picture's figures stand in a table, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from carray.core.storage import absolute, exists, join, read_json
from carray.core.tables import read_table
from carray.evaluation.corruptions import NONE, REENCODED
from carray.evaluation.doubt import SCORES_SCHEMA
from carray.evaluation.format import OUTLIERS_JSON, ROBUSTNESS_JSON
from carray.evaluation.outliers import OOD_SCORE, OUTLIERS_SCHEMA
from carray.evaluation.outside import INSIDE
from carray.evaluation.robustness import ROBUSTNESS_SCHEMA
from carray.evaluation.stress_figures import robustness_svg, roc_svg, spread_svg

__all__ = ["outliers_context", "robustness_context", "stress_context"]

SCORE_WORDS = {
    "max_softmax": "1 less the largest score",
    "entropy": "entropy of the scores",
    "max_logit": "largest logit, negated",
    "energy": "energy of the logits",
    "centred_energy": "energy of the logits less their mean",
    "knn": "distance to training images",
}


def stress_context(out: str, section: str) -> dict[str, Any] | None:
    """Read what `stress` left in a folder for one section, `robustness` or `outliers`; None where it was not measured.

    Raises:
        SchemaError: a table there is not what it should be.
        StorageError: a table cannot be read.
    """
    out = absolute(out)
    marker = join(out, ROBUSTNESS_JSON if section == "robustness" else OUTLIERS_JSON)
    if not exists(marker):
        return None
    if section == "robustness":
        return robustness_context(_read(out, "robustness", ROBUSTNESS_SCHEMA.names), read_json(marker))
    measured, scores = _read(out, "outliers", OUTLIERS_SCHEMA.names), _read(out, "outlier_scores", SCORES_SCHEMA.names)
    return outliers_context(measured, scores, read_json(marker))


def robustness_context(table: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    """Give the context of sections/robustness.html.j2: rows, the plain row, the worst row, the picture.

    Args:
        table: Rows of ROBUSTNESS_SCHEMA, the plain one first.
        about: What robustness.json holds.
    """
    rows = [_without_nan(row) | {"words": row["corruption"].replace("_", " ")} for row in table.to_dict("records")]
    corrupted = [row for row in rows if row["corruption"] not in (NONE, REENCODED)]
    return {
        "plain": rows[0],
        "rows": rows[1:],
        "worst": max(corrupted, key=lambda row: row["drop_points"]),
        "costly": sum(row["drop_low_points"] > 0 for row in corrupted),
        "corrupted": len(corrupted),
        "control": next(row for row in rows if row["corruption"] == REENCODED),
        "svg": robustness_svg(rows, title="Top-1 of corrupted pictures"),
        "about": about,
    }


def outliers_context(measured: pd.DataFrame, scores: pd.DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    """Give the context of sections/outliers.html.j2: rows, the best of each kind, the pictures of `ood_score`.

    Args:
        measured: Rows of OUTLIERS_SCHEMA.
        scores: Rows of SCORES_SCHEMA.
        about: What outliers.json holds.
    """
    scored = scores[scores["status"] == "ok"]
    kinds = list(dict.fromkeys(measured["kind"]))
    values = {kind: scored.loc[scored["kind"] == kind, OOD_SCORE].to_numpy(np.float64) for kind in [INSIDE, *kinds]}
    rows = [_without_nan(row) | {"words": SCORE_WORDS[row["score"]]} for row in measured.to_dict("records")]
    written = [row for row in rows if row["score"] == OOD_SCORE]
    not_scored = sum(own["images"] - own["scored"] for own in about["kinds"].values())
    return {
        "rows": rows,
        "weakest": min(written, key=lambda row: row["auroc"]),
        "ood_score": OOD_SCORE,
        "best": about["best"],
        "best_words": SCORE_WORDS[about["best"]],
        "unreadable": about["inside_unreadable"] + not_scored,
        "roc_svg": roc_svg(values, title="Outside images let in against inside ones let in"),
        "spread_svg": spread_svg(values, title="Where inside and outside images lie"),
        "about": about,
    }


def _read(out: str, name: str, columns: list[str]) -> pd.DataFrame:
    table = read_table(join(out, f"{name}.parquet"), kind=f"evaluation {name}", required=columns, columns=columns)
    return table.to_pandas()


def _without_nan(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): None if pd.isna(value) else value for name, value in row.items()}

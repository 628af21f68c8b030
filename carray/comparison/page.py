"""Writes a comparison as one page that opens from disk, with no network and nothing beside it.

From: the headline and the tables. To: the HTML.
Invariants: labels and paths are text, never markup; a table that is cut says where the rest lies; what could not be
compared is said, not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.comparison import figures
from carray.comparison.measures import Tables
from carray.comparison.statistics import psi_words
from carray.core.page import render_page

__all__ = ["render"]

_MOST_ROWS = 500
"""Rows of a table on the page; the others stand in the Parquet files."""


def render(found: Mapping[str, Any], tables: Tables) -> str:
    """Render the page of a comparison: `found` is the headline, as comparison.json has it."""
    compared, flips, classes = found["agreement"]["images"], tables.flips, tables.classes
    context: dict[str, Any] = {
        "found": found,
        "compared": compared,
        "flips": _records(flips.head(_MOST_ROWS)),
        "all_flips": len(flips),
        "flipped": int(flips["images"].sum()),
        "classes": _records(classes.head(_MOST_ROWS)),
        "all_classes": len(classes),
        "statuses": _records(tables.statuses),
    }
    if compared:
        context |= {
            "psi": {name: (value, psi_words(value)) for name, value in found["psi"].items()},
            "scores_svg": figures.score_svg(tables.scores_a, tables.scores_b, title="Scores in A and in B"),
            "changes_svg": figures.change_svg(tables.changes, title="Changes of score"),
            "shares_svg": figures.share_svg(classes, title="Changes of share"),
        }
    return render_page("comparison/page.html.j2", context)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]

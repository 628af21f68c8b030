"""Writes a comparison as one page that opens from disk, with no network and nothing beside it.

From: the headline and the tables. To: the HTML, with its pictures as SVG: scores, their changes, changes of shares.
Invariants: labels and paths are text, never markup; a table that is cut says where the rest lies; what could not be
compared is said, not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from carray.comparison.measures import BINS, Tables, psi_words
from carray.core.page import render_page
from carray.core.svg import PAGE_COLOURS, percent_axis, picture

__all__ = ["render"]

_A, _B, _SOFT, _INK = (PAGE_COLOURS[name] for name in ("first", "second", "soft", "ink"))
_CHANGE_BINS = 80
"""Between -1 and 1, so 0.025 wide: one is centred on no change."""


def score_svg(counts_a: Sequence[int], counts_b: Sequence[int], *, title: str) -> str:
    """Draw the shares of images by score in A and in B, as two outlines."""
    edges = [place / BINS for place in range(BINS + 1)]
    with picture(title, "Shares of the compared images by their score, A and B over the same bins.", {}) as (axes, svg):
        for counts, colour, name, style in ((counts_a, _A, "A", "-"), (counts_b, _B, "B", (0, (4, 1.5)))):
            shares = [count / max(1, sum(counts)) for count in counts]
            axes.stairs(shares, edges, color=colour, linewidth=1.8, linestyle=style, label=name)
        axes.legend(loc="upper left")
        percent_axis(axes.yaxis)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="score", ylabel="share of images")
    return svg()


def change_svg(changes: Sequence[tuple[float, int]], *, title: str) -> str:
    """Draw the shares of images by the change of their score; right of 0, B is surer than A."""
    width = 2 / _CHANGE_BINS
    images = pd.Series([count for _, count in changes], index=[round(change / width) for change, _ in changes])
    shares = images.groupby(level=0).sum() / images.sum()
    with picture(title, "Shares of the compared images by score in B less score in A.", {}) as (axes, svg):
        axes.bar([place * width for place in shares.index], shares, width=width, color=_SOFT)
        axes.axvline(0, color=_INK, linewidth=1)
        percent_axis(axes.yaxis)
        reach = max(0.1, *(abs(place) * width for place in shares[shares > 0.0005].index)) + width
        axes.set_xlim(-reach, reach)
        axes.set(xlabel="score in B less score in A", ylabel="share of images")
    return svg()


def share_svg(classes: pd.DataFrame, *, title: str, most: int = 15) -> str:
    """Draw the largest changes of a label's share with their 95 % intervals; rows as from measures.class_table."""
    shown = classes.head(most).iloc[::-1]
    places = range(len(shown))
    tips = {f"{place}": _tip(row) for place, row in enumerate(shown.to_dict("records"))}
    height = 1.0 + 0.27 * len(shown)
    with picture(title, "Change of each label's share from A to B.", tips, height=height) as (axes, svg):
        axes.axvline(0, color=_INK, linewidth=1)
        for place, row in enumerate(shown.to_dict("records")):
            interval = [row["share_change_low"], row["share_change_high"]]
            axes.plot(interval, [place, place], color=_SOFT, linewidth=2, solid_capstyle="butt")
            colour = _B if row["share_change"] > 0 else _A
            axes.plot([row["share_change"]], [place], "o", color=colour, markersize=5.5, gid=f"tip-{place}")
        axes.set_yticks(list(places), [_short(label) for label in shown["label"]])
        axes.grid(visible=False, axis="y")
        percent_axis(axes.xaxis)
        axes.set_xlabel("change of share from A to B")
    return svg()


def _short(label: str, most: int = 28) -> str:
    text = "".join(char if char.isprintable() else " " for char in label)
    return text if len(text) <= most else text[: most - 1] + "…"


def _tip(row: Mapping[Any, Any]) -> str:
    return f"{row['label']}: {row['images_a']:,} images in A, {row['images_b']:,} in B"


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
            "scores_svg": score_svg(tables.scores_a, tables.scores_b, title="Scores in A and in B"),
            "changes_svg": change_svg(tables.changes, title="Changes of score"),
            "shares_svg": share_svg(classes, title="Changes of share"),
        }
    return render_page("comparison/page.html.j2", context)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(key): value for key, value in row.items()} for row in rows]

r"""Turns chosen rows into what a gallery's cards show.

From: rows of reports.samples and their thumbnails. To: one dict a card, of text and numbers.
Invariants: keys, labels and errors are untrusted text: letters that do not show, or that turn text round, are spelled
out (`\n`, `\u202e`), so that what is read on the page is what stands in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.core import text
from carray.core.storage import is_s3
from carray.reports.thumbnails import Thumbnail

__all__ = ["card", "last_part", "readable"]


def readable(value: Any) -> str:
    """Give untrusted text as core.text shows it; empty for a null."""
    return "" if value is None or pd.isna(value) else text.readable(value)


def last_part(uri: str) -> str:
    """Give a key's own name, without its folders; a legal key may end in a slash."""
    name = uri.rstrip("/").rsplit("/", 1)[-1] if is_s3(uri) or uri.startswith("/") else uri
    return readable(name) or readable(uri)


def card(row: Mapping[str, Any], thumbnail: Thumbnail | None) -> dict[str, Any]:
    """Give what one card shows; `thumbnail` is None where none was to be read."""
    known = {name: value if isinstance(value, list) or pd.notna(value) else None for name, value in _flat(row).items()}
    scored = known["status"] == "ok"
    top5 = zip(known["top5_labels"] or [], known["top5_scores"] or [], strict=False)
    return {
        "picks": known["picks"],
        "key": readable(known["uri"]),
        "name": last_part(str(row["uri"])),
        "scored": scored,
        "label": readable(known["label"]),
        "make": readable(known["make"]),
        "score": known["score"] if scored else None,
        "margin": known["margin"] if scored else None,
        "top5": [(readable(label), float(score)) for label, score in top5],
        "status": readable(known["status"]),
        "code": readable(known["error_code"]),
        "error": readable(known["error"]),
        "facts": _facts(known),
        "picture": thumbnail if thumbnail and thumbnail.data_uri else None,
        "reason": readable(thumbnail.reason) if thumbnail else "",
        "changed": bool(thumbnail and thumbnail.changed),
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Make the lists of a row, which pandas holds as arrays, lists."""
    return {
        name: list(value) if hasattr(value, "__len__") and not isinstance(value, str) else value
        for name, value in row.items()
    }


def _facts(known: Mapping[str, Any]) -> str:
    size = f"{known['width']:,} x {known['height']:,} pixels" if known["width"] and known["height"] else ""
    weight = f"{known['size_bytes'] / 1000:,.0f} kB" if known["size_bytes"] is not None else ""
    return ", ".join(fact for fact in (size, weight) if fact)

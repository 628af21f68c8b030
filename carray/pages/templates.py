"""Renders the Jinja templates of templates/: one look for all pages, which extend base.html.j2.

All values are escaped as text; an undefined name is an error; a page runs no script but its own, which its content
security policy names by its hash. base.html.j2 handles dark mode, narrow screens and printing.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.core import text
from carray.core.store.files import is_s3

__all__ = ["last_part", "percent_text", "readable", "records", "render_page"]


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Render a template, named by its path below templates/, such as `leaderboard.html.j2`."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.PackageLoader("carray.pages"),
    )
    environment.filters |= {"percent": percent_text, "number": _number, "shell": shlex.quote, "digest": _digest}
    environment.filters |= {"readable": readable, "last_part": last_part, "records": records}
    return environment.get_template(template).render(context)


def percent_text(fraction: float | None, digits: int = 1) -> str:
    """Format a fraction in percent, `81.0 %`; an empty text where it is None or NaN."""
    unknown = fraction is None or fraction != fraction  # only NaN differs from itself
    return "" if unknown else f"{fraction:.{digits}%}".replace("%", " %")


def readable(value: Any) -> str:
    """Make untrusted text printable as core.text does; empty for a null."""
    return "" if value is None or pd.isna(value) else text.readable(value)


def last_part(uri: str) -> str:
    """Return the last part of a key, which may end in a slash."""
    name = uri.rstrip("/").rsplit("/", 1)[-1] if is_s3(uri) or uri.startswith("/") else uri
    return readable(name) or readable(uri)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a table's rows for a template: None where a cell is missing."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(script: str) -> str:
    """Hash the page's script as a content security policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

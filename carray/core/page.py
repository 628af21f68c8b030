"""Renders a page that opens from disk, with no network and nothing beside it: one look for everything carray shows.

From: a template of the package that extends `core/page.html.j2`, and what it shows. To: the HTML.
Invariants: what is shown is text, never markup; a page may run no script but its own, which its policy names by its
content; an undefined name is an error, never an empty place. A page by day and by night, on a phone and printed, is the
base template's concern.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping
from importlib import resources
from typing import Any

__all__ = ["percent_text", "render_page"]


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """Render a template, named by its path below the package, such as `search/page.html.j2`."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_source),
    )
    environment.filters |= {"percent": percent_text, "number": _number, "shell": shlex.quote, "digest": _digest}
    return environment.get_template(template).render(context)


def percent_text(fraction: float | None, digits: int = 1) -> str:
    """Say a fraction in percent, `81.0 %`; nothing where it is null."""
    unknown = fraction is None or fraction != fraction  # NaN, the only number that is not equal to itself
    return "" if unknown else f"{fraction:.{digits}%}".replace("%", " %")


def _source(template: str) -> str:
    return resources.files("carray").joinpath(*template.split("/")).read_text(encoding="utf-8")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _digest(script: str) -> str:
    """Name the page's one script by its content, so that a browser runs no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

"""Text from outside (keys, labels, reasons, column names), made safe to print, and hints for unknown names."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any

__all__ = ["did_you_mean", "one_line", "readable"]

_UNSEEN = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
"""Unicode's categories of characters without a glyph: control, format, private, unassigned, surrogates, line ends."""


def readable(text: Any) -> str:
    r"""Escape characters that are invisible, move a cursor, end a line or reverse text: `\x1b`, `\n`, `\u202e`."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _UNSEEN else letter
        for letter in text
    )


def one_line(text: Any, most: int | None = None) -> str:
    """Join a text, such as an error's, into one line of at most `most` characters."""
    return " ".join(str(text).split())[:most]


def did_you_mean(name: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """End a sentence about an unknown name: suggest the most similar known one, or say `otherwise`."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else otherwise

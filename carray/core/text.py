r"""Shows foreign text: keys, labels, reasons and names of columns are data, which a terminal or a reader must not obey.

Invariants: letters that show nothing, move a cursor, end a line or turn text round are spelled out as Python spells
them (`\x1b`, `\n`, `\u202e`), so that what is read is what stands in the table, and no value makes two lines of a log.
"""

from __future__ import annotations

import unicodedata
from typing import Any

__all__ = ["readable"]

_UNSEEN = {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
"""Unicode's categories of letters that show nothing: control, format, private, unassigned, half a pair, line ends."""


def readable(text: Any) -> str:
    """Give text with its unseen letters spelled out."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in _UNSEEN else letter
        for letter in text
    )

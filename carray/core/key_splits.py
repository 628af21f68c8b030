"""Finds the key at which a range of keys is best cut in two, by asking for one key at a time.

Invariants: keys compare as strings, by code point, which is the order of their UTF-8 bytes; a cut is valid UTF-8 and
holds no control character that the key before it does not hold. What is found decides only where a listing is cut:
a wrong answer of the store costs speed, never a key.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Probe", "estimate_remaining", "find_split", "successor"]

Probe = Callable[[str, "str | None"], bool]
"""Says whether there is a key in (after, upto]."""

TRIES = 8
"""Cuts tried at most, each at half of what is left: 1/256 of a range is not worth another thread."""
_AFTER_CLASSES = (0x3A, 0x5B, 0x7B, 0x7F)
"""What follows digits, capitals, small letters and ASCII: most keys have one of these classes in one place."""
_SURROGATES = range(0xD800, 0xE000)


def find_split(position: str, bound: str | None, has_key: Probe) -> tuple[str | None, str | None]:
    """Find a cut in (position, bound] with keys beyond it; gives the cut, if any, and the bound as it is now known.

    First, how far do all keys to come begin as `position` does (by bisection over its length); then, at the first
    character in which they differ, what lies in the middle.
    """
    low, high = _shared(position, bound), len(position)
    if bound is None or bound == successor(position[: low + 1]):
        while low < high:
            length = (low + high + 1) // 2
            edge = successor(position[:length])
            if edge is None or edge == bound or not has_key(edge, bound):
                low, bound = length, edge or bound
            else:
                high = length - 1
    for _ in range(TRIES):
        cut = _middle(position, bound)
        if cut is None or has_key(cut, bound):
            return cut, bound
        bound = cut
    return None, bound


def successor(prefix: str) -> str | None:
    """Give the least string above all that begin with a prefix; None when there is none."""
    for i in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[i]) + 1
        if code <= 0x10FFFF:
            return prefix[:i] + chr(_SURROGATES.stop if code in _SURROGATES else code)
    return None


def estimate_remaining(first: str, position: str, bound: str | None, keys: int) -> float:
    """Estimate how many keys lie in (position, bound], from the `keys` in [first, position]."""
    if bound is None:
        return float("inf")
    skip = _shared(first, bound)
    start, now, end = (_number(text[skip : skip + 12]) for text in (first, position, bound))
    return keys * (end - now) / (now - start) if now > start else float("inf")


def _number(text: str) -> int:
    return sum(min(ord(char), 127) << 7 * (11 - i) for i, char in enumerate(text))


def _shared(position: str, bound: str | None) -> int:
    pairs = zip(position, bound or "", strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(position), len(bound or "")))


def _middle(position: str, bound: str | None) -> str | None:
    i = _shared(position, bound)
    low = _code(position, i)
    high = _code(bound, i) if bound is not None else 0x110000
    if high - low == 1 and bound is not None:
        if len(bound) > i + 1:
            return bound[: i + 1]  # between the last keys that begin as position does and the first that do not
        i, high = i + 1, 0x110000
        low = _code(position, i)
    code = next((edge for edge in _AFTER_CLASSES if low < edge < high), (low + high) // 2)
    if code in _SURROGATES:
        code = _SURROGATES.start - 1
    return position[:i] + chr(code) if low < code < high else None


def _code(text: str, i: int) -> int:
    return ord(text[i]) if i < len(text) else 0x1F

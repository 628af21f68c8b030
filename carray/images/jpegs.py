"""Decodes JPEGs with libjpeg-turbo, and tells damaged pixels from harmless deviations of the format.

A progressive JPEG that lacks scans is damaged, although no decoder warns of it; one that lacks only its end marker is
not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from carray.core.errors import DecodeError

__all__ = ["MAX_SCANS", "Samples", "check_scans", "decode_samples", "has_several_scans"]

Samples = npt.NDArray[np.uint8]

MAX_SCANS = 64
"""A progressive JPEG has about ten; each covers the whole picture, so a few kilobytes of them cost minutes."""

WARNINGS: tuple[tuple[str, Literal["damage", "look again", "harmless"], str], ...] = (
    (r"Corrupt JPEG data: premature end of data segment", "damage", "a scan ends before its rows; the rest is filler"),
    (r"Corrupt JPEG data: bad Huffman code", "damage", "no encoder writes such bits: the rest is noise"),
    (r"Corrupt JPEG data: bad arithmetic code", "damage", "the same, of the other entropy coder"),
    (r"Corrupt JPEG data: found marker", "damage", "restart markers out of order: rows were lost or moved"),
    (r"Inconsistent progression sequence", "damage", "a scan refines what no scan before it has begun: one was lost"),
    (
        r"Corrupt JPEG data: \d+ extraneous bytes before marker",
        "look again",
        "between segments of the header nothing is lost; behind a scan they are image data that its rows did not take",
    ),
    (r"Premature end of JPEG file", "look again", "image data may be missing, or nothing but the end marker"),
    (r"Invalid SOS parameters for sequential", "harmless", "a sequential scan has all coefficients whatever it says"),
    (r"Unknown Adobe color transform code", "harmless", "libjpeg assumes YCbCr, which all writers of it mean"),
    (r"Warning: unknown JFIF revision number", "harmless", "the pixels of all revisions are coded alike"),
    (r"Corrupt JPEG data: bad ICC marker", "harmless", "colour profiles are not applied"),
)
"""libjpeg's warnings (jerror.h, JWRN_*; it reports the first of a file only), what each means, and why."""

_REFUSALS = re.compile(
    r"tj\w+\(\)|Unsupported JPEG|Unsupported color conversion|Sorry|.*not supported|.*not implemented|Too many color"
    r"|Maximum supported|Image too wide|Sampling factors too large|.*compile time"
)
"""How libjpeg-turbo's messages about unsupported kinds of JPEG begin; every other error means damaged data."""

_MARKER = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")
"""The start of a segment: inside a scan 0xff is followed by zero or a restart marker, 0xd0 to 0xd7."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SCAN, _END = 0xDA, 0xD9


def decode_samples(data: bytes, colorspace: str, *, height: int, width: int, several_scans: bool) -> Samples | None:
    """Decode a JPEG: height x width x channels of `colorspace`, uint8, the smallest that has `height` and `width`.

    `several_scans` is the result of `has_several_scans`. None where libjpeg-turbo does not support this kind of JPEG.

    Raises:
        DecodeError: code damaged or truncated, with libjpeg's message.
    """
    import simplejpeg

    def decode(stream: bytes) -> Samples:
        return np.asarray(
            simplejpeg.decode_jpeg(stream, colorspace, min_height=height, min_width=width, strict=True), dtype=np.uint8
        )

    samples_HWC: Samples | None
    try:
        samples_HWC = decode(data)
    except ValueError as err:
        samples_HWC = _look_again(data, str(err), decode)
    if several_scans and samples_HWC is not None and not _has_all_scans(data):
        raise _error("its scans leave out some of the coefficients", is_closed=_is_closed(data))
    return samples_HWC


def check_scans(data: bytes) -> None:
    """Check the number of a JPEG's scans up to its end marker, after which cameras append films (ITU T.81, B.1).

    Raises:
        DecodeError: code unsupported: over MAX_SCANS.
    """
    is_suspect = data.count(b"\xff\xda") > MAX_SCANS
    if is_suspect and sum(marker == _SCAN for marker, _, _ in _segments(data)) > MAX_SCANS:
        raise DecodeError("unsupported", f"the JPEG has over {MAX_SCANS} scans, each of which costs a whole decoding")


def has_several_scans(data: bytes) -> bool:
    """Check whether a JPEG has several scans, so that a decoder keeps all of its coefficients in memory."""
    components = 0
    for marker, start, _ in _segments(data):
        if marker in _PROGRESSIVE:
            return True
        if marker in _FRAMES:
            components = data[start + 7] if start + 7 < len(data) else 0
        if marker == _SCAN:
            return start + 2 < len(data) and data[start + 2] < components
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's (marker, offset of its length, offset behind it), up to the end marker."""
    offset = 2
    while (found := _MARKER.search(data, offset)) is not None:
        marker, start = found[1][0], found.end()
        offset = start + int.from_bytes(data[start : start + 2], "big")
        yield marker, start, offset
        if marker == _END:
            return


def _look_again(data: bytes, words: str, decode: Callable[[bytes], Samples]) -> Samples | None:
    """Decode a JPEG again without its metadata, so that libjpeg's first warning is one about pixels."""
    meaning = next((meaning for start, meaning, _ in WARNINGS if re.match(start, words)), None)
    if meaning is None and _REFUSALS.match(words):
        return None
    if meaning is None:
        raise _error(f"libjpeg: {words}", is_closed=b"\xff\xd9" in data)
    if meaning == "damage":
        raise _error(f"libjpeg: {words}", is_closed=True)
    is_closed, pixels_only = _is_closed(data), _without_oddities(data)
    try:
        return decode(pixels_only)
    except ValueError as err:
        again = str(err)
    if is_closed and (padding := _padding(pixels_only, again)):
        try:
            return decode(pixels_only[: -2 - padding] + pixels_only[-2:])
        except ValueError as err:
            again = str(err)
    raise _error(f"libjpeg: {again if is_closed else words}", is_closed=is_closed)


def _error(evidence: str, *, is_closed: bool) -> DecodeError:
    if is_closed:
        return DecodeError("damaged", f"the image's data is damaged ({evidence})")
    return DecodeError("truncated", f"the file is truncated ({evidence})")


def _is_closed(data: bytes) -> bool:
    return any(marker == _END for marker, _, _ in _segments(data))


def _without_oddities(data: bytes) -> bytes:
    """Drop a JPEG's metadata, correct what causes harmless warnings, and add the end marker."""
    parts, sequential = [data[:2]], True
    for marker, start, end in _segments(data):
        body = data[start:end]
        if marker == _END:
            break
        if marker == _SCAN:
            scan_end = next((at for found, at, _ in _segments(data) if found == _END), len(data) + 2) - 2
            spectrum = b"\x00\x3f\x00" if sequential else body[-3:]
            parts += [b"\xff\xda", body[:-3], spectrum, data[end:scan_end]]
            break
        sequential = sequential and marker not in _PROGRESSIVE
        if body[2:7] == b"JFIF\0":
            body = body[:7] + b"\x01\x01" + body[9:]
        elif body[2:7] == b"Adobe" and len(body) > 13 and body[13] > 2:
            body = body[:13] + b"\x01" + body[14:]
        elif (0xE0 <= marker <= 0xEF and body[2:7] != b"Adobe") or marker == 0xFE:
            continue
        parts += [bytes((0xFF, marker)), body]
    return b"".join([*parts, b"\xff\xd9"])


def _padding(data: bytes, words: str) -> int:
    """Count the equal padding bytes between a scan's last row and the end marker, of which libjpeg may have read eight.

    A longer run of that value is image data that was overwritten.
    """
    found = re.fullmatch(r"Corrupt JPEG data: (\d+) extraneous bytes before marker 0xd9", words)
    if found is None:
        return 0
    run = len(data) - 2 - len(data[:-2].rstrip(data[-3:-2]))
    return run if int(found[1]) <= run <= int(found[1]) + 8 else 0


def _has_all_scans(data: bytes) -> bool:
    """Check that a JPEG's scans hold all bits of every component's coefficients (ITU T.81, G.1.1.1)."""
    missing: dict[int, list[int]] = {}
    sequential = True
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            sequential = marker not in _PROGRESSIVE
            missing = {component: [1] * 64 for component in data[start + 8 : end : 3]}
        elif marker == _SCAN and end <= len(data):
            first, last, bits = (0, 63, 0) if sequential else (data[end - 3], data[end - 2], data[end - 1] & 15)
            for component in data[start + 3 : end - 3 : 2]:
                if component in missing:
                    missing[component][first : last + 1] = [bits] * (last + 1 - first)
    return not any(any(bits) for bits in missing.values())

"""Names what a file holds that is no image which carray decodes, from its first bytes."""

from __future__ import annotations

import re

__all__ = ["name_contents"]

_MAGIC: tuple[tuple[str, str], ...] = (
    (r"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (r"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (r"8BPS", "a Photoshop file"),
    (r"\0\0\x01\0", "an icon"),
    (r"[\s\S]{4}ftyp(?:isom|iso\d|mp4|M4V|qt  |3g)", "a video"),
    (r"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (r"RIFF[\s\S]{4}AVI ", "a video (AVI)"),
    (r"version https://git-lfs\.github\.com/", "a Git LFS pointer, whose image was not fetched (git lfs pull)"),
    (r"(?i)\s*(?:<!--[\s\S]*?-->\s*)?<(?:!doctype html|html|head|body)", "an HTML page"),
    (r"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!doctype svg[^>]*>\s*)?<svg", "an SVG drawing"),
    (r"\s*<\?xml|\s*<Error>", "an XML document"),
    (r"\s*[\[{]\s*[\"{\[]", "a JSON document"),
    (r"%PDF-", "a PDF document"),
    (r"%!PS", "a PostScript document"),
    (r"\x1f\x8b", "a gzip file"),
    (r"\x28\xb5\x2f\xfd", "a Zstandard file"),
    (r"BZh\d|\xfd7zXZ\0", "a compressed file"),
    (r"PK\x03\x04", "a ZIP archive"),
    (r"[\s\S]{257}ustar", "a tar archive"),
    (r"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07", "an archive"),
    (r"PAR1", "a Parquet file"),
    (r"\x93NUMPY", "a NumPy array"),
    (r"\0+$", "nothing but zero bytes"),
)
"""How files begin that turn up among photographs, and what they are."""
_PATTERNS = [(re.compile(pattern.encode("latin-1")), name) for pattern, name in _MAGIC]
_LOOKED_AT_BYTES = 512


def name_contents(data: bytes) -> str | None:
    """Name the kind of file, with its article; None where it is not known."""
    head = data[:_LOOKED_AT_BYTES]
    return next((name for pattern, name in _PATTERNS if pattern.match(head)), None)

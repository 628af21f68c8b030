"""Reads images by key, from an object store or a local folder.

From: a URI of `core.store.listing`. To: the bytes of one image with the etag they were read under.
Invariants: a key with `//` or a trailing `/` is a key like any other; a local name that is not UTF-8 comes
percent-escaped and marked; what failed is a `FetchError`, after every try that could have helped. Where an etag is the
body's MD5, as on S3 for objects put in one piece and not encrypted by a key service, bytes that do not match it are
read again: a store or proxy that changes versions in the middle of a read gives no image of both.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from carray.core.errors import FetchError, SettingsError, StorageError
from carray.core.store import objects
from carray.core.store.files import TRIES, is_s3, retry
from carray.core.store.objects import StoreError
from carray.core.text import one_line

__all__ = ["IMAGE_SUFFIXES", "FetchedImage", "fetch_image", "is_image_key", "key_suffix", "local_etag"]

IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "heif", "avif")
"""What counts as an image by its name, in any case; `--all-files` takes everything."""


@dataclass(frozen=True, slots=True)
class FetchedImage:
    """Holds one image's bytes and the etag of the very read that gave them."""

    data: bytes
    etag: str | None


def is_image_key(uri: str) -> bool:
    """Say whether a key's suffix is an image's; a trailing slash, legal on S3, hides none."""
    return key_suffix(uri) in IMAGE_SUFFIXES


def key_suffix(uri: str) -> str:
    """Give what follows the last dot of a key's last name, in lower case; empty when there is no dot."""
    _, dot, suffix = uri.rstrip("/").rsplit("/", 1)[-1].rpartition(".")
    return suffix.lower() if dot else ""


def fetch_image(
    uri: str, *, escaped: bool = False, admit: Callable[[int], None] = lambda size_bytes: None
) -> FetchedImage:
    """Read one image's bytes in one request.

    Args:
        uri: Where it lies.
        escaped: Whether `uri` percent-escapes a local name that is not UTF-8.
        admit: Is told the size in bytes before they are read; it may wait, or raise to leave them unread. It is told
            again when a body broke off and is read anew.

    Raises:
        FetchError: code not_found, denied, timeout or unavailable.
        StorageError: the credentials at hand have expired.
        SettingsError: the URI names a bucket.
    """
    if not is_s3(uri):
        return _fetch_local(uri, admit, escaped=escaped)
    if not objects.split_uri(uri)[1]:
        raise SettingsError(f"{uri!r} names a bucket, not an image; write s3://bucket/key.")
    seen: list[tuple[bytes, str]] = []
    try:
        return retry(lambda: _fetch_object(uri, admit, seen), what=f"reading {uri}")
    except FileNotFoundError as err:
        raise FetchError("not_found", str(err)) from None
    except StorageError as err:
        cause = err.__cause__
        if not isinstance(cause, StoreError):
            raise FetchError("unavailable", one_line(err)) from None
        if cause.code == "expired":
            raise StorageError(f"the credentials at hand have expired ({cause}); renew them and go on.") from None
        tries = f"no whole answer after {TRIES} tries ({cause})" if cause.passing else str(cause)
        raise FetchError(cause.code, tries) from None


def _fetch_object(uri: str, admit: Callable[[int], None], seen: list[tuple[bytes, str]]) -> FetchedImage:
    data, etag = objects.get_object(uri, admit)
    whole = not _MD5.fullmatch(etag) or _etags.agree(data, etag) or _etags.are_other((data, etag), seen)
    if not whole and objects.is_md5(uri):
        raise StoreError("unavailable", "the bytes read are not those of the object's etag", passing=True)
    return FetchedImage(data, etag)


_MD5 = re.compile(r"[0-9a-f]{32}")


class _Etags:
    """Learns whether a store's etags are MD5: one body that matches shows that they are."""

    MISSES = 8
    """Objects with another etag than their MD5, after which the etags are of another kind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matched = False
        self._misses = 0

    def agree(self, data: bytes, etag: str) -> bool:
        """Say whether the bytes are those of the etag, as far as this store's etags tell."""
        if self._misses >= self.MISSES and not self._matched:
            return True
        matches = hashlib.md5(data, usedforsecurity=False).hexdigest() == etag
        self._matched = self._matched or matches
        return matches

    def are_other(self, found: tuple[bytes, str], seen: list[tuple[bytes, str]]) -> bool:
        """Say whether bytes that do not match were read twice alike, while no other ever matched."""
        with self._lock:
            alike = found in seen
            seen.append(found)
            self._misses += alike
            return alike and not self._matched


_etags = _Etags()


def local_etag(found: os.stat_result) -> str:
    """Give what stands for a local file's content: its time of change and size."""
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _fetch_local(uri: str, admit: Callable[[int], None], *, escaped: bool) -> FetchedImage:
    try:
        path = unquote_to_bytes(uri) if escaped else os.fsencode(uri)
        # Without NONBLOCK a named pipe would hold its worker for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FetchError("denied", "the name is not of a regular file")
            admit(found.st_size)
            return FetchedImage(file.read(), local_etag(found))
    except FileNotFoundError:
        raise FetchError("not_found", "the file does not exist") from None
    except (PermissionError, IsADirectoryError) as err:
        raise FetchError("denied", f"the file may not be read ({err.strerror})") from None
    except (OSError, ValueError) as err:
        raise FetchError("unavailable", f"the file could not be read ({err})") from None

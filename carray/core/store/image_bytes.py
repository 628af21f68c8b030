"""Reads images by key, from an S3 store (core.store.s3) or a local folder.

From: a URI of `core.store.listing`. To: the bytes of one image with the etag they were read under.
Invariants: a key with `//` or a trailing `/` is a key like any other; a local name that is not UTF-8 comes
percent-escaped and marked; what failed is a `FetchError`, after every try that could have helped.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from carray.core.errors import FetchError
from carray.core.store.files import is_s3
from carray.core.store.s3 import fetch_object

__all__ = ["IMAGE_SUFFIXES", "FetchedImage", "fetch_image", "is_image_key", "key_suffix", "local_etag"]

IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
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
    """
    return FetchedImage(*fetch_object(uri, admit)) if is_s3(uri) else _fetch_local(uri, admit, escaped=escaped)


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

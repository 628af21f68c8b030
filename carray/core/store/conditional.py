"""Writes a file only where there is none, or only over the version that was read: the first writer wins.

Local files: a hard link, and a lock on the file that is replaced. S3: If-None-Match and If-Match. Where the store or
the disk has neither, it is a look and a plain write: right as long as only one driver works there.
A write whose answer was lost is tried again and then finds its own file: if the bytes are ours, so is the file. Where
it matters who wrote, the bytes must hold something that only this writer has.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from functools import partial

from carray.core.errors import FetchError, StorageError
from carray.core.store.files import exists, filesystem, is_s3, retry, temporary_file, write_bytes
from carray.core.store.image_bytes import fetch_image
from carray.core.store.s3 import NoConditions, UnmetCondition, delete_object, put_object, split_uri

__all__ = ["create", "read_version", "remove", "replace"]

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def create(uri: str, data: bytes, *, durable: bool = True) -> str | None:
    """Write a whole file where there is none; gives its etag, or None where there is one already.

    Without `durable` a local file may be lost with the machine's power, though not with a process.

    Raises:
        StorageError: storage refused it after every try.
    """
    return _write(uri, data, None, durable=durable)


def replace(uri: str, data: bytes, etag: str, *, durable: bool = True) -> str | None:
    """Write a whole file over the version of that etag; gives the new etag, or None where that version is gone.

    Raises:
        StorageError: storage refused it after every try.
    """
    return _write(uri, data, etag, durable=durable)


def read_version(uri: str) -> tuple[bytes, str] | None:
    """Read a whole file in one request: its bytes and their etag; None where there is none.

    Raises:
        StorageError: storage refused it after every try.
    """
    path = filesystem(uri)[1]

    def read_local() -> tuple[bytes, str]:
        with open(path, "rb") as file:
            return file.read(), _etag(os.fstat(file.fileno()))

    try:
        if not is_s3(uri):
            return retry(read_local, what=f"reading {uri}")
        found = fetch_image(uri)
        return found.data, found.etag or ""
    except FileNotFoundError:
        return None
    except FetchError as err:
        if err.code == "not_found" and "NoSuchBucket" not in str(err):
            return None
        raise _storage_error("reading", uri, err) from None


def remove(uri: str) -> None:
    """Delete a file that we wrote, in one request; an absent one is no error.

    Raises:
        StorageError: storage refused it after every try.
    """
    path = filesystem(uri)[1]
    once = partial(delete_object, *split_uri(uri)) if is_s3(uri) else partial(os.unlink, path)
    try:
        with suppress(FileNotFoundError):
            retry(once, what=f"deleting {uri}")
    except FetchError as err:
        raise _storage_error("deleting", uri, err) from None


def _write(uri: str, data: bytes, etag: str | None, *, durable: bool) -> str | None:
    filesystem(uri)  # refuses what is no artifact's URI
    once = partial(_put if is_s3(uri) else _put_local, uri, data, etag, durable)
    unanswered = False

    def write() -> str | None:
        nonlocal unanswered
        try:
            return once()
        except UnmetCondition:
            found = read_version(uri) if unanswered else None
            return found[1] if found and found[0] == data else None
        except ConnectionError:
            unanswered = True
            raise

    try:
        return retry(write, what=f"writing {uri}")
    except FileNotFoundError:  # what was to be replaced
        if etag is None:
            raise
        return None
    except FetchError as err:
        raise _storage_error("writing", uri, err) from None
    except NoConditions:
        return _look_and_write(uri, data, etag, durable=durable)


def _storage_error(doing: str, uri: str, err: FetchError) -> StorageError:
    return StorageError(
        f"{doing} {uri} failed ({err}); check that the place exists and that the credentials at hand may use it."
    )


def _put(uri: str, data: bytes, etag: str | None, durable: bool) -> str:
    condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": f'"{etag}"'}
    return put_object(*split_uri(uri), data, **condition)


def _put_local(uri: str, data: bytes, etag: str | None, durable: bool) -> str:
    path = filesystem(uri)[1]
    if etag is not None:
        return _replace_local(path, data, etag, durable)
    with temporary_file(path, data, durable=durable) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            if os.stat(temporary).st_nlink != 2:  # a network disk may have linked it and lost the answer
                raise UnmetCondition(path) from None
        except OSError as err:
            if err.errno in _NO_LINKS:
                raise NoConditions(path) from None
            raise
        return _etag(os.stat(temporary))


def _replace_local(path: str, data: bytes, etag: str, durable: bool) -> str:
    with open(path, "rb+") as held:
        # Whoever replaces this file holds this lock meanwhile, and whoever waited for it finds another file.
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        if not _etag(os.fstat(held.fileno())) == _etag(os.stat(path)) == etag:
            raise UnmetCondition(path)
        with temporary_file(path, data, durable=durable) as temporary:
            os.replace(temporary, path)
            return _etag(os.stat(path))


def _look_and_write(uri: str, data: bytes, etag: str | None, *, durable: bool) -> str | None:
    if etag is None:
        if exists(uri):
            return None
    else:
        found = read_version(uri)
        if found is None or found[1] != etag:
            return None
    write_bytes(uri, data, durable=durable)
    written = read_version(uri)
    return written[1] if written else None


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"

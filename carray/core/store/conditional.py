"""Writes a file only where there is none, or only over the version that was read: the first writer wins.

Local files: a hard link, and a lock on the file that is replaced. Object stores: If-None-Match and If-Match. Where the
store or the disk has neither, it is a look and a plain write: right as long as only one driver works there.
A write whose answer was lost is tried again and then finds its own file: if the bytes are ours, so is the file. Where
it matters who wrote, the bytes must hold something that only this writer has.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

from carray.core.store import objects
from carray.core.store.files import artifact_uri, exists, is_s3, retry, temporary_file, write_bytes
from carray.core.store.objects import NoConditions, UnmetCondition

__all__ = ["create", "keeps_conditions", "read_version", "replace"]

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


def keeps_conditions(uri: str, data: bytes) -> bool:
    """Say whether the place of a file that is there, with these bytes, refuses to create it once more.

    Some stores refuse every conditional write, and some ignore the condition.

    Raises:
        StorageError: storage failed after every try.
    """
    uri = artifact_uri(uri)
    try:
        retry(lambda: _write_once(uri, data, None, durable=False), what=f"writing {uri}")
    except UnmetCondition:
        return True
    except NoConditions:
        pass
    return False


def read_version(uri: str) -> tuple[bytes, str] | None:
    """Read a whole file in one request: its bytes and their etag; None where there is none.

    Raises:
        StorageError: storage refused it after every try.
    """
    uri = artifact_uri(uri)

    def read() -> tuple[bytes, str]:
        if is_s3(uri):
            return objects.get_object(uri)
        with open(uri, "rb") as file:
            return file.read(), _etag(os.fstat(file.fileno()))

    try:
        return retry(read, what=f"reading {uri}")
    except FileNotFoundError:
        return None


def _write(uri: str, data: bytes, etag: str | None, *, durable: bool) -> str | None:
    uri = artifact_uri(uri)
    unanswered = False

    def write() -> str | None:
        nonlocal unanswered
        try:
            return _write_once(uri, data, etag, durable=durable)
        except UnmetCondition:
            found = read_version(uri) if unanswered else None
            return found[1] if found and found[0] == data else None
        except OSError:
            unanswered = True
            raise

    try:
        return retry(write, what=f"writing {uri}")
    except FileNotFoundError:  # what was to be replaced
        if etag is None:
            raise
        return None
    except NoConditions:
        return _look_and_write(uri, data, etag, durable=durable)


def _write_once(uri: str, data: bytes, etag: str | None, *, durable: bool) -> str:
    if is_s3(uri):
        return objects.put_object(uri, data, mode=etag or "create")
    if etag is not None:
        return _replace_local(uri, data, etag, durable)
    with temporary_file(uri, data, durable=durable) as temporary:
        try:
            os.link(temporary, uri)
        except FileExistsError:
            if os.stat(temporary).st_nlink != 2:  # a network disk may have linked it and lost the answer
                raise UnmetCondition(uri) from None
        except OSError as err:
            if err.errno in _NO_LINKS:
                raise NoConditions(uri) from None
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

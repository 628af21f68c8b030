"""Local files, by the functions that `core.store.objects` has for object stores; each is tried once.

A file is written under a temporary name and then gets its own: by a rename, or where none may be replaced by a hard
link. Who replaces a version holds a lock on the file meanwhile.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from contextlib import suppress

from carray.core.errors import StorageError
from carray.core.store.objects import NoConditions, ObjectState, UnmetCondition

__all__ = ["delete_object", "get_object", "head_object", "list_names", "put_object"]

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


def get_object(path: str) -> tuple[bytes, str]:
    """Read a file: its bytes and what stands for an etag.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(), _etag(os.fstat(file.fileno()))


def head_object(path: str) -> ObjectState:
    """Give a file's size and time.

    Raises:
        FileNotFoundError: no file has that name.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise FileNotFoundError(errno.ENOENT, "it is no file", path)
    return ObjectState(found.st_size, found.st_mtime_ns)


def list_names(path: str) -> tuple[list[str], bool]:
    """List the names of the files directly in a folder; also says whether it exists.

    Raises:
        OSError: it cannot be listed.
    """
    if not os.path.isdir(path):
        return [], False
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_file()], True


def delete_object(path: str) -> None:
    """Delete a file; an absent one is no error.

    Raises:
        OSError: it cannot be deleted.
    """
    with suppress(FileNotFoundError):
        os.unlink(path)


def put_object(path: str, data: bytes, *, mode: str | None = None, durable: bool = True) -> str:
    """Write a file and its folder; gives what stands for an etag.

    Args:
        path: Where.
        data: What.
        mode: `create` writes only where there is none, an etag only over that version; None over any file.
        durable: Whether the file must outlast a loss of the machine's power.

    Raises:
        UnmetCondition: the condition does not hold.
        NoConditions: the disk has no hard links.
        StorageError: a device or a pipe has that name.
        OSError: it cannot be written.
    """
    if mode is None and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise StorageError(f"{path} is a device or a pipe, over which no file is put; name a file.")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        etag = _etag(os.stat(temporary))
        if mode is None:
            os.replace(temporary, path)
        elif mode == "create":
            _link(temporary, path)
        else:
            _replace(temporary, path, mode)
        return etag
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        if os.stat(temporary).st_nlink != 2:  # a network disk may have linked it and lost the answer
            raise UnmetCondition(path) from None
    except OSError as err:
        if err.errno in _NO_LINKS:
            raise NoConditions(path) from None
        raise


def _replace(temporary: str, path: str, etag: str) -> None:
    with open(path, "rb+") as held:
        # Whoever replaces this file holds this lock meanwhile, and whoever waited for it finds another file.
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX)
        if not _etag(os.fstat(held.fileno())) == _etag(os.stat(path)) == etag:
            raise UnmetCondition(path)
        os.replace(temporary, path)


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"

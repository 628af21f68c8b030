"""Writes a file only where there is none, or only over the version that was read: the first writer wins.

Local files: a hard link, and a lock on the file that is replaced. Object stores: If-None-Match and If-Match. Where the
store or the disk has neither, it is a look and a plain write: right as long as only one driver works there.
A write whose answer was lost is tried again and then finds its own file: if the bytes are ours, so is the file. Where
it matters who wrote, the bytes must hold something that only this writer has.
"""

from __future__ import annotations

from carray.core.store.files import artifact_uri, client_of, exists, read_version, retry, write_bytes
from carray.core.store.objects import NoConditions, UnmetCondition

__all__ = ["create", "keeps_conditions", "read_version", "replace"]


def create(uri: str, data: bytes, *, durable: bool = True) -> str | None:
    """Write a whole file where there is none; gives its etag, or None where there is one already.

    Without `durable` a local file may be lost with the machine's power, though not with a process.

    Raises:
        StorageError: storage refused it after every try.
    """
    return _write(uri, data, "create", durable=durable)


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
        retry(lambda: client_of(uri).put_object(uri, data, mode="create", durable=False), what=f"writing {uri}")
    except UnmetCondition:
        return True
    except NoConditions:
        pass
    return False


def _write(uri: str, data: bytes, mode: str, *, durable: bool) -> str | None:
    uri = artifact_uri(uri)
    unanswered = False

    def write() -> str | None:
        nonlocal unanswered
        try:
            etag: str = client_of(uri).put_object(uri, data, mode=mode, durable=durable)
            return etag
        except UnmetCondition:
            found = read_version(uri) if unanswered else None
            return found[1] if found and found[0] == data else None
        except OSError:
            unanswered = True
            raise

    try:
        return retry(write, what=f"writing {uri}")
    except FileNotFoundError:  # what was to be replaced
        if mode == "create":
            raise
        return None
    except NoConditions:
        found = read_version(uri) if mode != "create" else None
        if exists(uri) if mode == "create" else found is None or found[1] != mode:
            return None
        write_bytes(uri, data, durable=durable)
        written = read_version(uri)
        return written and written[1]

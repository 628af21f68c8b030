"""Reads and writes artifacts, local and in object stores; the only place that retries.

From, to: a URI is `s3://bucket/key`, raw and unencoded, or a local path. Endpoint, region and credentials are AWS's
own variables, profiles and roles (`AWS_ENDPOINT_URL`, `AWS_PROFILE`, ...).
Invariants: a file appears whole or not at all (a temporary name and a rename locally, one PUT in a store); an artifact
is complete exactly when its marker exists, and the marker is written last. Images are read by `core.store.image_bytes`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from carray.core.errors import SettingsError, StorageError
from carray.core.store import objects
from carray.core.store.objects import NoConditions, StoreError, UnmetCondition
from carray.core.text import one_line

__all__ = [
    "TRIES",
    "LocalFiles",
    "absolute",
    "artifact_uri",
    "client_of",
    "delete",
    "delete_unfinished",
    "exists",
    "file_state",
    "is_folder",
    "is_s3",
    "join",
    "json_bytes",
    "list_files",
    "local_copy",
    "parse_json",
    "read_bytes",
    "read_json",
    "read_version",
    "retry",
    "write_bytes",
    "write_json",
]

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
TRIES = 5
"""Waits of about 0.5, 1, 2 and 4 s lie between them: enough for throttling, short enough to notice an outage."""

_UNFINISHED = ".writing-"
"""Begin of the name of a local file that is being written."""

T = TypeVar("T")


def is_s3(uri: str) -> bool:
    """Say whether a URI lies in an object store."""
    return uri.startswith("s3://")


def absolute(uri: str | os.PathLike[str]) -> str:
    """Give the URI in its one spelling: `s3://bucket/key` as it is, a local path absolute, with `~` expanded.

    Raises:
        SettingsError: it is empty, misspelled, not UTF-8, of another scheme than s3, or carries credentials.
    """
    text = os.fspath(uri)
    if not text.strip():
        raise SettingsError(f"{text!r} is an empty path; name a file or a folder, or write s3://bucket/prefix.")
    if "\0" in text:
        raise SettingsError(f"{text!r} holds a zero byte, which no file's name does.")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # as Python holds a byte that is not UTF-8
        raise SettingsError(f"{text!a} is not UTF-8; rename it, or give the folder above it.")
    if is_s3(text):
        return _checked_s3(text)
    misspelled = _SCHEME.match(text)
    if misspelled:
        raise SettingsError(_scheme_sentence(text, misspelled))
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise SettingsError(f"{text!r} names a home that is not known here; write the whole path, or ./{text}.")
    try:
        return os.path.abspath(expanded)
    except FileNotFoundError:
        raise SettingsError(f"{text!r} is relative to a folder that was deleted; write the whole path.") from None


_SCHEME = re.compile(r"\s*(?:(?P<scheme>[A-Za-z0-9][A-Za-z0-9+.-]*):/|(?P<bare>[sS]3[aAnN]?)(?://|:))")
"""What is no local path: a scheme, or a misspelled s3://. A folder `a:` is ./a:/ for who has one."""
_BUCKET = re.compile(r"[A-Za-z0-9._:-]+")
"""The letters of a bucket's name, or of an access point's ARN."""


def _checked_s3(text: str) -> str:
    bucket = text.removeprefix("s3://").split("/", 1)[0]
    if not bucket:
        raise SettingsError(f"{text!r} names no bucket; write s3://bucket/prefix.")
    if "@" in bucket:  # which no bucket's name holds; the sentence must not repeat what may be a secret
        raise SettingsError(
            f"{'s3://…@' + bucket.rpartition('@')[2]!r} carries credentials, which would end up in logs and "
            "tables; give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role."
        )
    if not _BUCKET.fullmatch(bucket):
        raise SettingsError(
            f"{text!r} names the bucket {bucket!r}; allowed are letters, digits, dots and hyphens, as in "
            "s3://bucket/prefix."
        )
    return text


def _scheme_sentence(text: str, found: re.Match[str]) -> str:
    scheme = found["scheme"] or found["bare"]
    # A signed or personal address is as good as a password: only the host is repeated.
    host = re.split(r"[/?#]", text[found.end() :].lstrip("/"), maxsplit=1)[0].rpartition("@")[2]
    if scheme.lower() in ("s3", "s3a", "s3n"):
        seen = f"{scheme}…" if "@" in text else text
        return f"{seen!r} is a misspelled address of S3; write s3://{host or 'bucket'}/prefix."
    if scheme.lower() == "file":
        return f"{text!r} has the scheme {scheme!r}; write the path alone, such as /folder/name."
    return f"{scheme + '://' + host!r}… has the scheme {scheme!r}; allowed are s3:// and local paths."


def join(uri: str, *names: str) -> str:
    """Put names below a folder or prefix."""
    return "/".join([uri.rstrip("/"), *names])


def artifact_uri(uri: str) -> str:
    """Give the URI of an artifact in its one spelling.

    Raises:
        SettingsError: it is no URI, or its key has an empty part (`//`), which most programs cannot read.
    """
    uri = absolute(uri)
    if is_s3(uri) and "//" in uri.removeprefix("s3://"):
        raise SettingsError(f"{uri!r} has an empty part (//), where no artifact can lie; write single slashes.")
    return uri


class LocalFiles:
    """Local files, by the functions that `core.store.objects` has for object stores; each raises the disk's OSErrors.

    A file is written under a temporary name and then gets its own: by a rename, or where none may be replaced by a
    hard link. Who replaces a version holds a lock on the file meanwhile.
    """

    @staticmethod
    def get_object(path: str) -> tuple[bytes, str]:
        """Read a file: its bytes and what stands for an etag."""
        with open(path, "rb") as file:
            return file.read(), _etag(os.fstat(file.fileno()))

    @staticmethod
    def head_object(path: str) -> tuple[int, int]:
        """Give a file's size and time."""
        try:
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                return found.st_size, found.st_mtime_ns
        except NotADirectoryError:  # a folder above it is a file
            pass
        raise FileNotFoundError(errno.ENOENT, "it is no file", path)

    @staticmethod
    def list_names(path: str) -> tuple[list[str], bool]:
        """List the names of the files directly in a folder; also says whether it exists."""
        if not os.path.isdir(path):
            return [], False
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_file()], True

    @staticmethod
    def delete_object(path: str) -> None:
        """Delete a file; an absent one is no error."""
        with suppress(FileNotFoundError):
            os.unlink(path)

    @staticmethod
    def put_object(path: str, data: bytes, *, mode: str | None = None, durable: bool = True) -> str:
        """Write a file and its folder; gives what stands for an etag.

        Raises:
            UnmetCondition: the condition `mode` does not hold.
            NoConditions: the disk has no hard links.
            StorageError: a device or a pipe has that name.
        """
        if mode is None and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise StorageError(f"{path} is a device or a pipe, over which no file is put; name a file.")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=_UNFINISHED)
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


def client_of(uri: str) -> Any:
    """Give what does single requests for a URI: the functions for object stores, or those for local files."""
    return objects if is_s3(uri) else LocalFiles


def retry(action: Callable[[], T], *, what: str) -> T:
    """Run a storage action, again with jittered waits while its failure may be transient.

    Raises:
        FileNotFoundError: what is asked for does not exist.
        pa.ArrowInvalid: it was read, and is damaged: pyarrow says so of some files by an OSError.
        StorageError: the failure is permanent, or outlasted every try.
    """
    started = time.monotonic()
    for attempt in range(1, TRIES + 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError as err:
            if type(err) is OSError and err.errno is None:  # the disk's errors have a number
                raise pa.ArrowInvalid(str(err)) from err
            if _is_permanent(err) or attempt == TRIES:
                raise StorageError(_failure(what, err, attempt, time.monotonic() - started)) from err
        time.sleep(0.5 * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable: the last try returns or raises")


_FULL_ERRNOS = {27, 28, 122}  # a file, a disk or a quota at its limit
# No permission, a file where a folder is meant, read-only disk, name too long, links in a circle, no space: waiting
# does not help.
_LOCAL_ERRNOS = {1, 13, 17, 20, 21, 30, 36, 40, *_FULL_ERRNOS}


def _is_permanent(err: OSError) -> bool:
    if isinstance(err, StoreError):
        return not err.passing
    return isinstance(err, (PermissionError, IsADirectoryError, NotADirectoryError)) or err.errno in _LOCAL_ERRNOS


def _failure(what: str, err: OSError, tries: int, seconds: float) -> str:
    remedy = "check that the place exists and that the credentials at hand may use it"
    if err.errno in _FULL_ERRNOS:
        remedy = "free space there"
    elif isinstance(err, StoreError) and err.code == "expired":
        remedy = "the credentials at hand have expired: renew them and run the same command again"
    times = "1 try" if tries == 1 else f"{tries} tries"
    return f"{what} failed after {times} in {seconds:.1f} s ({one_line(err)}); {remedy}."


def read_bytes(uri: str) -> bytes:
    """Read one whole file.

    Raises:
        StorageError: the file does not exist, or storage refused it after every try.
    """
    found = read_version(uri)
    if found is None:
        raise StorageError(f"{uri} does not exist; check its spelling.")
    return found[0]


def read_version(uri: str) -> tuple[bytes, str] | None:
    """Read a whole file in one request: its bytes and their etag; None where there is none.

    Raises:
        StorageError: storage refused it after every try.
    """
    uri = artifact_uri(uri)
    with suppress(FileNotFoundError):
        return retry(lambda: client_of(uri).get_object(uri), what=f"reading {uri}")
    return None


def write_bytes(uri: str, data: bytes, *, durable: bool = True, check: Callable[[], None] | None = None) -> None:
    """Write one whole file, atomically, over any older one of that name.

    Without `durable` a local file may be lost with the machine's power, though not with a process. `check` is called
    before every try, and raises where the file must not be written any more: a machine that was cut off for minutes
    goes on with its tries when it is back.

    Raises:
        StorageError: storage refused it after every try, or something else than a file has that name.
    """
    uri = artifact_uri(uri)

    def write() -> None:
        if check is not None:
            check()
        client_of(uri).put_object(uri, data, durable=durable)

    retry(write, what=f"writing {uri}")


def read_json(uri: str) -> Any:
    """Read one JSON document.

    Raises:
        StorageError: the file does not exist, cannot be read or is not JSON.
    """
    return parse_json(read_bytes(uri), uri)


def parse_json(data: bytes, uri: str) -> Any:
    """Give what a JSON file holds.

    Raises:
        StorageError: its bytes are not JSON.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as err:  # brackets nested a thousand deep are legal JSON
        raise StorageError(f"{uri} is not valid JSON ({err}); it was damaged or written by another program.") from None


def json_bytes(value: Any) -> bytes:
    """Give the bytes of a JSON file."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def write_json(uri: str, value: Any, *, durable: bool = True, check: Callable[[], None] | None = None) -> None:
    """Write one JSON document, atomically; see `write_bytes`."""
    write_bytes(uri, json_bytes(value), durable=durable, check=check)


def file_state(uri: str) -> tuple[int, int] | None:
    """Give a file's size, and when it was written, in nanoseconds; None where there is no file of that name.

    Raises:
        StorageError: storage refused to say.
    """
    uri = artifact_uri(uri)
    with suppress(FileNotFoundError):
        return retry(lambda: client_of(uri).head_object(uri), what=f"looking for {uri}")
    return None


def delete_unfinished(folder: str) -> None:
    """Delete what killed processes left half-written in a local folder, but not below; nobody may be writing there."""
    if not is_s3(folder):
        for path in Path(folder).glob(f"{_UNFINISHED}*"):
            path.unlink(missing_ok=True)


def exists(uri: str) -> bool:
    """Say whether a file of that name exists."""
    return file_state(uri) is not None


def is_folder(uri: str) -> bool:
    """Say whether a folder, or anything under that prefix, exists."""
    uri = artifact_uri(uri)
    return retry(lambda: client_of(uri).list_names(uri)[1], what=f"looking for {uri}")


def list_files(uri: str) -> list[str]:
    """List the URIs of the files directly in a folder, sorted; an absent folder is an empty one."""
    uri = artifact_uri(uri)
    names = retry(lambda: client_of(uri).list_names(uri)[0], what=f"listing {uri}")
    return sorted(join(uri, name) for name in names)


def delete(uri: str) -> None:
    """Delete one file that we wrote, in one request; an absent one is no error."""
    uri = artifact_uri(uri)
    retry(lambda: client_of(uri).delete_object(uri), what=f"deleting {uri}")


def local_copy(uri: str, folder: str | os.PathLike[str]) -> Path:
    """Give a local path of a file: the file itself when it is local, else a copy in `folder`.

    Raises:
        StorageError: the file does not exist or cannot be read.
    """
    if not is_s3(uri):
        return Path(absolute(uri))
    path = Path(folder) / uri.rsplit("/", 1)[-1]
    write_bytes(str(path), read_bytes(uri))
    return path

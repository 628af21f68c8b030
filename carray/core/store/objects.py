"""The one client of object stores: single requests, each tried once (`core.store.files.retry` tries again).

From, to: a URI `scheme://bucket/key`. What opens a scheme's bucket is one function in `_OPENERS`; its methods are those
of obstore's stores. Every failure is a `StoreError`, except a FileNotFoundError for an absent object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from carray.core.store import s3
from carray.core.text import one_line

__all__ = [
    "NoConditions",
    "ObjectState",
    "StoreError",
    "UnmetCondition",
    "delete_object",
    "get_object",
    "get_range",
    "head_object",
    "is_md5",
    "list_names",
    "put_object",
    "split_uri",
]

_OPENERS: dict[str, Callable[..., Any]] = {"s3": s3.bucket_client}
_ONE_PUT_BYTES = 4 << 30
"""S3 takes 5 GB in one request; larger files go in parts."""


class StoreError(OSError):
    """A request failed; `code` is a row's error code, or expired; `passing` says that it may be tried again."""

    def __init__(self, code: str, message: str, *, passing: bool = False) -> None:
        self.code, self.passing = code, passing
        super().__init__(message)


class UnmetCondition(Exception):
    """The object that a conditional write expected is not there, or one that it did not expect is."""


class NoConditions(Exception):
    """The store does not know conditional writes."""


@dataclass(frozen=True, slots=True)
class ObjectState:
    """A file's size, and when it was written, in nanoseconds of Unix time."""

    size_bytes: int
    modified_ns: int


def split_uri(uri: str) -> tuple[str, str]:
    """Give the bucket and the key of a URI."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def get_object(uri: str, admit: Callable[[int], None] = lambda size_bytes: None) -> tuple[bytes, str]:
    """Read an object: its bytes and etag; `admit` is told the size before they come, and may raise.

    Raises:
        FileNotFoundError: there is none.
        StoreError: no whole answer came.
    """
    with _asking("s3:GetObject", uri) as (store, key):
        answer = store.get(key)
        admit(answer.meta["size"])
        return bytes(answer.bytes()), _etag(answer.meta)


def get_range(uri: str, start: int, end: int) -> tuple[bytes, int]:
    """Read the bytes from `start` up to `end`, or, if `start` is negative, the last ones; also gives the whole size.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: no whole answer came.
    """
    span = (start, end) if start >= 0 else {"suffix": -start}
    try:
        with _asking("s3:GetObject", uri) as (store, key):
            answer = store.get(key, options={"range": span})
            return bytes(answer.bytes()), answer.meta["size"]
    except StoreError as err:
        if "InvalidRange" in str(err):  # an empty object has no range
            return b"", 0
        raise


def head_object(uri: str) -> ObjectState:
    """Ask for an object's size and time.

    Raises:
        FileNotFoundError: there is none.
        StoreError: no answer came.
    """
    with _asking("s3:GetObject", uri) as (store, key):
        meta = store.head(key)
        return ObjectState(meta["size"], round(meta["last_modified"].timestamp()) * 10**9)


def put_object(uri: str, data: bytes, *, mode: str | None = None) -> str:
    """Write an object; gives its etag.

    Args:
        uri: Where.
        data: What.
        mode: `create` writes only where there is none, an etag only over that version; None over anything.

    Raises:
        UnmetCondition: the condition does not hold.
        NoConditions: the store does not know conditional writes.
        StoreError: it was refused, or no answer came: then the object may have been written.
    """
    condition = {"e_tag": f'"{mode}"'} if mode not in (None, "create") else mode
    with _asking("s3:PutObject", uri, condition) as (store, key):
        multipart = condition is None and len(data) > _ONE_PUT_BYTES
        return _etag(store.put(key, data, mode=condition or "overwrite", use_multipart=multipart))


def delete_object(uri: str) -> None:
    """Delete an object; an absent one is no error.

    Raises:
        StoreError: it was refused, or no answer came.
    """
    with _asking("s3:DeleteObject", uri) as (store, key):
        store.delete(key)


def list_names(uri: str) -> tuple[list[str], bool]:
    """List the names of the objects directly in a folder; also says whether anything lies below it.

    Raises:
        StoreError: it may not be listed, or no answer came.
    """
    with _asking("s3:ListBucket", uri) as (store, key):
        prefix = key.rstrip("/")
        found = store.list_with_delimiter(prefix)
        below = f"{prefix}/" if prefix else ""
        paths = [entry["path"] for entry in found["objects"]]
        names = [path.removeprefix(below) for path in paths if path.startswith(below) and path != below]
        return names, bool(names or found["common_prefixes"])


def is_md5(uri: str) -> bool:
    """Say whether an object's etag may be the MD5 of its bytes: not if a key service encrypted it."""
    bucket, key = split_uri(uri)
    try:
        with _asking("s3:GetObject", uri):
            return not s3.BotocoreBucket(bucket, s3.s3_client()).is_encrypted(key)
    except OSError:
        return True


def _etag(meta: Any) -> str:
    return str(meta["e_tag"] or "").strip('"')


@contextmanager
def _asking(right: str, uri: str, condition: Any = None) -> Iterator[tuple[Any, str]]:
    """Give the bucket's client and the key; turn what either library raises into our errors."""
    from botocore.exceptions import BotoCoreError, ClientError
    from obstore.exceptions import BaseError

    bucket, key = split_uri(uri)
    try:
        scheme = uri.partition("://")[0]
        yield _OPENERS[scheme](bucket, key, deletes=right == "s3:DeleteObject"), key
    except StoreError:
        raise
    except ClientError as err:
        found = err.response
        status = int(found.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        raise _refusal(bucket, right, condition, status, str(found.get("Error", {}).get("Code", status))) from None
    except BotoCoreError as err:
        raise _botocore_failure(err) from None
    except (BaseError, OSError) as err:
        raise _obstore_failure(err, bucket, right, condition) from None


_STATUS = re.compile(r"\bstatus(?: code:)? (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")


def _obstore_failure(err: Exception, bucket: str, right: str, condition: Any) -> Exception:
    text = one_line(str(err).partition("Debug source:")[0])
    status, code = _STATUS.search(text), _CODE.search(text)
    if status is not None or "redirect" in text:
        number = int(status[1]) if status else 301
        return _refusal(bucket, right, condition, number, code[1] if code else str(number))
    if type(err).__name__ == "UnauthenticatedError":
        return StoreError("denied", f"there are no usable credentials ({text})")
    return StoreError("timeout" if "timed out" in text else "unavailable", text, passing=True)


def _botocore_failure(err: Exception) -> Exception:
    from botocore import exceptions

    if isinstance(err, (exceptions.ConnectTimeoutError, exceptions.ReadTimeoutError)):
        return StoreError("timeout", one_line(err), passing=True)
    broken = (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.ResponseStreamingError)
    if isinstance(err, (*broken, exceptions.IncompleteReadError)):
        return StoreError("unavailable", one_line(err), passing=True)
    if type(err).__name__ in _NO_CREDENTIALS:
        return StoreError("denied", f"there are no usable credentials ({one_line(err)})")
    return StoreError("unavailable", one_line(err))


# botocore speaks of these without asking the store.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")
_DENIED_CODES = {"401", "403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_MISSING_CODES = {"NoSuchKey", "NotFound"}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
_REGION_CODES = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
# The first is a conditional write that met another one under way: which of them counts is not known yet.
_BUSY_CODES = {
    "ConditionalRequestConflict",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestTimeout",
}


def _refusal(bucket: str, right: str, condition: Any, status: int, code: str) -> Exception:
    """Say what a store's answer means, by its status and S3's error code."""
    if condition and (status == 412 or (status == 404 and condition != "create" and code != "NoSuchBucket")):
        return UnmetCondition(code)
    if condition and status == 501:
        return NoConditions(code)
    if code in _EXPIRED_CODES:
        s3.forget_client()
        return StoreError("expired", f"the store answered {code}", passing=True)
    if code in _BUSY_CODES or status in (408, 409, 429) or status >= 500:
        return StoreError("unavailable", f"the store answered {code}", passing=True)
    if status in (301, 307) or code in _REGION_CODES:
        passing = s3.learn_region(bucket)
        return StoreError("unavailable", f"the bucket lies in another region ({code}); set AWS_REGION", passing=passing)
    if code in _MISSING_CODES or (status == 404 and code != "NoSuchBucket"):
        return FileNotFoundError(f"the object does not exist ({code})")
    if code == "NoSuchBucket":
        return StoreError("not_found", f"the bucket does not exist ({code})")
    if code in _DENIED_CODES:
        who = "there are no usable credentials, and " if s3.is_anonymous() else ""
        return StoreError("denied", f"{who}the store refused the object ({code}); {right} is needed")
    return StoreError("unavailable", f"the store answered {code}")

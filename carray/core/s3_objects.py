"""Reads one object of an S3 store: its bytes, with the etag that they were read under, in one request.

Invariants: a plain object comes through obstore, for little processor time; what that way does not give is asked again
through botocore. What may pass (5xx, SlowDown, resets, silence, bodies that break off, credentials that have expired
and may be renewed) is tried again with jittered waits; credentials that stay expired are nobody's image's fault and
stop the caller. Where an etag is the body's MD5, as on S3 for objects put in one piece and not encrypted by a key
service, bytes that do not match it are read again: a store or proxy that changes versions in the middle of a read gives
no image of both.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

from carray.core.errors import FetchError, SettingsError, StorageError
from carray.core.s3_client import forget_client, s3_client, split_uri
from carray.core.s3_fast import FastRefusal, FastUnsure, fast_read, note_fast
from carray.core.storage import TRIES, retry

__all__ = ["fetch_object"]

_DENIED_CODES = {"403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_MISSING_CODES = {"404", "NoSuchKey", "NotFound", "NoSuchBucket"}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
_BUSY_CODES = {"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestTimeout"}
# botocore speaks of these without asking the store.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")


_TORN = "the bytes read are not those of the object's etag"


class _Passing(ConnectionError):
    """Says what may be gone at the next try, and the code of the row if it is not."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)


def fetch_object(uri: str, admit: Callable[[int], None]) -> tuple[bytes, str]:
    """Give an object's bytes and etag; `admit` is told their size first, and may wait or raise.

    Raises:
        FetchError: code not_found, denied, timeout or unavailable.
        StorageError: the credentials at hand have expired.
        SettingsError: the URI names a bucket.
    """
    bucket, key = split_uri(uri)
    if not key:
        raise SettingsError(f"{uri!r} names a bucket, not an image; write s3://bucket/key.")
    doubtful: list[tuple[bytes, str]] = []
    ways = [partial(_read_fast, bucket, key, admit, doubtful)]  # once; whatever comes of it, botocore's way is next
    slow = partial(_read, bucket, key, admit, doubtful)
    try:
        return retry(lambda: (ways.pop() if ways else slow)(), what=f"reading {uri}")
    except StorageError as err:
        cause = err.__cause__
        code = cause.code if isinstance(cause, _Passing) else "unavailable"
        if code == "expired":
            raise StorageError(f"the credentials at hand have expired ({cause}); renew them and go on.") from None
        raise FetchError(code, f"no whole answer after {TRIES} tries ({_one_line(cause or err)})") from None


def _read_fast(
    bucket: str, key: str, admit: Callable[[int], None], doubtful: list[tuple[bytes, str]]
) -> tuple[bytes, str]:
    try:
        found = fast_read(bucket, key, admit)
    except FastRefusal:
        note_fast(went_well=True)
        found = None
    except FastUnsure as err:
        note_fast(went_well=False)
        raise _Passing("unavailable", _one_line(err)) from None
    if found is None:
        return _read(bucket, key, admit, doubtful)
    # It hides the headers that tell of a key service's encryption, whose etags are no MD5; botocore's way sees them.
    whole = _MD5.fullmatch(found[1]) is None or _is_whole(*found, doubtful)
    note_fast(went_well=whole)
    if not whole:
        raise _Passing("unavailable", _TORN)
    return found


def _is_whole(data: bytes, etag: str, doubtful: list[tuple[bytes, str]]) -> bool:
    return _etags.agree(data, etag) or _etags.are_other((data, etag), doubtful)


def _read(bucket: str, key: str, admit: Callable[[int], None], doubtful: list[tuple[bytes, str]]) -> tuple[bytes, str]:
    from botocore.exceptions import BotoCoreError

    response = _ask(bucket, key)
    with closing(response["Body"]) as body:
        admit(int(response["ContentLength"]))
        try:
            data, etag = body.read(), response["ETag"].strip('"')
        except (BotoCoreError, OSError) as err:
            raise _Passing("unavailable", f"the object's bytes broke off: {_one_line(err)}") from None
    if _has_md5(response, etag) and not _is_whole(data, etag, doubtful):
        raise _Passing("unavailable", _TORN)
    return data, etag


def _ask(bucket: str, key: str) -> Any:
    from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, HTTPClientError, ReadTimeoutError
    from botocore.exceptions import ConnectionError as NotConnected

    try:
        return s3_client().get_object(Bucket=bucket, Key=key)
    except ClientError as err:
        raise _refusal(err) from None
    except (ConnectTimeoutError, ReadTimeoutError) as err:
        raise _Passing("timeout", _one_line(err)) from None
    except (HTTPClientError, NotConnected) as err:
        raise _Passing("unavailable", _one_line(err)) from None
    except BotoCoreError as err:
        if type(err).__name__ in _NO_CREDENTIALS:
            raise FetchError("denied", f"there are no usable credentials ({_one_line(err)})") from None
        raise FetchError("unavailable", _one_line(err)) from None


def _refusal(err: Any) -> Exception:
    code = str(err.response.get("Error", {}).get("Code", "unknown"))
    status = int(err.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _EXPIRED_CODES:
        forget_client()
        return _Passing("expired", f"the store answered {code}")
    if code in _BUSY_CODES or status in (408, 429) or status >= 500:
        return _Passing("unavailable", f"the store answered {code}")
    if code in _MISSING_CODES:
        return FetchError("not_found", f"the object does not exist ({code})")
    if code in _DENIED_CODES:
        return FetchError("denied", f"the store refused the object ({code}); s3:GetObject is needed")
    return FetchError("unavailable", f"the store answered {code}")


_MD5 = re.compile(r"[0-9a-f]{32}")


def _has_md5(response: Any, etag: str) -> bool:
    """Say whether an etag may be its body's MD5: not of an object put in parts, or encrypted by a key service."""
    encrypted = str(response.get("ServerSideEncryption", "")).startswith("aws:") or "SSECustomerAlgorithm" in response
    return not encrypted and _MD5.fullmatch(etag) is not None


class _Etags:
    """Learns whether a store's etags are MD5: one body that matches shows that they are."""

    MISSES = 8
    """Objects that were read twice alike, none matching its etag, after which the etags are of another kind."""

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

    def are_other(self, seen: tuple[bytes, str], before: list[tuple[bytes, str]]) -> bool:
        """Say whether bytes that do not match are whole all the same: read twice alike, and no other ever matched."""
        with self._lock:
            alike = seen in before
            before.append(seen)
            self._misses += alike
            return alike and not self._matched


_etags = _Etags()


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split())

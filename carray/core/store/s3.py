"""Reads one object of an S3 store, its bytes with the etag they were read under; or writes one under a condition.

Endpoint, region and credentials are AWS's own variables, profiles and roles.
Invariants: a plain object comes through obstore, for a quarter of the processor time that botocore takes
(`jobs.bench.classify.s3`); whatever fails there is asked again through botocore, which knows every legal key, other
regions' buckets, custom certificates and each error's meaning. When many reads through obstore in a row have failed,
that way rests for a while. One botocore client a process and environment; it tries once, since `storage.retry` is what
waits and tries again: botocore's own modes share a quota among all requests of a client, and once a busy store has used
that up, they fail without a second try.
What may pass (5xx, SlowDown, resets, silence, bodies that break off, credentials that have expired and may be renewed)
is tried again with jittered waits; credentials that stay expired stop the caller. Where an etag is the body's MD5, as
on S3 for objects put in one piece and not encrypted by a key service, bytes that do not match it are read again: a
store or proxy that changes versions in the middle of a read gives no image of both.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast

from carray.core.errors import FetchError, SettingsError, StorageError
from carray.core.store.aws import aws_environment, s3_endpoint
from carray.core.store.files import TRIES, retry

__all__ = [
    "POOL",
    "NoConditions",
    "UnmetCondition",
    "delete_object",
    "fetch_object",
    "forget_client",
    "make_client",
    "put_object",
    "s3_client",
    "split_uri",
]

POOL = 64
"""Connections that one client keeps, and so requests that may be under way at once."""
READ_SECONDS = 20
"""Of silence, not of the whole body."""

_lock = threading.Lock()
_clients: dict[Any, Any] = {}


def s3_client() -> Any:
    """Give this process's client; botocore's are safe to call from several threads."""
    key = (os.getpid(), aws_environment())  # a forked child must not share its parent's sockets, hence the pid
    with _lock:
        if key not in _clients:
            _clients.clear()
            _clients[key] = make_client()
        return _clients[key]


def forget_client() -> None:
    """Let the next client read its credentials anew, as after the old ones have expired."""
    with _lock:
        _clients.clear()


def make_client(*, region: str | None = None, **options: Any) -> Any:
    """Make a client by this process's environment; `options` are botocore's, beside ours or in their place."""
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    endpoint = s3_endpoint()
    ours: dict[str, Any] = {
        "max_pool_connections": POOL,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": 10,
        "read_timeout": READ_SECONDS,
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "s3": {"addressing_style": "path"} if endpoint else None,
    }
    config = Config(**(ours | options))
    region = region or os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    return session.create_client("s3", config=config, region_name=region)


def split_uri(uri: str) -> tuple[str, str]:
    """Give the bucket and the key of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


FAILURES = 20
"""Reads that failed one after another, after which it rests."""
REST_SECONDS = 60.0
_CREDENTIAL_SECONDS = 600
"""How long obstore keeps credentials; botocore renews them by itself well before they expire."""
_OWN_CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


class FastUnsure(Exception):
    """A read failed in a way that may pass."""


class FastRefusal(Exception):
    """The store refused an object, or does not have it: botocore explains why."""


def fast_read(bucket: str, key: str, admit: Callable[[int], None]) -> tuple[bytes, str] | None:
    """Give an object's bytes and etag; None where this way is not for it. `admit` is told the size before the bytes.

    Raises:
        FetchError: the object does not exist.
        FastRefusal: the store answered, and not with the object.
        FastUnsure: no whole answer came.
    """
    if not _takes(key) or _rest.is_on() or (store := _store(bucket)) is None:
        return None
    from obstore import exceptions

    try:
        answer = store.get(key)
        size, etag = answer.meta["size"], answer.meta["e_tag"]
        if not etag:
            return None
        admit(size)
        return answer.bytes().to_bytes(), etag.strip('"')
    except FileNotFoundError as err:
        if "NoSuchKey" in str(err):
            raise FetchError("not_found", "the object does not exist (NoSuchKey)") from None
        raise FastRefusal(_first_line(err)) from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as err:
        raise FastRefusal(_first_line(err)) from None
    except (exceptions.BaseError, OSError) as err:
        raise FastUnsure(_first_line(err)) from None


def _first_line(err: Exception) -> str:
    """Leave out the structures that obstore prints below."""
    return (str(err).splitlines() or [""])[0]


def note_fast(*, went_well: bool) -> None:
    """Say whether a read was of use."""
    _rest.note(went_well=went_well)


def _takes(key: str) -> bool:
    """Say whether obstore takes a key as it is: it drops slashes at the ends and refuses empty parts and `..`."""
    return key.isprintable() and not any(part in ("", ".", "..") for part in key.split("/"))


class _Rest:
    """Counts failures in a row, and says whether it is time to leave the store alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures, self._until = 0, 0.0

    def is_on(self) -> bool:
        return self._failures >= FAILURES and time.monotonic() < self._until

    def note(self, *, went_well: bool) -> None:
        with self._lock:
            self._failures = 0 if went_well else self._failures + 1
            if self._failures >= FAILURES:
                self._until = time.monotonic() + REST_SECONDS


_rest = _Rest()
_stores_lock = threading.Lock()
_stores: dict[str, tuple[Any, Any]] = {}


def _store(bucket: str) -> Any:
    """Give this process's store of a bucket; None where botocore has no credentials, or certificates of its own."""
    client = s3_client()
    with _stores_lock:
        made_with, store = _stores.get(bucket, (None, None))
        if made_with is not client:  # it is made anew in another process or environment, and for new credentials
            store = _make_store(bucket, client)
            _stores[bucket] = client, store
        return store


def _make_store(bucket: str, client: Any) -> Any:
    # botocore hands its credentials to nobody but its signer.
    credentials = client._request_signer._credentials
    secure = client.meta.endpoint_url.startswith("https:")
    if credentials is None or (secure and any(os.environ.get(name) for name in _OWN_CERTIFICATES)):
        return None
    from obstore.store import S3Store

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        until = datetime.now(UTC) + timedelta(seconds=_CREDENTIAL_SECONDS)
        keys = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        return keys | {"token": frozen.token, "expires_at": until}

    endpoint = s3_endpoint()
    address: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
    return S3Store(
        bucket,
        region=client.meta.region_name,
        virtual_hosted_style_request=not endpoint and "." not in bucket,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=10),
            "read_timeout": timedelta(seconds=READ_SECONDS),
            "timeout": timedelta(hours=1),  # of a whole body, however large
        },
        retry_config={"max_retries": 0},
        credential_provider=cast(Any, provide),  # its type is known to stubs only
        **address,
    )


_DENIED_CODES = {"403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_MISSING_CODES = {"404", "NoSuchKey", "NotFound", "NoSuchBucket"}
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
_UNMET_CODES = {"PreconditionFailed", "412"}
_NO_CONDITION_CODES = {"NotImplemented", "501"}
# The last is a conditional write that met another one under way: which of them counts is not known yet.
_BUSY_CODES = {
    "ConditionalRequestConflict",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "RequestTimeout",
}
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
    with _botocore_errors("s3:GetObject"):
        return s3_client().get_object(Bucket=bucket, Key=key)


class UnmetCondition(Exception):
    """The object that a conditional write expected is not there, or one that it did not expect is."""


class NoConditions(Exception):
    """The store does not know conditional writes."""


def put_object(bucket: str, key: str, data: bytes, **condition: str) -> str:
    """Write one object in one try, under a condition (IfNoneMatch or IfMatch); gives its etag.

    Raises:
        UnmetCondition: the condition does not hold.
        NoConditions: the store does not know conditional writes.
        ConnectionError: no whole answer came; the object may have been written.
        FetchError: the store refused it.
    """
    from botocore.exceptions import ClientError

    with _botocore_errors("s3:PutObject"):
        try:
            answer = s3_client().put_object(Bucket=bucket, Key=key, Body=data, **condition)
        except ClientError as err:
            code = str(err.response.get("Error", {}).get("Code"))
            if code in _UNMET_CODES or (code == "NoSuchKey" and "IfMatch" in condition):
                raise UnmetCondition(code) from None
            if code in _NO_CONDITION_CODES:
                raise NoConditions(code) from None
            raise
    return str(answer["ETag"]).strip('"')


def delete_object(bucket: str, key: str) -> None:
    """Delete one object in one try; an absent one is no error.

    Raises:
        ConnectionError: no whole answer came.
        FetchError: the store refused it.
    """
    with _botocore_errors("s3:DeleteObject"):
        s3_client().delete_object(Bucket=bucket, Key=key)


@contextmanager
def _botocore_errors(right: str) -> Iterator[None]:
    from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, HTTPClientError, ReadTimeoutError
    from botocore.exceptions import ConnectionError as NotConnected

    try:
        yield
    except ClientError as err:
        raise _refusal(err, right) from None
    except (ConnectTimeoutError, ReadTimeoutError) as err:
        raise _Passing("timeout", _one_line(err)) from None
    except (HTTPClientError, NotConnected) as err:
        raise _Passing("unavailable", _one_line(err)) from None
    except BotoCoreError as err:
        if type(err).__name__ in _NO_CREDENTIALS:
            raise FetchError("denied", f"there are no usable credentials ({_one_line(err)})") from None
        raise FetchError("unavailable", _one_line(err)) from None


def _refusal(err: Any, right: str) -> Exception:
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
        return FetchError("denied", f"the store refused the object ({code}); {right} is needed")
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

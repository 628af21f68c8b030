"""Reads plain objects of an S3 store through obstore, for a quarter of the processor time that botocore takes.

From: bucket and key. To: the object's bytes and etag, in one request.
Invariants: it says only what went well. Whatever fails here is asked again through botocore (core.s3_objects), which
knows every legal key, other regions' buckets, custom certificates and each error's meaning; when many reads in a row
have failed it rests for a while, so that a store that it cannot read costs few requests. Credentials are botocore's.
Source: https://developmentseed.org/obstore; measured with `python jobs/bench_s3.py`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from carray.core.aws import s3_endpoint
from carray.core.s3_client import READ_SECONDS, s3_client

__all__ = ["FastRefusal", "FastUnsure", "fast_read", "note_fast"]

FAILURES = 20
"""Reads that failed one after another, after which it rests."""
REST_SECONDS = 60.0
_CREDENTIAL_SECONDS = 600
"""How long obstore keeps credentials; botocore renews them by itself well before they expire."""
_OWN_CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


class FastUnsure(Exception):
    """Says that a read failed in a way that may pass."""


class FastRefusal(Exception):
    """Says that the store refused an object, or does not have it: botocore knows the words."""


def fast_read(bucket: str, key: str, admit: Callable[[int], None]) -> tuple[bytes, str] | None:
    """Give an object's bytes and etag; None where this way is not for it. `admit` is told the size before the bytes.

    Raises:
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
    except (FileNotFoundError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as err:
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
_lock = threading.Lock()
_stores: dict[str, tuple[Any, Any]] = {}


def _store(bucket: str) -> Any:
    """Give this process's store of a bucket; None where botocore has no credentials, or certificates of its own."""
    client = s3_client()
    with _lock:
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
    place: dict[str, Any] = {"endpoint": endpoint} if endpoint else {}
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
        **place,
    )

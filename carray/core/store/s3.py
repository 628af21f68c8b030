"""S3 through two clients: obstore for almost every object, botocore for what obstore cannot do.

Endpoint, region and credentials are AWS's own variables, profiles and roles; botocore finds them for both clients.
obstore reads an object for a quarter of botocore's processor time (results/s3.csv). botocore takes the keys
that obstore cannot spell (`a//b`, `a/`), buckets of other regions, certificates of one's own, deletions (obstore's are
POSTs) and forked processes, in which obstore hangs. Each client tries once, and `core.store.files.retry` tries again:
botocore's own modes share a quota among all requests of a client, and fail without a second try once that is used up.
Invariant: no address that carries credentials is used or repeated.
"""

from __future__ import annotations

import os
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from carray.core.errors import SettingsError
from carray.core.ray.internals import client_credentials

__all__ = [
    "POOL",
    "BotocoreBucket",
    "aws_environment",
    "bucket_client",
    "forget_client",
    "is_anonymous",
    "leave_to_botocore",
    "make_client",
    "s3_client",
    "s3_endpoint",
]

POOL = 64
"""Connections that one client keeps, and so requests that may be under way at once."""
READ_SECONDS = 20
"""Of silence, not of the whole body."""
_CREDENTIAL_SECONDS = 600
"""How long obstore keeps credentials; botocore renews them by itself well before they expire."""
_OWN_CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")

_lock = threading.RLock()
_clients: dict[Any, Any] = {}
_stores: dict[str, tuple[Any, Any]] = {}
"""By bucket: the botocore client whose credentials it uses, and obstore's store; None where botocore does all."""
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = bool(_stores)


os.register_at_fork(after_in_child=_note_fork)


def aws_environment() -> tuple[tuple[str, str], ...]:
    """Give this process's AWS variables, sorted: a client is good for one such environment. Secrets: never log them."""
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


def s3_endpoint() -> str | None:
    """Give the address of the store that the environment names; None for AWS's own.

    Raises:
        SettingsError: the address carries credentials, which errors and so tables would repeat.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint and "@" in endpoint:
        host = endpoint.rpartition("@")[2]
        raise SettingsError(
            f"AWS_ENDPOINT_URL names {host!r} with credentials before it; give them as AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile or a role."
        )
    return endpoint


def s3_client() -> Any:
    """Give this process's botocore client; it is safe to call from several threads."""
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


def bucket_client(bucket: str, key: str, *, deletes: bool = False) -> Any:
    """Give what reads and writes a key of a bucket: obstore's store, or a `BotocoreBucket` with the same methods."""
    client = s3_client()
    if deletes or _forked or not _takes(key):
        return BotocoreBucket(bucket, client)
    with _lock:
        made_with, store = _stores.get(bucket, (None, None))
        if made_with is not client:  # it is made anew in another environment, and for new credentials
            store = _make_store(bucket, client)
            _stores[bucket] = client, store
    return store or BotocoreBucket(bucket, client)


def is_anonymous() -> bool:
    """Say whether there are no credentials, so that requests are not signed."""
    return client_credentials(s3_client()) is None


def leave_to_botocore(bucket: str) -> bool:
    """Let botocore, which finds a bucket's region, do all from now on; says whether obstore did anything before."""
    with _lock:
        had_store = _stores.get(bucket, (None, None))[1] is not None
        _stores[bucket] = s3_client(), None
        return had_store


def _takes(key: str) -> bool:
    """Say whether obstore takes a key as it is: it drops slashes at the ends and refuses empty parts and `..`."""
    return key.isprintable() and not any(part in ("", ".", "..") for part in key.split("/"))


def _make_store(bucket: str, client: Any) -> Any:
    # botocore hands its credentials to nobody but its signer.
    credentials = client_credentials(client)
    secure = client.meta.endpoint_url.startswith("https:")
    if secure and any(os.environ.get(name) for name in _OWN_CERTIFICATES):
        return None
    from obstore.store import S3Store

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        until = datetime.now(UTC) + timedelta(seconds=_CREDENTIAL_SECONDS)
        keys = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        return keys | {"token": frozen.token, "expires_at": until}

    endpoint = s3_endpoint()
    # Without credentials it asks as anybody may, which is enough for a public bucket.
    address: dict[str, Any] = {"credential_provider": provide} if credentials else {"skip_signature": True}
    if endpoint:
        address["endpoint"] = endpoint
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
        **cast(Any, address),  # the provider's type is known to stubs only
    )


class BotocoreBucket:
    """A bucket with the methods of obstore's store that `core.store.objects` calls."""

    def __init__(self, bucket: str, client: Any) -> None:
        self._client, self._bucket = client, bucket

    def get(self, key: str, *, options: dict[str, Any] | None = None) -> _Answer:
        """Ask for an object, or for a range of it."""
        wanted = {}
        if options:
            span = options["range"]
            wanted["Range"] = f"bytes=-{span['suffix']}" if isinstance(span, dict) else f"bytes={span[0]}-{span[1] - 1}"
        return _Answer(self._client.get_object(Bucket=self._bucket, Key=key, **wanted))

    def head(self, key: str) -> dict[str, Any]:
        """Ask for an object's size, etag and time."""
        return _meta(self._client.head_object(Bucket=self._bucket, Key=key))

    def is_encrypted(self, key: str) -> bool:
        """Say whether a key service encrypted an object, so that its etag is no MD5; obstore hides that header."""
        answer = self._client.head_object(Bucket=self._bucket, Key=key)
        return str(answer.get("ServerSideEncryption", "")).startswith("aws:") or "SSECustomerAlgorithm" in answer

    def put(self, key: str, data: bytes, *, mode: Any = None, use_multipart: bool = False) -> dict[str, Any]:
        """Write an object in one request."""
        condition = (
            {"IfMatch": mode["e_tag"]} if isinstance(mode, dict) else {"IfNoneMatch": "*"} if mode == "create" else {}
        )
        answer = self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **condition)
        return {"e_tag": answer["ETag"]}

    def delete(self, key: str) -> None:
        """Delete an object; an absent one is no error."""
        self._client.delete_object(Bucket=self._bucket, Key=key)

    def list_with_delimiter(self, prefix: str) -> dict[str, Any]:
        """List the objects and folders of one folder."""
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=f"{prefix}/" if prefix else "", Delimiter="/"
        )
        found: dict[str, Any] = {"objects": [], "common_prefixes": []}
        for page in pages:
            found["objects"] += [{"path": entry["Key"]} for entry in page.get("Contents", [])]
            found["common_prefixes"] += [entry["Prefix"] for entry in page.get("CommonPrefixes", [])]
        return found


class _Answer:
    """An object that botocore has begun to read."""

    def __init__(self, response: Any) -> None:
        self.meta, self._body = _meta(response), response["Body"]

    def bytes(self) -> bytes:
        """Read the body."""
        with closing(self._body) as body:
            data: bytes = body.read()
            return data


def _meta(response: Any) -> dict[str, Any]:
    whole = str(response.get("ContentRange", "")).rpartition("/")[2]
    size = int(whole or response["ContentLength"])
    return {"size": size, "e_tag": response.get("ETag"), "last_modified": response.get("LastModified")}

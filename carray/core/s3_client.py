"""Makes the S3 client that reads images and lists buckets: botocore, which knows etags and every legal key.

Endpoint, region and credentials are AWS's own variables, profiles and roles. Invariants: one client a process and
environment; it tries once, since `storage.retry` is what waits and tries again: botocore's own modes share a quota
among all requests of a client, and once a busy store has used that up, they fail without a second try.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from carray.core.aws import aws_environment, s3_endpoint

__all__ = ["POOL", "forget_client", "make_client", "s3_client", "split_uri"]

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

"""Says what the environment tells a client of S3: its variables, and the store's address.

Invariants: credentials are looked at nowhere else, and no address that carries them is used or repeated.
"""

from __future__ import annotations

import os

from carray.core.errors import SettingsError

__all__ = ["aws_environment", "s3_endpoint"]


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

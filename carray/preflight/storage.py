"""Checks storage: whether folders and buckets can be listed, read and written with the present rights, and the clock.

Only with `write` is anything written: a small object under `_carray/`, or a hidden local file, which is deleted again.
No key, token or password is shown, only where the credentials come from. S3 refuses requests whose time is off by more
than 15 minutes (RequestTimeTooSkewed).
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from pathlib import Path
from typing import Any

from carray.core.errors import SettingsError
from carray.core.ray.internals import client_credentials
from carray.core.store.files import absolute, artifact_uri, is_s3, join
from carray.core.store.objects import delete_object, put_object, split_uri
from carray.core.store.s3 import BotocoreBucket, bucket_client, make_client
from carray.preflight.findings import Finding, judge, one_line

__all__ = ["SECONDS", "check_uri"]

SECONDS = 25.0
"""Time limit of one URI's checks."""
_CONNECT_SECONDS, _READ_SECONDS = 4, 6
SKEW_WARN_SECONDS, SKEW_FAIL_SECONDS = 60, 900
_LOOKED_THROUGH = 10_000
"""Most local files to look through for one to read."""
_PROBE = ".carray-doctor-"
"""Prefix of a probe's file name."""


def check_uri(uri: str, *, write: bool) -> Iterator[Finding]:
    """Check a URI: list and read it; with `write`, write a probe there, read it back and delete it.

    Raises:
        SettingsError: its scheme is neither s3 nor a local path.
    """
    title = "writes" if write else "reads"
    uri = absolute(uri).rstrip("/") or "/"
    if is_s3(uri):
        yield from _Bucket(uri).check(title, write=write)
    else:
        yield _check_local(Path(uri), title, write=write)


def _check_local(path: Path, title: str, *, write: bool) -> Finding:
    if not write:
        return _read_local(path, title)
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=_PROBE) as file:
            file.write(b"carray doctor")
            file.flush()
            os.fsync(file.fileno())
            free = shutil.disk_usage(there).free
    except OSError as err:
        remedy = "make it writable for this user, or give another place"
        return judge(title, f"{path}: {there} cannot be written ({err.strerror})", fail=remedy, storage=True)
    made = "" if there == path else ", which will be created"
    return judge(title, f"{path}{made}: written and deleted, {free / 1e9:,.1f} GB free", storage=True)


def _read_local(path: Path, title: str) -> Finding:
    try:
        files = (path,) if path.is_file() else islice(path.rglob("*"), _LOOKED_THROUGH)
        if not path.exists():
            raise FileNotFoundError(2, "it does not exist")
        # Checks run side by side: another one's probe is skipped.
        file = next((one for one in files if one.is_file() and not one.name.startswith(_PROBE)), None)
        if file is None:
            return judge(title, f"{path}: no file in it", warn="check its spelling", storage=True)
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as err:
        remedy = "check its spelling and this user's rights"
        return judge(title, f"{path}: cannot be read ({err.strerror or err})", fail=remedy, storage=True)
    return judge(title, f"{path}: listed and read", storage=True)


class _Denied(Exception):
    """A store refused a request or cannot be reached; with the remedy, and the store's code if it answered."""

    def __init__(self, seen: str, remedy: str, code: str = "") -> None:
        self.seen, self.remedy, self.code = seen, remedy, code
        super().__init__(seen)


@dataclass
class _Bucket:
    uri: str
    client: Any = None
    skew_seconds: float | None = None
    done: list[str] = field(default_factory=list)
    """What worked, in words."""

    def check(self, title: str, *, write: bool) -> Iterator[Finding]:
        self.bucket, self.prefix = split_uri(self.uri)
        try:
            self.client = _connect()
            empty = (
                "" if (self._write() if write else self._read()) else "check its spelling; s3:GetObject was not tested"
            )
            yield judge(title, f"{self.uri}: {', '.join(self.done)} ({self._about()})", warn=empty, storage=True)
        except _Denied as err:
            before = f"{', '.join(self.done)}, but " if self.done else ""
            yield judge(title, f"{self.uri}: {before}{err.seen} ({self._about()})", fail=err.remedy, storage=True)
        if self.skew_seconds is not None:
            yield self._clock(self.skew_seconds)

    def _read(self) -> bool:
        """List the prefix, and read an object below it; returns whether there was one."""
        folder = f"{self.prefix}/" if self.prefix else ""
        keys = [key for key in self._list(folder) if key != folder]
        # The URI may be one object, such as a manifest, and not a prefix.
        keys = keys or [key for key in self._list(self.prefix) if key == self.prefix]
        self.done.append("listed")
        if not keys:
            self.done.append("nothing there to read")
            return False
        self._ask("s3:GetObject", "get_object", Key=keys[0], Range="bytes=0-0")
        self.done += ["read", self._fast_way(keys[0])]
        return True

    def _list(self, prefix: str) -> list[str]:
        found = self._ask("s3:ListBucket", "list_objects_v2", Prefix=prefix, MaxKeys=10)
        return [entry["Key"] for entry in found.get("Contents", [])]

    def _fast_way(self, key: str) -> str:
        """Tell which client will read the images."""
        if isinstance(bucket_client(self.bucket, key), BotocoreBucket):
            return "through botocore alone, at four times the processor time"
        return "through obstore"

    def _write(self) -> bool:
        """Write a probe, read it back and delete it; then write another as a table."""
        key = join(f"{self.prefix}/_carray" if self.prefix else "_carray", f"doctor-{secrets.token_hex(6)}")
        self._list(self.prefix)
        self._ask("s3:PutObject", "put_object", Key=key, Body=b"carray doctor")
        self.done.append("written")
        try:
            self._ask("s3:GetObject", "get_object", Key=key)["Body"].read()
            self.done.append("read back")
            kept = self._keeps_conditions(key)
        finally:
            self._ask("s3:DeleteObject", "delete_object", Key=key)
        self.done += ["deleted", f"conditional writes {'kept' if kept else 'ignored'}"]
        self._write_as_artifact()
        return True

    def _keeps_conditions(self, key: str) -> bool:
        """Test whether the store honours a write with If-None-Match."""
        try:
            self._ask("s3:PutObject", "put_object", Key=key, Body=b"carray doctor", IfNoneMatch="*")
        except _Denied as err:
            return err.code in ("PreconditionFailed", "412")
        return False

    def _write_as_artifact(self) -> None:
        """Write a probe as tables are written."""
        try:
            uri = artifact_uri(join(self.uri, "_carray", f"doctor-{secrets.token_hex(6)}"))
            put_object(uri, b"carray doctor")
            delete_object(uri)
        except SettingsError as err:  # an empty part of a key, where no artifact can lie
            raise _Denied(str(err).rstrip("."), "give another place") from None
        except OSError as err:
            remedy = "check the endpoint's certificate and AWS_CA_BUNDLE, and give obstore the same rights"
            raise _Denied(f"obstore, which writes the tables, is refused ({one_line(err)})", remedy) from None

    def _ask(self, right: str, operation: str, **wanted: Any) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = getattr(self.client, operation)(Bucket=self.bucket, **wanted)
        except ClientError as err:
            self._note_time(err.response)
            raise _refusal(err.response, right) from None
        except BotoCoreError as err:
            raise _failure(err) from None
        self._note_time(answer)
        return answer

    def _note_time(self, answer: Any) -> None:
        said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if said:
            self.skew_seconds = (datetime.now(UTC) - parsedate_to_datetime(said)).total_seconds()

    def _about(self) -> str:
        if self.client is None:
            return "no client"
        meta, credentials = self.client.meta, client_credentials(self.client)
        method = getattr(credentials, "method", None)
        source = _SOURCES.get(method, method) if credentials is not None else "no credentials"
        return f"{one_line(meta.endpoint_url)}, region {meta.region_name}, {source}"

    def _clock(self, skew: float) -> Finding:
        off, store = abs(skew), one_line(self.client.meta.endpoint_url)
        if off <= SKEW_WARN_SECONDS:
            return judge("clock", f"within {max(1.0, off):,.0f} s of {store}")
        remedy = "set it right (chrony, systemd-timesyncd): S3 refuses requests that are 15 minutes off"
        seen = f"{off:,.0f} s {'ahead of' if skew > 0 else 'behind'} {store}"
        return judge("clock", seen, warn=remedy, fail=remedy if off > SKEW_FAIL_SECONDS else "")


_SOURCES: dict[Any, str] = {
    "env": "keys of the environment",
    "shared-credentials-file": "keys of the credentials file",
    "config-file": "keys of the config file",
    "iam-role": "the instance's role",
    "container-role": "the container's role",
    "assume-role": "an assumed role",
    "assume-role-with-web-identity": "the service account's role",
    "sso": "a single sign-on",
    "custom-process": "keys of a credential process",
}
"""Botocore's names for the sources of credentials, in words."""


def _connect() -> Any:
    from botocore.exceptions import BotoCoreError

    try:
        return make_client(connect_timeout=_CONNECT_SECONDS, read_timeout=_READ_SECONDS)
    except SettingsError as err:  # an endpoint with credentials in it
        seen, _, remedy = str(err).partition("; ")
        raise _Denied(seen, remedy) from None
    except (BotoCoreError, ValueError) as err:  # a profile that is not there, an endpoint that is no URL
        raise _Denied(one_line(err), "correct AWS_PROFILE, AWS_REGION or AWS_ENDPOINT_URL") from None


def _failure(err: Exception) -> _Denied:
    kind = type(err).__name__
    if "Credential" in kind or "Token" in kind:
        remedy = "give this machine a role, or set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    elif "SSL" in kind:
        remedy = "name the store's certificates in AWS_CA_BUNDLE"
    else:
        remedy = "check AWS_ENDPOINT_URL, proxies and the network"
    return _Denied(one_line(err), remedy)


def _refusal(answer: Any, right: str) -> _Denied:
    code = str(answer.get("Error", {}).get("Code", "unknown"))
    region = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    remedy = _REMEDIES.get(code)
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        remedy = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's"
    what = {"s3:ListBucket": "listing", "s3:GetObject": "reading", "s3:PutObject": "writing"}.get(right, "deleting")
    return _Denied(f"{what} is refused ({code})", remedy or f"allow {right} to these credentials", code)


_REMEDIES = {
    "NoSuchBucket": "check the bucket's name and the endpoint",
    "404": "check the bucket's name and the endpoint",
    "InvalidAccessKeyId": "the key is unknown to this store: check it, and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret does not belong to the key: set AWS_SECRET_ACCESS_KEY again",
    "ExpiredToken": "the credentials have expired: renew them",
    "InvalidToken": "the session token is not valid here: renew the credentials",
    "RequestTimeTooSkewed": "set the clock right",
    "SlowDown": "the store is busy: ask again",
}

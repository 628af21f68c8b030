"""Lists and reads images by key: S3 through botocore, which knows etags and every legal key, and local files.

From: a folder, an `s3://` prefix. To: `ListedImage`s, and the bytes of one image with the etag they were read under.
Invariants: listing order is the byte order of keys; a key with `//` or a trailing `/` is a key like any other; a local
name that is not UTF-8 is percent-escaped and marked, since Arrow refuses it. Transient failures are tried again, with
jitter, by botocore's standard mode and, once a body has begun, by `storage.retry`; what outlasts them is a
`FetchError`.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from carray.core.errors import FetchError, SettingsError, StorageError
from carray.core.storage import TRIES, absolute, aws_environment, is_s3, retry

__all__ = ["IMAGE_SUFFIXES", "FetchedImage", "ListedImage", "fetch_image", "is_image_key", "key_suffix", "list_keys"]

IMAGE_SUFFIXES = ("jpg", "jpeg", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
"""What counts as an image by its name, in any case; `--all-files` takes everything."""

_DENIED_CODES = {"403", "AccessDenied", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
# botocore speaks of these without asking the store.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")
_MISSING_CODES = {"404", "NoSuchKey", "NotFound", "NoSuchBucket"}


@dataclass(frozen=True, slots=True)
class ListedImage:
    """Is one key of a listing. `escaped` says that `uri` percent-escapes a local name that is not UTF-8."""

    uri: str
    size_bytes: int
    etag: str | None
    escaped: bool = False


@dataclass(frozen=True, slots=True)
class FetchedImage:
    """Holds one image's bytes and the etag of the very read that gave them."""

    data: bytes
    etag: str | None


def is_image_key(uri: str) -> bool:
    """Say whether a key's suffix is an image's; a trailing slash, legal on S3, hides none."""
    return key_suffix(uri) in IMAGE_SUFFIXES


def key_suffix(uri: str) -> str:
    """Give what follows the last dot of a key's last name, in lower case; empty when there is no dot."""
    _, dot, suffix = uri.rstrip("/").rsplit("/", 1)[-1].rpartition(".")
    return suffix.lower() if dot else ""


def list_keys(source: str) -> Iterator[ListedImage]:
    """List every file below a folder or prefix, in byte order of keys.

    Raises:
        StorageError: the bucket or folder does not exist or may not be listed.
    """
    source = absolute(source)
    return _list_s3(source) if is_s3(source) else _list_local(source)


def fetch_image(uri: str, *, escaped: bool = False) -> FetchedImage:
    """Read one image's bytes in one request.

    Raises:
        FetchError: code not_found, denied, timeout or unavailable.
    """
    return _fetch_s3(uri) if is_s3(uri) else _fetch_local(uri, escaped=escaped)


def _list_local(source: str) -> Iterator[ListedImage]:
    root = os.fsencode(source)
    if not os.path.isdir(root):
        raise StorageError(f"{source} is not a folder; give a folder, an s3:// prefix, a manifest or a table of URIs.")
    for path, found in sorted(_walk(root), key=lambda entry: entry[0]):
        try:
            yield ListedImage(path.decode(), found.st_size, _local_etag(found))
        except UnicodeDecodeError:
            yield ListedImage(_escape(path), found.st_size, _local_etag(found), escaped=True)


def _walk(root: bytes) -> Iterator[tuple[bytes, os.stat_result]]:
    # A link to a folder's own ancestor would lead round in circles; two links to one folder are two folders.
    above: dict[bytes, frozenset[tuple[int, int]]] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_refuse_folder):
        found = os.stat(folder)
        here = (found.st_dev, found.st_ino)
        ancestors = above.get(os.path.dirname(folder), frozenset())
        if here in ancestors:
            folders.clear()
            continue
        above[folder] = ancestors | {here}
        for name in names:
            path = os.path.join(folder, name)
            try:
                yield path, os.stat(path)
            except OSError:
                # A dangling link is a key that cannot be fetched: it must become a row, not vanish.
                yield path, os.lstat(path)


def _refuse_folder(err: OSError) -> None:
    raise StorageError(
        f"the folder {os.fsdecode(err.filename)!r} cannot be listed ({err.strerror}), so its images would be missed; "
        "make it readable or move it away."
    ) from err


def _escape(path: bytes) -> str:
    text = path.replace(b"%", b"%25").decode(errors="surrogateescape")
    return "".join(f"%{ord(char) - 0xDC00:02X}" if "\udc80" <= char <= "\udcff" else char for char in text)


def _local_etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _fetch_local(uri: str, *, escaped: bool) -> FetchedImage:
    try:
        path = unquote_to_bytes(uri) if escaped else os.fsencode(uri)
        # Without NONBLOCK a named pipe would hold its worker for ever.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FetchError("denied", "the name is not of a regular file")
            return FetchedImage(file.read(), _local_etag(found))
    except FileNotFoundError:
        raise FetchError("not_found", "the file does not exist") from None
    except (PermissionError, IsADirectoryError) as err:
        raise FetchError("denied", f"the file may not be read ({err.strerror})") from None
    except (OSError, ValueError) as err:
        raise FetchError("unavailable", f"the file could not be read ({err})") from None


_client_lock = threading.Lock()
_clients: dict[Any, Any] = {}


def _client() -> Any:
    # One client a process and environment: botocore's are thread-safe, and 64 pooled connections serve that many
    # threads. A forked child must not share its parent's sockets, hence the pid.
    key = (os.getpid(), aws_environment())
    with _client_lock:
        if key not in _clients:
            _clients.clear()
            _clients[key] = _make_client()
        return _clients[key]


def _make_client() -> Any:
    import botocore.session
    from botocore.config import Config

    session = botocore.session.get_session()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config = Config(
        max_pool_connections=64,
        retries={"mode": "standard", "total_max_attempts": TRIES},
        connect_timeout=10,
        read_timeout=60,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"} if endpoint else None,
    )
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
    return session.create_client("s3", config=config, region_name=region)


def _split(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def _list_s3(source: str) -> Iterator[ListedImage]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, prefix = _split(source)
    if prefix and not prefix.endswith("/"):
        prefix += "/"
    try:
        for page in _client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                if entry["Key"] == prefix:  # the folder's own placeholder, not an object in it
                    continue
                yield ListedImage(f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["ETag"].strip('"'))
    except (ClientError, BotoCoreError) as err:
        raise StorageError(
            f"listing {source} failed after up to {TRIES} tries ({_one_line(err)}); check the bucket's name, the "
            "credentials at hand and that they allow s3:ListBucket."
        ) from err


def _fetch_s3(uri: str) -> FetchedImage:
    from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, ReadTimeoutError

    bucket, key = _split(uri)
    if not key:
        raise SettingsError(f"{uri!r} names a bucket, not an image; write s3://bucket/key.")

    def read() -> FetchedImage:
        response = _client().get_object(Bucket=bucket, Key=key)  # botocore tries again until the headers are there
        try:
            return FetchedImage(response["Body"].read(), response["ETag"].strip('"'))
        except (BotoCoreError, OSError) as err:  # but not once the body has begun, so that is for us
            raise ConnectionError(_one_line(err)) from None

    try:
        return retry(read, what=f"reading {uri}")
    except ClientError as err:
        raise _as_fetch_error(err) from None
    except (ConnectTimeoutError, ReadTimeoutError) as err:
        raise FetchError("timeout", f"no answer after {TRIES} tries ({_one_line(err)})") from None
    except BotoCoreError as err:
        if type(err).__name__ in _NO_CREDENTIALS:
            raise FetchError("denied", f"there are no usable credentials ({_one_line(err)})") from None
        raise FetchError("unavailable", f"no answer after {TRIES} tries ({_one_line(err)})") from None
    except StorageError as err:
        raise FetchError("unavailable", f"the object's bytes broke off ({_one_line(err)})") from None


def _as_fetch_error(err: Any) -> FetchError:
    code = str(err.response.get("Error", {}).get("Code", "unknown"))
    if code in _MISSING_CODES:
        return FetchError("not_found", f"the object does not exist ({code})")
    if code in _DENIED_CODES:
        return FetchError("denied", f"the store refused the object ({code}); s3:GetObject is needed")
    return FetchError("unavailable", f"the store answered {code} after {TRIES} tries")


def _one_line(err: Exception) -> str:
    return " ".join(str(err).split())

"""Asks an object store for one page of a listing, and reads it fast: up to 1,000 keys an answer of ListObjectsV2.

From: bucket, prefix, and the key or token to go on from. To: `KeyPage`.
Invariants: a page is whole or an error; what is transient is tried again by `storage.retry`. botocore signs the request
and sends it, with its proxies and certificates, but its XML parser takes 20 ms a page, where this takes 1.
"""

from __future__ import annotations

import html
import operator
import os
import re
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

from carray.core.errors import StorageError
from carray.core.s3_client import POOL, make_client, split_uri
from carray.core.storage import TRIES, retry

__all__ = ["KeyPage", "PageReader"]

_KEY = re.compile(r"<Key>([^<]*)</Key>")
_ETAG = re.compile(r"<ETag>(?:&quot;|&#34;|\")?([^<&\"]*)")
_SIZE = re.compile(r"<Size>(\d+)</Size>")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_TOKEN = re.compile(r"<NextContinuationToken>([^<]*)</NextContinuationToken>")
_REGION = "x-amz-bucket-region"


@dataclass(frozen=True, slots=True)
class KeyPage:
    """Holds one answer: keys as they are named in the bucket, and the token of the next page, if there is one."""

    keys: list[str]
    etags: list[str]
    sizes: list[str]
    token: str | None

    @property
    def in_order(self) -> bool:
        """Say whether the keys ascend by their UTF-8 bytes, which is also the order of their code points."""
        return all(map(operator.lt, self.keys, self.keys[1:]))


class PageReader:
    """Reads pages of one bucket and prefix; many threads may call it at once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.bucket, self.prefix = split_uri(source)
        if self.prefix and not self.prefix.endswith("/"):
            self.prefix += "/"
        self._lock = threading.Lock()
        self._client: Any = None
        self._session: Any = None

    def read(self, *, after: str = "", token: str | None = None, limit: int | None = None) -> KeyPage:
        """Read the page of the keys beyond `after`, or the one that a token stands for; `limit` is its most keys.

        Raises:
            StorageError: the bucket does not exist or may not be listed, or the store failed on every try.
        """
        from botocore.exceptions import BotoCoreError

        wanted: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix, "EncodingType": "url"}
        wanted |= {"ContinuationToken": token} if token else {"StartAfter": after} if after else {}
        wanted |= {"MaxKeys": limit} if limit else {}
        try:
            body = retry(lambda: self._ask(wanted), what=f"listing {self.source}")
        except StorageError as err:
            raise self._failure(err.__cause__ or err) from err
        except BotoCoreError as err:  # no credentials, a region or an endpoint that cannot be
            raise self._failure(err) from err
        page = _parse(body, self.source)
        if self.prefix and page.keys[:1] == [self.prefix]:  # the folder's own placeholder, not an object in it
            return KeyPage(page.keys[1:], page.etags[1:], page.sizes[1:], page.token)
        return page

    def _failure(self, err: BaseException) -> StorageError:
        return StorageError(
            f"listing {self.source} failed after up to {TRIES} tries ({' '.join(str(err).split())}); check the "
            "bucket's name, the credentials at hand and that they allow s3:ListBucket."
        )

    def _ask(self, wanted: dict[str, Any]) -> bytes:
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import ConnectionError as NotConnected
        from botocore.exceptions import HTTPClientError

        client, session = self._connect()
        url = client.generate_presigned_url("list_objects_v2", Params=wanted)
        try:
            answer = session.send(AWSRequest(method="GET", url=url).prepare())
            body: bytes = answer.content
        except (HTTPClientError, NotConnected) as err:  # resets, timeouts, names that do not resolve just now
            raise ConnectionError(str(err)) from None
        if answer.status_code == 200:
            return body
        code = (_CODE.search(body.decode(errors="replace")) or [None, answer.status_code])[1]
        region = answer.headers.get(_REGION)
        if region and region != client.meta.region_name:
            self._connect(region)
            raise ConnectionError(f"the bucket lies in {region}")  # so that `retry` asks there
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise ConnectionError(f"the store answered {code}")
        raise PermissionError(f"the store answered {code}")

    def _connect(self, region: str | None = None) -> tuple[Any, Any]:
        with self._lock:
            if self._client is None or region is not None:
                # Without this the store's older signature would be used for a URL, which newer regions refuse.
                self._client = make_client(region=region, signature_version="s3v4")
            self._session = self._session or _make_session(self._client.meta.endpoint_url)
            return self._client, self._session


def _make_session(endpoint: str) -> Any:
    import botocore.session
    from botocore.httpsession import URLLib3Session
    from botocore.utils import get_environ_proxies

    bundle = botocore.session.get_session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    return URLLib3Session(
        verify=bundle or True, proxies=get_environ_proxies(endpoint), timeout=(10, 60), max_pool_connections=POOL
    )


def _parse(body: bytes, source: str) -> KeyPage:
    text = body.decode(errors="replace")
    keys, etags, sizes = _KEY.findall(text), _ETAG.findall(text), _SIZE.findall(text)
    if "ListBucketResult" not in text or not len(keys) == len(etags) == len(sizes) == text.count("<Contents>"):
        raise StorageError(
            f"listing {source} gave a page of {text.count('<Contents>')} entries with {len(keys)} keys, {len(etags)} "
            f"etags and {len(sizes)} sizes, which is no answer of ListObjectsV2 ({text[:100]!r}); give an inventory or "
            "a table of URIs."
        )
    everything = "".join(keys)
    if "&" in everything:
        keys = [html.unescape(key) for key in keys]
    if ("%" in everything or "+" in everything) and "<EncodingType>url</EncodingType>" in text:
        keys = [unquote_plus(key) if "%" in key or "+" in key else key for key in keys]
    token = _TOKEN.search(text)
    if token is None and "<IsTruncated>true</IsTruncated>" in text:
        raise StorageError(f"listing {source} gave a page that is not the last, without the token of the next one.")
    return KeyPage(keys, etags, sizes, html.unescape(token[1]) if token else None)

"""Lists a bucket's flat prefix by several threads, each in a range of keys of its own that idle ones cut in two.

From: a prefix, and the ranges of it that are wanted. To: `Piece`s, handed over by the threads as they come.
Invariants: the pieces of the wanted ranges cover them exactly, whatever the keys look like; within a range they come
in order, from one thread. A range is cut only ahead of where its own thread is, and within a range the store's own
tokens lead from page to page, so a store that cannot begin after a key is still listed, by one thread. Keys compare by
code point, which is the order of their UTF-8 bytes; a cut is valid UTF-8 and holds no control character that the key
before it does not hold. A page (up to 1,000 keys of ListObjectsV2) is whole or an error. Memory is bounded by the
threads.
Cost: results/list.csv; a listing of up to `SPLIT_AFTER_PAGES` pages costs no request more than its pages. botocore
signs and sends a request, but its XML parser takes 20 ms a page, where the one here takes 1.
"""

from __future__ import annotations

import html
import operator
import os
import re
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa

from carray.core.errors import StorageError
from carray.core.ray.internals import environment_proxies
from carray.core.store.files import TRIES, retry
from carray.core.store.objects import split_uri
from carray.core.store.s3 import POOL, make_client

__all__ = ["PAGE_SCHEMA", "WHOLE", "Gap", "Piece", "Take", "find_split", "list_ranges", "successor"]

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

    bundle = botocore.session.get_session().get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
    return URLLib3Session(
        verify=bundle or True, proxies=environment_proxies(endpoint), timeout=(10, 60), max_pool_connections=POOL
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


Probe = Callable[[str, "str | None"], bool]
"""Says whether there is a key in (after, upto]."""

_MOST_CUTS = 8
"""Cuts tried at most, each at half of what is left: 1/256 of a range is not worth another thread."""
_AFTER_CLASSES = (0x3A, 0x5B, 0x7B, 0x7F)
"""What follows digits, capitals, small letters and ASCII: most keys have one of these classes in one place."""
_SURROGATES = range(0xD800, 0xE000)


def find_split(position: str, bound: str | None, has_key: Probe) -> tuple[str | None, str | None]:
    """Find a cut in (position, bound] with keys beyond it; gives the cut, if any, and the bound as it is now known.

    First, how far do all keys to come begin as `position` does (by bisection over its length); then, at the first
    character in which they differ, what lies in the middle.
    """
    low, high = _shared(position, bound), len(position)
    if bound is None or bound == successor(position[: low + 1]):
        while low < high:
            length = (low + high + 1) // 2
            edge = successor(position[:length])
            if edge is None or edge == bound or not has_key(edge, bound):
                low, bound = length, edge or bound
            else:
                high = length - 1
    for _ in range(_MOST_CUTS):
        cut = _middle(position, bound)
        if cut is None or has_key(cut, bound):
            return cut, bound
        bound = cut
    return None, bound


def successor(prefix: str) -> str | None:
    """Give the least string above all that begin with a prefix; None when there is none."""
    for i in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[i]) + 1
        if code <= 0x10FFFF:
            return prefix[:i] + chr(_SURROGATES.stop if code in _SURROGATES else code)
    return None


def estimate_remaining(first: str, position: str, bound: str | None, keys: int) -> float:
    """Estimate how many keys lie in (position, bound], from the `keys` in [first, position]."""
    if bound is None:
        return float("inf")
    skip = _shared(first, bound)
    start, now, end = (_number(text[skip : skip + 12]) for text in (first, position, bound))
    return keys * (end - now) / (now - start) if now > start else float("inf")


def _number(text: str) -> int:
    return sum(min(ord(char), 127) << 7 * (11 - i) for i, char in enumerate(text))


def _shared(position: str, bound: str | None) -> int:
    pairs = zip(position, bound or "", strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(position), len(bound or "")))


def _middle(position: str, bound: str | None) -> str | None:
    i = _shared(position, bound)
    low = _code(position, i)
    high = _code(bound, i) if bound is not None else 0x110000
    if high - low == 1 and bound is not None:
        if len(bound) > i + 1:
            return bound[: i + 1]  # between the last keys that begin as position does and the first that do not
        i, high = i + 1, 0x110000
        low = _code(position, i)
    code = next((edge for edge in _AFTER_CLASSES if low < edge < high), (low + high) // 2)
    if code in _SURROGATES:
        code = _SURROGATES.start - 1
    return position[:i] + chr(code) if low < code < high else None


def _code(text: str, i: int) -> int:
    return ord(text[i]) if i < len(text) else 0x1F


PAGE_SCHEMA = pa.schema(
    [("uri", pa.string()), ("escaped", pa.bool_()), ("etag", pa.string()), ("size_bytes", pa.int64())]
)
SPLIT_AFTER_PAGES = 4
WORTH_KEYS = 4_000
"""Keys that a range is thought to have left, at least, for a cut to pay."""

Gap = tuple[str, "str | None"]
"""The keys above the first and up to the second, which is None for the end."""
WHOLE: tuple[Gap, ...] = (("", None),)


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of one range: the keys above `after`, up to `upto` (None: to the end)."""

    range_number: int
    batch: pa.RecordBatch
    """Columns of PAGE_SCHEMA, and of a table perhaps others."""
    keys: Sequence[str]
    """Where each row stands: what `after` and `upto` of some piece may be."""
    after: str
    upto: str | None
    last: bool
    """Whether the range ends with it."""
    ordered: bool = True
    """Whether the source has an order at all; without one, `after` and `upto` say nothing."""


Take = Callable[[Piece], None]


@dataclass(eq=False)
class _Range:
    number: int
    position: str
    end: str | None
    bound: str | None
    """No key is known between it and `end`."""
    token: str | None = None
    first: str = ""
    keys: int = 0
    pages: int = 0
    failures: int = 0
    try_at_pages: int = 1
    """Pages that it must have before a cut is tried (again)."""
    probed: bool = False


class _Refused(Exception):
    """The store does not begin after the key that it was given."""


def list_ranges(source: str, take: Take, *, gaps: Sequence[Gap], threads: int, stop: threading.Event) -> None:
    """List the given ranges of an s3:// prefix to their end, or until `stop` is set; `take` is called by many threads.

    Raises:
        StorageError: the bucket does not exist or may not be listed, or lists keys in an order that loses some.
    """
    _Lister(source, take, gaps, stop).run(threads)


@dataclass
class _Lister:
    source: str
    take: Take
    gaps: Sequence[Gap]
    stop: threading.Event
    change: threading.Condition = field(default_factory=threading.Condition)
    waiting: deque[_Range] = field(default_factory=deque)
    active: list[_Range] = field(default_factory=list)
    ranges: int = 0
    pages: int = 0
    splits: bool = True
    ordered: bool = True
    error: BaseException | None = None

    def run(self, threads: int) -> None:
        self.reader = PageReader(self.source)
        self.root = f"s3://{self.reader.bucket}/"
        for after, upto in self.gaps:
            self._add(after, upto, upto or successor(self.reader.prefix))
        workers = [threading.Thread(target=self._work, name=f"lister-{i}", daemon=True) for i in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.error is not None:
            raise self.error

    def _add(self, after: str, upto: str | None, bound: str | None) -> None:
        self.waiting.append(_Range(self.ranges, after, upto, bound))
        self.ranges += 1

    def _work(self) -> None:
        try:
            while (mine := self._next()) is not None:
                while not self._over() and self._list_page(mine):
                    pass
        except BaseException as err:
            self.error = self.error or err
        with self.change:
            self.change.notify_all()

    def _over(self) -> bool:
        return self.stop.is_set() or self.error is not None

    def _next(self) -> _Range | None:
        while not self._over():
            with self.change:
                if self.waiting:
                    self.active.append(self.waiting.popleft())
                    return self.active[-1]
                if not self.active:
                    return None
                victim = self._victim()
                if victim is None:
                    self.change.wait(timeout=0.2)
                    continue
                victim.probed = True
            self._split(victim)
        return None

    def _victim(self) -> _Range | None:
        if not self.splits or self.pages < SPLIT_AFTER_PAGES:
            return None
        free = [one for one in self.active if not one.probed and one.pages >= one.try_at_pages]
        sized = [(estimate_remaining(one.first, one.position, one.bound, one.keys), one) for one in free]
        best = max(sized, key=lambda pair: pair[0], default=None)
        return best[1] if best and best[0] >= WORTH_KEYS else None

    def _split(self, victim: _Range) -> None:
        try:
            cut, bound = find_split(victim.position, victim.bound, self._has_key)
        except _Refused:
            self.splits, cut, bound = False, None, victim.bound
        with self.change:
            victim.probed = False
            victim.try_at_pages = victim.pages + 1
            if cut is None or cut <= victim.position or victim not in self.active or not self.splits:
                victim.failures += 1
                victim.try_at_pages = victim.pages + 2**victim.failures
                victim.bound = bound
                return
            self._add(cut, victim.end, bound)
            victim.end = victim.bound = cut
            self.change.notify_all()

    def _has_key(self, after: str, upto: str | None) -> bool:
        page = self.reader.read(after=after, limit=1)
        if self._over() or (page.keys and page.keys[0] <= after) or (page.token and not page.keys):
            raise _Refused
        return bool(page.keys) and (upto is None or page.keys[0] <= upto)

    def _list_page(self, mine: _Range) -> bool:
        """List a range's next page and hand it over; says whether there is more."""
        page = self.reader.read(after=mine.position, token=mine.token)
        with self.change:
            self._check_order(mine, page)
            count, after = len(page.keys), mine.position
            last = page.token is None
            if mine.end is not None and page.keys and page.keys[-1] >= mine.end:
                count, last = bisect_right(page.keys, mine.end), True
            if count:
                mine.first, mine.position = mine.first or page.keys[0], page.keys[count - 1]
            mine.keys, mine.token = mine.keys + count, page.token
            mine.pages, self.pages = mine.pages + 1, self.pages + 1
            upto = mine.end if last else mine.position
            if last:
                self.active.remove(mine)
            self.change.notify_all()
        keys = page.keys[:count]
        self.take(Piece(mine.number, self._batch(page, keys), keys, after, upto, last, self.ordered))
        return not last

    def _check_order(self, mine: _Range, page: KeyPage) -> None:
        if not self.ordered or (page.in_order and (not page.keys or page.keys[0] > mine.position)):
            return
        if self.ranges > 1 or tuple(self.gaps) != WHOLE:
            raise StorageError(
                f"listing {self.source} gave {page.keys[0]!r} after {mine.position!r}, so the store lists keys in no "
                "order or not from where it is asked to; give an inventory or a table of URIs."
            )
        self.splits = self.ordered = False  # one thread and the store's tokens still list everything

    def _batch(self, page: KeyPage, keys: list[str]) -> pa.RecordBatch:
        count = len(keys)
        uris = pa.array([self.root + key for key in keys], pa.string())
        sizes = pa.array(page.sizes[:count], pa.string()).cast(pa.int64())
        etags = pa.array(page.etags[:count], pa.string())
        return pa.record_batch([uris, pa.repeat(False, count), etags, sizes], schema=PAGE_SCHEMA)

"""An S3 server on loopback that only lists: a made-up bucket of any number of keys, computed from their numbers.

Each layout makes ascending keys, so a page is a slice of numbers, formatted at once: a few thousand pages a second. It
runs in a process of its own, so it takes nothing from the client's.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import re
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, quote_plus, urlsplit

__all__ = ["LAYOUTS", "Bucket", "Layout", "ListServer", "list_environment", "main", "read_stats", "start_lister"]

PAGE_KEYS = 1_000
_ENTRY = (
    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    "<ETag>&quot;%032x&quot;</ETag><Size>%d</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


@dataclass(frozen=True)
class Layout:
    """A form of keys: a format, and the numbers with which the n-th of `total` keys fills it."""

    form: str
    numbers: Callable[[int, int], tuple[int, ...]]


def _uuid(n: int, total: int) -> tuple[int, ...]:
    spread, mixed = n * 2**32 // total, n * 0x9E3779B97F4A7C15 % 2**64
    return spread, n * 2**48 // total % 2**16, mixed % 2**16, n


def _date(n: int, total: int) -> tuple[int, ...]:
    day = n * 3_000 // total
    return 2015 + day // 360, day // 30 % 12 + 1, day % 30 + 1, n


LAYOUTS = {
    "flat": Layout("photos/%012d.jpg", lambda n, total: (n,)),
    "uuid": Layout("%08x-%04x-%04x-%012x.jpg", _uuid),
    "dated": Layout("cars/%04d/%02d/%02d/img %09d+.jpg", _date),
    "unicode": Layout("ü/<車> & %d%%/%05d\n%06d.jpg", lambda n, total: (n * 10 // total, n * 97 // total, n)),
    "lopsided": Layout("a%05d/%09d.jpg", lambda n, total: (0 if n < total - 3 else 90_000 + n % 10, n)),
}


class Bucket:
    """A made-up bucket."""

    def __init__(self, keys: int, layout: str, *, shuffled: bool = False) -> None:
        self.total, self.layout, self.shuffled = keys, LAYOUTS[layout], shuffled
        self._encoded = _ENTRY.replace("{key}", _quoted(self.layout.form))
        self._full = self._encoded * PAGE_KEYS

    def key(self, n: int) -> str:
        """Return the n-th key."""
        return self.layout.form % self.layout.numbers(n, self.total)

    def page(self, first: int, count: int) -> str:
        """Format the entries of `count` keys from the `first`."""
        form = self._full if count == PAGE_KEYS else self._encoded * count
        numbers = self.layout.numbers
        indices: Iterable[int] = range(first, first + count)
        if self.shuffled:  # as directory buckets list
            indices = [n * 7919 % self.total for n in indices]
        return form % tuple(v for n in indices for v in (*numbers(n, self.total), n, 100 + n % 7))

    def answer(self, query: dict[str, list[str]], *, ignore_after: bool = False) -> bytes:
        """Answer one request for a page."""
        prefix, after = query.get("prefix", [""])[0], query.get("start-after", [""])[0]
        limit = min(int(query.get("max-keys", [PAGE_KEYS])[0]), PAGE_KEYS)
        first = bisect.bisect_left(range(self.total), prefix, key=self.key)
        end = self.total if not prefix else bisect.bisect_left(range(self.total), prefix + "\U0010ffff", key=self.key)
        if "continuation-token" in query:
            first = int(query["continuation-token"][0])
        elif after and not ignore_after:
            first = max(first, bisect.bisect_right(range(self.total), after, key=self.key))
        count = max(min(limit, end - first), 0)
        more = first + count < end
        token = f"<NextContinuationToken>{first + count}</NextContinuationToken>" if more else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><EncodingType>url</EncodingType>'
            f"<Prefix>{escape(quote_plus(prefix))}</Prefix><KeyCount>{count}</KeyCount>"
            f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{self.page(first, count)}"
            "</ListBucketResult>"
        ).encode()


def _quoted(form: str) -> str:
    """Encode a format's text as S3 does in a listing, except its placeholders."""
    parts = re.split(r"(%\d*[dx])", form)
    parts[::2] = [quote_plus(text.replace("%%", "%"), safe="/").replace("%", "%%") for text in parts[::2]]
    return "".join(parts)


class _Handler(socketserver.StreamRequestHandler):
    """Reads requests of one connection by hand: the standard library's own handler is slower than a page."""

    disable_nagle_algorithm = True  # without it the last packet of a page waits 40 ms for the client's acknowledgement

    server: ListServer

    def handle(self) -> None:
        while line := self.rfile.readline():
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            status, body = self.server.answer(urlsplit(line.split()[1].decode()))
            head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
            self.wfile.write(head.encode() + body)


class ListServer(socketserver.ThreadingTCPServer):
    """Serves one bucket to any number of connections."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, bucket: Bucket, *, fail_every: int = 0, ignore_after: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bucket, self.fail_every, self.ignore_after, self.requests = bucket, fail_every, ignore_after, 0

    def answer(self, path: SplitResult) -> tuple[int, bytes]:
        """Answer one request: its status and body."""
        self.requests += 1
        if path.path == "/stats":
            return 200, json.dumps({"requests": self.requests, "cpu_seconds": time.process_time()}).encode()
        if self.fail_every and self.requests % self.fail_every == 0:
            return 503, b"<Error><Code>SlowDown</Code></Error>"
        query = parse_qs(path.query, keep_blank_values=True)
        return 200, self.bucket.answer(query, ignore_after=self.ignore_after)


@contextmanager
def start_lister(keys: int, layout: str = "flat", *options: str) -> Iterator[str]:
    """Run the server in a process of its own; yields its endpoint."""
    words = ["--keys", str(keys), "--layout", layout, *options]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def read_stats(endpoint: str) -> dict[str, float]:
    """Read how many requests a server has answered, and the seconds of CPU that it took."""
    with urllib.request.urlopen(f"{endpoint}/stats") as answer:
        stats: dict[str, float] = json.load(answer)
        return stats


def list_environment(endpoint: str) -> dict[str, str]:
    """Return the AWS variables that lead a client to the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def main() -> None:
    """Serve until the parent process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, required=True)
    parser.add_argument("--layout", choices=sorted(LAYOUTS), default="flat")
    parser.add_argument("--fail-every", type=int, default=0)
    parser.add_argument("--ignore-after", action="store_true")
    parser.add_argument("--shuffled", action="store_true")
    arguments = parser.parse_args()
    bucket = Bucket(arguments.keys, arguments.layout, shuffled=arguments.shuffled)
    server = ListServer(bucket, fail_every=arguments.fail_every, ignore_after=arguments.ignore_after)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)


if __name__ == "__main__":
    main()

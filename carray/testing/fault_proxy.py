"""A proxy in front of an HTTP server that forwards every request, except those that a rule makes fail.

Requests keep their Host header, so the signatures of S3 clients stay valid: a client signs for this proxy's address,
and the store checks against the header that it receives. One thread per client connection, one upstream connection per
request.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["ACTIONS", "FaultProxy", "Rule", "start_proxy"]

ACTIONS = ("answer", "reset", "hang", "truncate", "version", "delay")
_HOP_HEADERS = {"connection", "keep-alive", "expect", "proxy-connection"}
_FRAMING_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length"}


@dataclass
class Rule:
    """Which requests fail, and how.

    answer: nothing is forwarded; the answer is `status` with an S3 error document of `code`
    reset: the request is forwarded; half of the answer comes back, then the connection is reset
    hang: nothing happens for `seconds`, or until the rule is withdrawn; then the connection is closed without an answer
    truncate: the whole answer is promised, half of its body comes, and the connection is closed
    version: the first half of the body is followed by bytes of `other`; length and headers are the first version's
    delay: the request is forwarded after `seconds`
    """

    action: str
    method: str = "GET|HEAD|PUT|POST|DELETE"
    key: str = ""
    """Regular expression, searched in the decoded path /bucket/key."""
    probability: float = 1.0
    times: int | None = None
    """How many requests it strikes at most; None is any number."""
    status: int = 500
    code: str = "InternalError"
    seconds: float = 5.0
    other: bytes = b""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action is {self.action!r}; allowed are {', '.join(ACTIONS)}")
        self.withdrawn = threading.Event()


class FaultProxy:
    """A running proxy: its endpoint, its rules (the first that applies counts) and what they struck."""

    def __init__(self, upstream: str, address: str) -> None:
        self.upstream = urlsplit(upstream)
        self.struck: Counter[str] = Counter()
        """Requests struck, by action."""
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        self.server = _Server((address, 0), _Handler)
        self.server.proxy = self
        self.endpoint = f"http://{address}:{self.server.server_port}"

    def add(self, *rules: Rule) -> None:
        """Add rules before the others."""
        with self._lock:
            self._rules[:0] = rules

    def withdraw(self, *rules: Rule) -> None:
        """Remove rules, or all of them when none is named; requests that hang because of them are released."""
        with self._lock:
            for rule in rules or tuple(self._rules):
                self._rules.remove(rule)
                rule.withdrawn.set()

    def rules_for(self, method: str, path: str) -> list[Rule]:
        """Return and count the rules that strike this request: delays, and at most one fault."""
        found: list[Rule] = []
        with self._lock:
            for rule in self._rules:
                fits = re.fullmatch(rule.method, method) and re.search(rule.key, path) and rule.times != 0
                if not fits or random.random() >= rule.probability:
                    continue
                found.append(rule)
                self.struck[rule.action] += 1
                if rule.times is not None:
                    rule.times -= 1
                if rule.action != "delay":
                    break
        return found


@contextmanager
def start_proxy(upstream: str, *, address: str = "127.0.0.1") -> Iterator[FaultProxy]:
    """Run a proxy in front of `http://host:port`, in threads of this process."""
    proxy = FaultProxy(upstream, address)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.withdraw()
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: a killed client breaks its connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log."""

    def _forward(self) -> None:
        proxy, sent = self.server.proxy, self._read_body()
        fault = None
        for rule in proxy.rules_for(self.command, unquote(urlsplit(self.path).path)):
            if rule.action == "delay":
                rule.withdrawn.wait(rule.seconds)
            else:
                fault = rule
        if fault is not None and fault.action == "hang":
            fault.withdrawn.wait(fault.seconds)
            self.close_connection = True
        elif fault is not None and fault.action == "answer":
            body = b"" if self.command == "HEAD" else _error_document(fault)
            self._answer(fault.status, [("Content-Type", "application/xml")], body, length=len(body))
        else:
            try:
                status, headers, body, length = self._ask(sent)
            except (OSError, HTTPException):  # the upstream is down, or went down meanwhile
                return self._reset()
            self._answer(status, headers, body, length=length, fault=fault)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward

    def _read_body(self) -> bytes:
        """Read the request's body; a chunked one with its framing, as it is forwarded."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        raw, size = b"", 1
        while size:
            line = self.rfile.readline()
            size = int(line.split(b";")[0], 16)
            raw += line + (self.rfile.read(size + 2) if size else b"")
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            raw += line
        return raw + b"\r\n"

    def _ask(self, sent: bytes) -> tuple[int, list[tuple[str, str]], bytes, int]:
        upstream = self.server.proxy.upstream
        with closing(HTTPConnection(str(upstream.hostname), upstream.port, timeout=60)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_HEADERS:
                    connection.putheader(name, value)
            connection.endheaders(sent or None)
            response = connection.getresponse()
            body = response.read()
            headers = [(name, value) for name, value in response.getheaders() if name.lower() not in _FRAMING_HEADERS]
            return response.status, headers, body, int(response.headers.get("Content-Length", len(body)))

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, *, length: int, fault: Rule | None = None
    ) -> None:
        if fault is not None and fault.action == "version" and status < 300:
            rest = fault.other[len(body) // 2 : len(body)]
            body = (body[: len(body) // 2] + rest).ljust(len(body), b"\0")
        lines = [f"HTTP/1.1 {status} ", *(f"{name}: {value}" for name, value in headers)]
        if status not in (204, 304):
            lines.append(f"Content-Length: {length}")
        breaks_off = fault is not None and fault.action in ("reset", "truncate")
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if breaks_off and fault is not None and fault.action == "reset":
            if body:
                self.wfile.write(head + body[: len(body) // 2])
            self._reset()
            return
        self.wfile.write(head + (body[: len(body) // 2] if breaks_off else body))
        self.close_connection = self.close_connection or breaks_off

    def _reset(self) -> None:
        """Close so that the client sees `connection reset by peer`."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # it holds the socket open
        self.connection.close()


def _error_document(rule: Rule) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{rule.code}</Code>'
        f"<Message>as a rule of the fault proxy demands</Message></Error>"
    ).encode()

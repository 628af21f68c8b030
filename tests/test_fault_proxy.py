"""The proxy that makes storage fail: every fault is what it says, against a real HTTP server."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import pytest

from carray.testing.fault_proxy import FaultProxy, Rule, start_proxy

BODY = bytes(range(256)) * 40


class _Upstream(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: list[tuple[str, str, str, bytes]]

    def _reply(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            sent = b""
            while size := int(self.rfile.readline(), 16):
                sent += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.received.append((self.command, self.path, self.headers["Host"], sent))
        self.send_response_only(204 if self.command == "DELETE" else 200)
        self.send_header("ETag", '"one"')
        if self.command != "DELETE":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        if self.command in ("GET", "PUT"):
            self.wfile.write(BODY)

    do_GET = do_HEAD = do_PUT = do_DELETE = _reply


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Upstream", (_Upstream,), {"received": []}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    with start_proxy(f"http://127.0.0.1:{server.server_port}") as running:
        running.received = server.RequestHandlerClass.received  # type: ignore[attr-defined]
        yield running
    server.shutdown()
    server.server_close()
    thread.join()


def ask(proxy: FaultProxy, path: str = "/bucket/a%20b.jpg", method: str = "GET", **more: Any) -> Any:
    with closing(http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=10)) as connection:
        connection.request(method, path, **more)
        response = connection.getresponse()
        response.body = response.read()  # type: ignore[attr-defined]
        return response


@pytest.mark.parametrize(("method", "body"), [("GET", BODY), ("HEAD", b""), ("PUT", BODY), ("DELETE", b"")])
def test_without_a_rule_everything_is_passed_on(proxy: Any, method: str, body: bytes) -> None:
    sent = b"sent" if method == "PUT" else b""
    response = ask(proxy, method=method, body=sent or None)
    assert (response.status, response.headers["ETag"], response.body) == (
        204 if method == "DELETE" else 200,
        '"one"',
        body,
    )
    assert response.headers["Content-Length"] == (None if method == "DELETE" else str(len(BODY)))
    host = urlsplit(proxy.endpoint).netloc
    assert proxy.received == [(method, "/bucket/a%20b.jpg", host, sent)]
    assert not proxy.struck


def test_a_chunked_upload_is_passed_on_as_it_is(proxy: Any) -> None:
    assert ask(proxy, method="PUT", body=iter([b"one ", b"two"]), encode_chunked=True).status == 200
    assert proxy.received[0][3] == b"one two"


def test_a_connection_serves_many_requests(proxy: Any) -> None:
    connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc, timeout=10)
    for _ in range(3):
        connection.request("GET", "/bucket/key")
        assert connection.getresponse().read() == BODY
    connection.close()


def test_answer_is_an_s3_error_and_asks_nobody(proxy: Any) -> None:
    proxy.add(Rule("answer", status=503, code="SlowDown", times=1))
    response = ask(proxy)
    assert response.status == 503 and b"<Code>SlowDown</Code>" in response.body
    assert proxy.received == [] and proxy.struck == {"answer": 1}
    assert ask(proxy).body == BODY, "it was to strike once"


def test_a_rule_strikes_by_method_and_decoded_key(proxy: Any) -> None:
    proxy.add(Rule("answer", status=403, code="AccessDenied", method="GET", key="^/bucket/a b"))
    assert ask(proxy).status == 403
    assert ask(proxy, "/bucket/other.jpg").status == 200
    assert ask(proxy, method="PUT", body=b"x").status == 200
    proxy.withdraw()
    assert ask(proxy).status == 200


def test_a_rule_of_half_the_requests(proxy: Any) -> None:
    proxy.add(Rule("answer", probability=0.5))
    statuses = [ask(proxy).status for _ in range(60)]
    assert 10 < statuses.count(500) < 50


def test_reset_breaks_a_body_off(proxy: Any) -> None:
    proxy.add(Rule("reset"))
    with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
        ask(proxy)
    assert len(proxy.received) == 1, "the request itself was passed on"
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(proxy, method="DELETE")


def test_truncate_promises_more_than_it_gives(proxy: Any) -> None:
    proxy.add(Rule("truncate"))
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(proxy)
    assert caught.value.partial == BODY[: len(BODY) // 2]


def test_hang_gives_no_answer_and_ends_with_its_rule(proxy: Any) -> None:
    proxy.add(Rule("hang", seconds=0.3))
    started = time.monotonic()
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy)
    assert 0.3 <= time.monotonic() - started < 3
    long = Rule("hang", seconds=60)
    proxy.add(long)
    threading.Timer(0.3, proxy.withdraw, [long]).start()
    started = time.monotonic()
    with pytest.raises(http.client.RemoteDisconnected):
        ask(proxy)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("other", [b"z" * 20_000, b"z" * 6_000, b""])
def test_version_tears_a_body_and_keeps_its_length_and_headers(proxy: Any, other: bytes) -> None:
    proxy.add(Rule("version", other=other))
    response = ask(proxy)
    assert len(response.body) == len(BODY) and response.headers["ETag"] == '"one"'
    assert response.body[: len(BODY) // 2] == BODY[: len(BODY) // 2]
    assert hashlib.md5(response.body).digest() != hashlib.md5(BODY).digest()


def test_delay_only_delays_and_lets_a_fault_strike_too(proxy: Any) -> None:
    proxy.add(Rule("answer", times=1), Rule("delay", seconds=0.2))
    assert ask(proxy).status == 500
    started = time.monotonic()
    assert ask(proxy).body == BODY and time.monotonic() - started >= 0.2


def test_an_upstream_that_is_gone_resets(proxy: Any) -> None:
    proxy.upstream = urlsplit("http://127.0.0.1:1")
    with pytest.raises((ConnectionResetError, http.client.RemoteDisconnected)):
        ask(proxy)


def test_an_unknown_action_is_refused() -> None:
    with pytest.raises(ValueError, match="action is 'explode'"):
        Rule("explode")

"""What is said of storage: a real S3 server, with all rights and with fewer; stores that lie, hang or are not there."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from carray.core.store.files import write_bytes
from carray.preflight.findings import finding_text
from carray.preflight.storage import check_uri
from carray.testing.fault_proxy import Rule, start_proxy


def look(uri: str, *, write: bool = False) -> tuple[list[str], list[str]]:
    """Give the statuses and the lines."""
    findings = list(check_uri(uri, write=write))
    return [found.status for found in findings], [finding_text(found) for found in findings]


def keys(server, bucket: str) -> list[str]:
    return [entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket[5:]).get("Contents", [])]


def test_a_bucket_is_listed_and_read_and_its_clock_looked_at(s3):
    write_bytes(f"{s3}/photos/car.jpg", b"x")
    statuses, (place, clock) = look(f"{s3}/photos")
    assert statuses == ["ok", "ok"]
    assert f"{s3}/photos: listed, read, through obstore" in place
    assert "keys of the environment" in place
    assert "within 1 s of" in clock


def test_one_object_is_a_place_to_read(s3):
    write_bytes(f"{s3}/manifest.parquet", b"x")
    assert look(f"{s3}/manifest.parquet")[0] == ["ok", "ok"]


def test_an_empty_prefix_is_a_warning(s3):
    statuses, lines = look(f"{s3}/photo")
    assert statuses == ["warn", "ok"]
    assert "nothing there to read" in lines[0]


def test_results_are_written_read_back_and_deleted(s3, s3_server):
    statuses, lines = look(f"{s3}/results", write=True)
    assert statuses == ["ok", "ok"]
    assert "written, read back, deleted, conditional writes kept" in lines[0]
    assert keys(s3_server, s3) == []


def test_reading_writes_nothing(s3, s3_server):
    write_bytes(f"{s3}/a.jpg", b"x")
    with start_proxy(s3_server.endpoint) as proxy:
        os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        proxy.add(Rule("answer", method="PUT|POST|DELETE"))
        assert look(s3)[0] == ["ok", "ok"]
        assert proxy.struck["answer"] == 0


def test_who_may_only_read_is_told_so_where_results_are_to_go(s3, s3_server, monkeypatch):
    write_bytes(f"{s3}/a.jpg", b"x")
    for name, value in s3_server.reader_environment.items():
        monkeypatch.setenv(name, value)
    assert look(s3)[0] == ["ok", "ok"]
    statuses, lines = look(f"{s3}/results", write=True)
    assert statuses == ["fail", "ok"]
    assert "writing is refused (AccessDenied)" in lines[0]
    assert "allow s3:PutObject to these credentials" in lines[0]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, ["InvalidAccessKeyId", "unknown to this store"]),
        ({"AWS_SECRET_ACCESS_KEY": "not the secret"}, ["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY again"]),
        ({"AWS_PROFILE": "nobody"}, ["nobody", "correct AWS_PROFILE"]),
    ],
)
def test_credentials_that_are_wrong_are_named_and_not_shown(s3, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    statuses, lines = look(s3)
    assert statuses[0] == "fail"
    assert all(word in lines[0] for word in words)
    shown = set(re.findall(r"[\w ]+", "\n".join(lines)))
    assert not {os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]} & shown


def test_no_credentials_at_all_is_a_line(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    statuses, lines = look(s3)
    assert statuses == ["fail"]
    assert "no credentials" in lines[0]
    assert "give this machine a role" in lines[0]


def test_a_bucket_that_is_not_there_is_a_line(s3):
    statuses, lines = look("s3://no-such-bucket-anywhere", write=True)
    assert statuses[0] == "fail"
    assert "NoSuchBucket" in lines[0]
    assert "check the bucket's name" in lines[0]


def test_a_store_that_nobody_answers_for_is_a_line_without_its_password(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret@127.0.0.1:9")
    statuses, lines = look(s3)
    assert statuses == ["fail"]
    assert "AWS_ENDPOINT_URL" in lines[0]
    assert "secret" not in lines[0]


def test_a_store_that_hangs_is_a_line_in_time(s3, s3_server, monkeypatch):
    with start_proxy(s3_server.endpoint) as proxy:
        proxy.add(Rule("hang", seconds=60))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        started = time.monotonic()
        statuses, lines = look(s3)
        assert time.monotonic() - started < 10
    assert statuses == ["fail"]
    assert "timeout" in lines[0].lower()


def test_the_probe_is_deleted_though_it_cannot_be_read_back(s3, s3_server, monkeypatch):
    with start_proxy(s3_server.endpoint) as proxy:
        proxy.add(Rule("answer", method="GET", key="doctor-", status=403, code="AccessDenied"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        statuses, lines = look(s3, write=True)
    assert statuses[0] == "fail"
    assert "written, but reading is refused" in lines[0]
    assert "allow s3:GetObject" in lines[0]
    assert keys(s3_server, s3) == []


class _Store(BaseHTTPRequestHandler):
    """Answers every listing as a store whose clock is off, in another region, or refusing the time."""

    off_seconds, status, code, region = 0.0, 200, "", ""

    def do_GET(self) -> None:
        error = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>"
        body = (error if self.code else "<ListBucketResult></ListBucketResult>").encode()
        self.send_response_only(self.status)
        self.send_header("Date", format_datetime(datetime.now(UTC) + timedelta(seconds=self.off_seconds), usegmt=True))
        self.send_header("x-amz-bucket-region", self.region)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


@contextmanager
def store(**traits: object) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Lying", (_Store,), traits))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def lying(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")

    def look_there(**traits: object) -> tuple[list[str], list[str]]:
        with store(**traits) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            return look("s3://bucket/photos")

    return look_there


@pytest.mark.parametrize(
    ("off_seconds", "status", "words"),
    [(5, "ok", "within"), (-300, "warn", "300 s ahead of"), (3600, "fail", "3,600 s behind")],
)
def test_a_clock_that_is_off_is_told(lying, off_seconds, status, words):
    statuses, lines = lying(off_seconds=off_seconds + 0.5)
    assert statuses[1] == status
    assert words in lines[1].replace("299 s", "300 s").replace("3,599 s", "3,600 s")


def test_a_refusal_for_the_time_names_the_clock(lying):
    statuses, lines = lying(off_seconds=3600, status=403, code="RequestTimeTooSkewed")
    assert statuses == ["fail", "fail"]
    assert "set the clock right" in lines[0]


def test_a_bucket_of_another_region_names_it(lying):
    statuses, lines = lying(status=301, code="PermanentRedirect", region="eu-north-1")
    assert statuses[0] == "fail"
    assert "set AWS_REGION=eu-north-1" in lines[0]


def test_local_places(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert look(str(tmp_path / "a"))[0] == ["warn"]
    (tmp_path / "a" / "car.jpg").write_bytes(b"x")
    assert look(str(tmp_path / "a"))[0] == ["ok"]
    assert look(str(tmp_path / "a" / "car.jpg"))[0] == ["ok"]
    statuses, lines = look(str(tmp_path / "absent"))
    assert statuses == ["fail"]
    assert "does not exist" in lines[0]
    statuses, lines = look(str(tmp_path / "new" / "out"), write=True)
    assert statuses == ["ok"]
    assert "which will be created" in lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    statuses, lines = look("/proc/out", write=True)
    assert statuses == ["fail"]
    assert "make it writable" in lines[0]


def test_a_key_with_an_empty_part_takes_no_results(s3):
    statuses, lines = look(f"{s3}/a//b", write=True)
    assert statuses[0] == "fail"
    assert "empty part" in lines[0]


def test_findings_are_plain_values(s3):
    from carray.preflight.findings import as_json

    assert json.loads(json.dumps(as_json(check_uri(s3, write=False))))[0]["storage"] is True

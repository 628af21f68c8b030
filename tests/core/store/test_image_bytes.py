"""Listing and reading images by key: odd names, odd files, and stores that fail in the middle."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from carray.core.errors import DecodeError, FetchError, StorageError
from carray.core.store import files, image_bytes, s3
from carray.core.store.files import TRIES
from carray.core.store.image_bytes import fetch_image, is_image_key, key_suffix
from carray.core.store.listing import list_keys

NAMES = ["a b.jpg", "ü.jpg", "100%41.jpg", "hash#tag.jpg", "what?.jpg", "plus+&=.jpg", "new\nline.jpg", "sub/deep.jpg"]


def put(root, name, data, s3_server):
    if files.is_s3(root):
        s3_server.client().put_object(Bucket=root.removeprefix("s3://").split("/")[0], Key=f"in/{name}", Body=data)
        return
    path = os.path.join(root, "in", name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def test_odd_names_are_listed_and_read(root, s3_server):
    for name in NAMES:
        put(root, name, name.encode(), s3_server)
    keys = list(list_keys(f"{root}/in"))
    assert sorted(key.uri for key in keys) == sorted(f"{root}/in/{name}" for name in NAMES)
    assert [key.uri.encode() for key in keys] == sorted(key.uri.encode() for key in keys)
    for key in keys:
        fetched = fetch_image(key.uri)
        assert fetched.data == key.uri.removeprefix(f"{root}/in/").encode()
        assert (fetched.etag, len(fetched.data)) == (key.etag, key.size_bytes)


def test_prefix_is_a_folder_not_the_start_of_a_name(s3, s3_server):
    for key in ("in/a.jpg", "in-other/b.jpg", "in/", "inside.jpg"):
        s3_server.client().put_object(Bucket=s3.removeprefix("s3://"), Key=key, Body=b"x")
    assert [key.uri for key in list_keys(f"{s3}/in")] == [f"{s3}/in/a.jpg"]


def test_two_links_to_one_folder_are_two_folders_and_a_circle_ends(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "in").mkdir()
    for name in ("one", "two"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "real")
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    assert [key.uri for key in list_keys(f"{tmp_path}/in")] == [f"{tmp_path}/in/one/a.jpg", f"{tmp_path}/in/two/a.jpg"]


def test_etag_is_of_the_read_not_of_the_listing(root, s3_server):
    put(root, "a.jpg", b"old", s3_server)
    (listed,) = list_keys(f"{root}/in")
    put(root, "a.jpg", b"newer", s3_server)
    fetched = fetch_image(listed.uri)
    assert fetched.data == b"newer"
    assert fetched.etag != listed.etag


def test_pages_of_a_long_listing(s3, s3_server):
    client, bucket = s3_server.client(), s3.removeprefix("s3://")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=bucket, Key=f"in/{i:05d}.jpg", Body=b""), range(1_005)))
    assert [key.uri for key in list_keys(f"{s3}/in")] == [f"{s3}/in/{i:05d}.jpg" for i in range(1_005)]


def test_missing_key_folder_and_bucket(root, s3_server):
    put(root, "a.jpg", b"x", s3_server)
    with pytest.raises(FetchError) as caught:
        fetch_image(f"{root}/in/absent.jpg")
    assert caught.value.code == "not_found"
    with pytest.raises(StorageError, match="not a folder|NoSuchBucket"):
        list(list_keys("s3://no-such-bucket-here" if files.is_s3(root) else f"{root}/absent"))


def test_wrong_credentials(s3, s3_server, monkeypatch):
    s3_server.client().put_object(Bucket=s3.removeprefix("s3://"), Key="a.jpg", Body=b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"^listing s3://\S+ failed .*credentials at hand.*s3:ListBucket\.$"):
        list(list_keys(s3))
    with pytest.raises(FetchError) as caught:
        fetch_image(f"{s3}/a.jpg")
    assert caught.value.code == "denied"


def test_no_credentials_at_all(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(FetchError) as caught:
        fetch_image(f"{s3}/a.jpg")
    assert caught.value.code == "denied"
    with pytest.raises(StorageError, match="Unable to locate credentials"):
        list(list_keys(s3))


def test_names_that_are_not_utf8_are_escaped_and_read(tmp_path):
    (tmp_path / "plain%.jpg").write_bytes(b"plain")
    with open(os.fsencode(tmp_path) + b"/caf\xe9%.jpg", "wb") as file:
        file.write(b"latin")
    escaped, plain = sorted(list_keys(str(tmp_path)), key=lambda key: not key.escaped)
    assert escaped.uri == f"{tmp_path}/caf%E9%25.jpg".replace(str(tmp_path), str(tmp_path).replace("%", "%25"))
    assert fetch_image(escaped.uri, escaped=True).data == b"latin"
    assert (plain.uri, plain.escaped) == (f"{tmp_path}/plain%.jpg", False)
    assert fetch_image(plain.uri).data == b"plain"


def test_links_and_odd_files_are_keys_too(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "real" / "round").symlink_to(tmp_path)
    (tmp_path / "itself.jpg").symlink_to(tmp_path / "itself.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    names = {key.uri.removeprefix(f"{tmp_path}/") for key in list_keys(str(tmp_path))}
    assert names == {"real/a.jpg", "dangling.jpg", "itself.jpg", "pipe.jpg"}, (
        "each once: the link to the parent is no way"
    )
    codes = {}
    for name in ("dangling.jpg", "itself.jpg", "pipe.jpg", "real"):
        with pytest.raises(FetchError) as caught:
            fetch_image(str(tmp_path / name))
        codes[name] = caught.value.code
    assert codes == {"dangling.jpg": "not_found", "itself.jpg": "unavailable", "pipe.jpg": "denied", "real": "denied"}


@pytest.mark.parametrize(
    ("uri", "suffix", "image"),
    [
        ("/a/b.JPEG", "jpeg", True),
        ("s3://bucket/a//b.tiff", "tiff", True),
        ("s3://bucket/c.jpg/", "jpg", True),
        ("/a.jpg/readme", "", False),
        ("/jpg", "", False),
        ("/a/b.jpg.txt", "txt", False),
    ],
)
def test_what_counts_as_an_image(uri, suffix, image):
    assert (key_suffix(uri), is_image_key(uri)) == (suffix, image)


class _Store(http.server.BaseHTTPRequestHandler):
    """Answers ListObjectsV2 and GetObject for any key at all, and fails when told to.

    SeaweedFS keeps keys as paths, so it can neither hold `a//b` nor break off in the middle of a body.
    """

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]]
    faults: ClassVar[list[str]]
    asked: ClassVar[list[tuple[str, str]]]
    key_service: ClassVar[bool] = False
    region: ClassVar[str] = ""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self.region and f"/{self.region}/s3" not in self.headers["Authorization"]:
            self._answer(301, b"<Error><Code>PermanentRedirect</Code></Error>")
            return
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix("/bucket").removeprefix("/")
        if key:
            self._object(key)
            return
        prefix = parse_qs(parts.query).get("prefix", [""])[0]
        found = [(name, data) for name, data in sorted(self.objects.items()) if name.startswith(prefix)]
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>&quot;{len(data)}&quot;</ETag></Contents>"
            for name, data in found
        )
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())

    def _object(self, key):
        self.asked.append((key, "botocore" if "botocore" in self.headers["User-Agent"].lower() else "obstore"))
        fault = self.faults.pop(0) if self.faults else None
        if fault == "busy":
            self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
        elif fault == "expired":
            self._answer(400, b"<Error><Code>ExpiredToken</Code></Error>")
        elif fault == "denied":
            self._answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        elif fault == "cut":
            self._answer(200, self.objects[key], sent=3)
        elif key in self.objects:
            self._answer(200, self.objects[key])
        else:
            self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _answer(self, status, body, sent=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body):032x}"' if self.key_service else f'"{len(body)}"')
        if self.key_service:
            self.send_header("x-amz-server-side-encryption", "aws:kms")
        if self.region:
            self.send_header("x-amz-bucket-region", self.region)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body[:sent])
        if sent is not None:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(monkeypatch):
    """Give a function that serves a handler's class on loopback, to which every S3 client then leads."""
    servers = []

    def serve(kind):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        servers.append((server, thread))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def store(served):
    kind = type("Store", (_Store,), {"objects": {}, "faults": [], "asked": []})
    served(kind)
    return kind


def test_keys_with_empty_parts_and_trailing_slashes(store):
    store.objects |= {"in//a.jpg": b"double", "in/a.jpg": b"single", "in/b.jpg/": b"trailing", "in//": b"folder"}
    keys = [key.uri for key in list_keys("s3://bucket/in")]
    assert keys == [f"s3://bucket/{key}" for key in sorted(store.objects)]
    assert [fetch_image(uri).data for uri in keys] == [store.objects[key] for key in sorted(store.objects)]


def test_plain_keys_come_through_obstore_and_the_others_through_botocore(store):
    keys = ["in/a b+%41.jpg", "ü.jpg", "in//a.jpg", "in/b.jpg/", "in/../c.jpg", "./d.jpg", "new\nline.jpg"]
    store.objects |= {key: key.encode() for key in keys}
    assert [fetch_image(f"s3://bucket/{key}").data for key in keys] == [key.encode() for key in keys]
    assert store.asked == [(key, "obstore" if key in keys[:2] else "botocore") for key in keys]


def test_an_absent_object_costs_one_request(store):
    with pytest.raises(FetchError, match=r"does not exist \(NoSuchKey\)"):
        fetch_image("s3://bucket/absent.jpg")
    assert [way for _, way in store.asked] == ["obstore"]


def test_a_refusal_is_explained_and_costs_one_request(store):
    store.faults.append("denied")
    with pytest.raises(FetchError, match=r"refused the object \(AccessDenied\); s3:GetObject is needed"):
        fetch_image("s3://bucket/a.jpg")
    assert [way for _, way in store.asked] == ["obstore"]


def test_an_etag_of_a_key_service_is_no_md5_and_the_bytes_are_right(store, etags):
    store.objects["a.jpg"], store.key_service = b"whole image", True
    for _ in range(3):
        assert fetch_image("s3://bucket/a.jpg").data == b"whole image"
    assert [way for _, way in store.asked] == ["obstore", "botocore"] * 3, "botocore sees the header, and nothing twice"


def test_a_bucket_of_another_region_is_read_there(store, monkeypatch):
    monkeypatch.setattr(s3, "_regions", {})
    store.objects["a.jpg"], store.region = b"whole image", "eu-north-1"
    assert fetch_image("s3://bucket/a.jpg").data == b"whole image"
    store.asked.clear()
    assert fetch_image("s3://bucket/a.jpg").data == b"whole image"
    assert store.asked == [("a.jpg", "obstore")]


def test_a_forked_process_reads_through_botocore(store):
    store.objects["a.jpg"] = b"whole image"
    fetch_image("s3://bucket/a.jpg")
    child = os.fork()
    if child == 0:
        os._exit(0 if fetch_image("s3://bucket/a.jpg").data == b"whole image" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [way for _, way in store.asked] == ["obstore", "botocore"]


@pytest.mark.parametrize(
    ("scheme", "bundle", "fast"), [("https", "ca.pem", False), ("https", "", True), ("http", "ca.pem", True)]
)
def test_certificates_of_one_s_own_are_botocore_s(monkeypatch, scheme, bundle, fast):
    for name in ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{scheme}://127.0.0.1:9")
    client = s3.make_client()
    monkeypatch.setenv("AWS_CA_BUNDLE", bundle)
    assert (s3._make_store("bucket", client) is not None) == fast


@pytest.mark.parametrize("faults", [["busy", "busy"], ["cut"], ["cut", "busy", "cut"]])
def test_transient_failures_cost_no_image(store, faults):
    store.objects["a.jpg"] = b"whole image"
    store.faults.extend(faults)
    assert fetch_image("s3://bucket/a.jpg").data == b"whole image"
    assert not store.faults, "every fault was met"


@pytest.mark.parametrize("fault", ["busy", "cut"])
def test_outage_is_a_fetch_error(store, fault):
    store.objects["a.jpg"] = b"whole image"
    store.faults.extend([fault] * 50)
    with pytest.raises(FetchError) as caught:
        fetch_image("s3://bucket/a.jpg")
    assert caught.value.code == "unavailable"
    assert "\n" not in str(caught.value)


class _TwoVersions(http.server.BaseHTTPRequestHandler):
    """Gives the first half of one version with the etag of another, as often as `torn` says."""

    torn: ClassVar[int] = 0
    reads: ClassVar[int] = 0
    etag: ClassVar[str] = ""

    def do_GET(self):
        kind = type(self)
        kind.reads += 1
        body = b"new version" if kind.reads > kind.torn else b"old and new"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{kind.etag or hashlib.md5(b"new version").hexdigest()}"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def etags(monkeypatch):
    monkeypatch.setattr(image_bytes, "_etags", image_bytes._Etags())


def test_bytes_that_are_not_the_etag_s_are_read_again(served, etags):
    kind = type("Torn", (_TwoVersions,), {"torn": 1})
    served(kind)
    assert fetch_image("s3://bucket/a.jpg").data == b"new version"
    assert kind.reads == 2


def test_torn_bytes_are_never_taken_where_etags_are_md5(served, etags):
    kind = type("Torn", (_TwoVersions,), {})
    served(kind)
    assert fetch_image("s3://bucket/a.jpg").data == b"new version"
    kind.torn = 1_000
    for _ in range(image_bytes._Etags.MISSES + 1):
        with pytest.raises(FetchError, match="not those of the object's etag"):
            fetch_image("s3://bucket/a.jpg")


def test_a_store_whose_etags_are_no_md5_is_read_twice_only_until_that_is_known(served, etags):
    kind = type("Other", (_TwoVersions,), {"etag": "0" * 32})
    served(kind)
    for _ in range(image_bytes._Etags.MISSES + 2):
        assert fetch_image("s3://bucket/a.jpg").etag == "0" * 32
    assert kind.reads == 2 * image_bytes._Etags.MISSES + 2


@pytest.mark.parametrize(("faults", "outcome"), [(2, "read"), (50, "stopped")])
def test_expired_credentials_are_awaited_and_then_stop_the_job(store, faults, outcome):
    store.objects["a.jpg"] = b"whole image"
    store.faults.extend(["expired"] * faults)
    if outcome == "read":
        assert fetch_image("s3://bucket/a.jpg").data == b"whole image"
    else:
        with pytest.raises(StorageError, match="the credentials at hand have expired .*ExpiredToken.*renew them"):
            fetch_image("s3://bucket/a.jpg")


def test_a_busy_store_is_given_every_try_for_every_image(store):
    """Botocore's own retries share a quota of 100, which many busy answers would use up."""
    store.objects["a.jpg"] = b"whole image"
    for _ in range(100 // (TRIES - 1) + 5):
        store.faults.extend(["busy"] * (TRIES - 1))
        assert fetch_image("s3://bucket/a.jpg").data == b"whole image"


def test_a_size_may_be_refused_before_the_bytes_are_read(root, s3_server):
    put(root, "a.jpg", b"x" * 1000, s3_server)
    sizes = []
    assert len(fetch_image(f"{root}/in/a.jpg", admit=sizes.append).data) == 1000
    assert sizes == [1000]

    def refuse(size_bytes):
        raise DecodeError("too_large", f"{size_bytes} bytes")

    with pytest.raises(DecodeError, match="1000 bytes"):
        fetch_image(f"{root}/in/a.jpg", admit=refuse)

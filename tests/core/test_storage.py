"""Storage on a real disk and a real S3 server: whole files or none, one sentence a failure."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from carray.core import storage
from carray.core.errors import SettingsError, StorageError

NAMES = ["plain.bin", "with space/%41 #?+&=.bin", "ünï/日本.bin", "new\nline.bin"]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_round_trip(root, name):
    uri = storage.join(root, "deep", name)
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"second"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_list_files_gives_files_of_one_folder_only(root):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        storage.write_bytes(storage.join(root, "out", name), b"x")
    assert storage.list_files(storage.join(root, "out")) == [storage.join(root, "out", n) for n in ("a.txt", "b.txt")]
    assert storage.list_files(storage.join(root, "absent")) == []
    assert storage.is_folder(storage.join(root, "out"))
    assert not storage.exists(storage.join(root, "out"))


def test_json_round_trip_and_damage(root):
    place = storage.join(root, "value.json")
    storage.write_json(place, {"label": "Ram C/V", "n": 3, "ü": None})
    assert storage.read_json(place) == {"label": "Ram C/V", "n": 3, "ü": None}
    storage.write_bytes(place, b'{"label": ')
    with pytest.raises(StorageError, match=r"value\.json is not valid JSON"):
        storage.read_json(place)


def test_absent_file_is_one_sentence(root):
    with pytest.raises(StorageError, match=r"absent\.bin does not exist; check its spelling\.$"):
        storage.read_bytes(storage.join(root, "absent.bin"))


def test_local_copy(root, tmp_path):
    storage.write_bytes(storage.join(root, "model.onnx"), b"weights")
    copy = storage.local_copy(storage.join(root, "model.onnx"), tmp_path / "copies")
    assert copy.read_bytes() == b"weights"


def test_readers_never_see_half_a_file(tmp_path):
    uri, sizes, stop = str(tmp_path / "file"), set(), threading.Event()
    storage.write_bytes(uri, b"a" * 3_000_000)

    def read() -> None:
        while not stop.is_set():
            sizes.add(len(storage.read_bytes(uri)))

    reader = threading.Thread(target=read)
    reader.start()
    for size in (2_000_000, 3_000_000) * 10:
        storage.write_bytes(uri, b"b" * size)
    stop.set()
    reader.join()
    assert sizes <= {2_000_000, 3_000_000}
    assert os.listdir(tmp_path) == ["file"], "no temporary file may stay"


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="failed after 1 try .*No space left"):
        storage.write_bytes(uri, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_missing_bucket_and_wrong_credentials_do_not_wait(s3, monkeypatch):
    with pytest.raises(StorageError, match="failed after 1 try .*NO_SUCH_BUCKET"):
        storage.write_bytes("s3://no-such-bucket-here/key", b"x")
    storage.write_bytes(f"{s3}/key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for action in (storage.read_bytes, storage.exists, storage.list_files):
        with pytest.raises(StorageError, match=r"failed after 1 try .*credentials at hand may use it\.$"):
            action(f"{s3}/key")


def test_transient_failures_are_tried_again(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    failures = [OSError("AWS Error SLOW_DOWN (HTTP status 503)"), ConnectionResetError("reset")]

    def act() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert storage.retry(act, what="reading") == "done"


def test_outage_says_how_often_it_was_tried(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    tries = []

    def act() -> None:
        tries.append(1)
        raise OSError("AWS Error INTERNAL_FAILURE")

    with pytest.raises(StorageError, match=f"reading failed after {storage.TRIES} tries in .*INTERNAL_FAILURE"):
        storage.retry(act, what="reading")
    assert len(tries) == storage.TRIES


def test_old_store_gets_the_remedy_it_needs():
    def act() -> None:
        raise OSError("AWS Error UNKNOWN (HTTP status 411) during PutObject")

    with pytest.raises(StorageError, match="AWS_REQUEST_CHECKSUM_CALCULATION=when_required"):
        storage.retry(act, what="writing")


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        *(("gs://bucket/key", "scheme 'gs'"), ("s3://", "no bucket"), ("s3:///key", "no bucket"), (" ", "empty path")),
        *((f"{text}/key", "misspelled address of S3; write s3://b/") for text in ("s3:/b", "S3://b", "s3//b", "s3:b")),
        *(("file:///key", "write the path alone"), ("s3://b b/key", "names the bucket 'b b'")),
    ],
)
def test_other_schemes_are_refused(uri, reason):
    with pytest.raises(SettingsError, match=reason):
        storage.absolute(uri)


def test_artifact_with_an_empty_part_is_refused():
    with pytest.raises(SettingsError, match=r"s3://bucket/out//part' has an empty part"):
        storage.filesystem("s3://bucket/out//part")


def test_what_may_no_longer_be_written_is_not_written_at_a_later_try(tmp_path, monkeypatch):
    """A machine that was cut off during its first try, and is back for the second."""
    from carray.core import storage

    place, allowed, tries = tmp_path / "a.json", [True, False], []
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)

    def check():
        tries.append(1)
        if not allowed.pop(0):
            raise StorageError("it is another's now")

    def refuse(*paths):
        raise OSError("AWS Error NETWORK_CONNECTION: the network is away")

    monkeypatch.setattr(storage.os, "replace", refuse)
    with pytest.raises(StorageError, match="^it is another's now"):
        storage.write_json(str(place), {}, check=check)
    assert len(tries) == 2 and not place.exists()

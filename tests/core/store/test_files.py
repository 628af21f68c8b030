"""Storage on a real disk and a real S3 server: whole files or none, one sentence a failure."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from carray.core.errors import SettingsError, StorageError
from carray.core.store import files
from carray.core.store.objects import StoreError

NAMES = ["plain.bin", "with space/%41 #?+&=.bin", "ünï/日本.bin", "new\nline.bin"]


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_round_trip(root, name):
    uri = files.join(root, "deep", name)
    assert not files.exists(uri)
    files.write_bytes(uri, b"first")
    files.write_bytes(uri, b"second")
    assert files.exists(uri)
    assert files.read_bytes(uri) == b"second"
    files.delete(uri)
    files.delete(uri)
    assert not files.exists(uri)


def test_list_files_gives_files_of_one_folder_only(root):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        files.write_bytes(files.join(root, "out", name), b"x")
    assert files.list_files(files.join(root, "out")) == [files.join(root, "out", n) for n in ("a.txt", "b.txt")]
    assert files.list_files(files.join(root, "absent")) == []
    assert files.is_folder(files.join(root, "out"))
    assert not files.exists(files.join(root, "out"))


def test_nothing_lies_below_a_file(root):
    files.write_bytes(files.join(root, "file"), b"x")
    assert not files.exists(files.join(root, "file", "below"))
    assert files.list_files(files.join(root, "file")) == []
    assert not files.is_folder(files.join(root, "file"))


def test_json_round_trip_and_damage(root):
    place = files.join(root, "value.json")
    files.write_json(place, {"label": "Ram C/V", "n": 3, "ü": None})
    assert files.read_json(place) == {"label": "Ram C/V", "n": 3, "ü": None}
    files.write_bytes(place, b'{"label": ')
    with pytest.raises(StorageError, match=r"value\.json is not valid JSON"):
        files.read_json(place)


def test_absent_file_is_one_sentence(root):
    with pytest.raises(StorageError, match=r"absent\.bin does not exist; check its spelling\.$"):
        files.read_bytes(files.join(root, "absent.bin"))


def test_local_copy(root, tmp_path):
    files.write_bytes(files.join(root, "model.onnx"), b"weights")
    copy = files.local_copy(files.join(root, "model.onnx"), tmp_path / "copies")
    assert copy.read_bytes() == b"weights"


def test_readers_never_see_half_a_file(tmp_path):
    uri, sizes, stop = str(tmp_path / "file"), set(), threading.Event()
    files.write_bytes(uri, b"a" * 3_000_000)

    def read() -> None:
        while not stop.is_set():
            sizes.add(len(files.read_bytes(uri)))

    reader = threading.Thread(target=read)
    reader.start()
    for size in (2_000_000, 3_000_000) * 10:
        files.write_bytes(uri, b"b" * size)
    stop.set()
    reader.join()
    assert sizes <= {2_000_000, 3_000_000}
    assert os.listdir(tmp_path) == ["file"], "no temporary file may stay"


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    files.write_bytes(uri, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="failed after 1 try .*No space left"):
        files.write_bytes(uri, b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_missing_bucket_and_wrong_credentials_do_not_wait(s3, monkeypatch):
    with pytest.raises(StorageError, match="failed after 1 try .*NoSuchBucket"):
        files.write_bytes("s3://no-such-bucket-here/key", b"x")
    files.write_bytes(f"{s3}/key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for action in (files.read_bytes, files.exists, files.list_files):
        with pytest.raises(StorageError, match=r"failed after 1 try .*credentials at hand may use it\.$"):
            action(f"{s3}/key")


def test_transient_failures_are_tried_again(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    failures = [StoreError("unavailable", "SlowDown", passing=True), ConnectionResetError("reset")]

    def act() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert files.retry(act, what="reading") == "done"


def test_outage_says_how_often_it_was_tried(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    tries = []

    def act() -> None:
        tries.append(1)
        raise StoreError("unavailable", "InternalError", passing=True)

    with pytest.raises(StorageError, match=f"reading failed after {files.TRIES} tries in .*InternalError"):
        files.retry(act, what="reading")
    assert len(tries) == files.TRIES


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
        files.absolute(uri)


def test_artifact_with_an_empty_part_is_refused():
    with pytest.raises(SettingsError, match=r"s3://bucket/out//part' has an empty part"):
        files.artifact_uri("s3://bucket/out//part")


def test_what_may_no_longer_be_written_is_not_written_at_a_later_try(tmp_path, monkeypatch):
    """A machine that was cut off during its first try, and is back for the second."""
    from carray.core.store import files

    place, allowed, tries = tmp_path / "a.json", [True, False], []
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    def check():
        tries.append(1)
        if not allowed.pop(0):
            raise StorageError("it is another's now")

    def refuse(*paths):
        raise ConnectionError("the network is away")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="^it is another's now"):
        files.write_json(str(place), {}, check=check)
    assert len(tries) == 2 and not place.exists()


def test_what_killed_processes_left_half_written_is_deleted(tmp_path):
    (tmp_path / "below").mkdir()
    for name in (".writing-a", "below/.writing-b", "part.parquet", "below/writing-c", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    files.delete_unfinished(str(tmp_path))
    files.delete_unfinished(str(tmp_path / "absent"))
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".hidden", "below/.writing-b", "below/writing-c", "part.parquet"]

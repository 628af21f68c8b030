"""Conditional writes on a real disk and a real S3 server: of many writers one wins, and a lost answer is no loss."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from carray.core.errors import StorageError
from carray.core.store import files, objects
from carray.core.store.conditional import create, keeps_conditions, read_version, replace
from carray.testing.fault_proxy import Rule, start_proxy


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture
def no_waits(monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("name", ["plain.json", "with space/ü?#&.json"])
def test_a_file_is_created_once(root, name):
    uri = files.join(root, "deep", name)
    assert read_version(uri) is None
    etag = create(uri, b"first")
    assert etag
    assert create(uri, b"second") is None
    assert read_version(uri) == (b"first", etag)


def test_only_the_version_that_was_read_is_replaced(root):
    uri = files.join(root, "note.json")
    first = create(uri, b"first")
    second = replace(uri, b"second", first)
    assert second and second != first
    assert replace(uri, b"third", first) is None
    assert read_version(uri) == (b"second", second)
    files.delete(uri)
    files.delete(uri)
    assert replace(uri, b"third", second) is None
    assert not files.exists(uri)


def test_one_of_many_writers_wins(root):
    uri, writers = files.join(root, "entry.json"), 12
    with ThreadPoolExecutor(writers) as pool:
        made = list(pool.map(lambda i: create(uri, f"writer {i}".encode()), range(writers)))
        (winner,) = [i for i, etag in enumerate(made) if etag]
        assert read_version(uri) == (f"writer {winner}".encode(), made[winner])
        again = list(pool.map(lambda i: replace(uri, f"again {i}".encode(), made[winner]), range(writers)))
    (winner,) = [i for i, etag in enumerate(again) if etag]
    assert read_version(uri) == (f"again {winner}".encode(), again[winner])
    if not uri.startswith("s3"):
        assert os.listdir(root) == ["entry.json"], "no temporary file may stay"


def test_a_write_whose_answer_was_lost_is_known_as_our_own(s3, s3_server, monkeypatch, no_waits):
    with start_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        # Each is done, and its answer does not come.
        proxy.add(Rule("reset", method="PUT", times=1))
        created = create(f"{s3}/a", b"mine")
        assert created and read_version(f"{s3}/a") == (b"mine", created)
        proxy.add(Rule("reset", method="PUT", times=1))
        replaced = replace(f"{s3}/a", b"next", created)
        assert replaced and read_version(f"{s3}/a") == (b"next", replaced)
        assert proxy.struck["reset"] == 2
        proxy.add(Rule("reset", method="PUT", times=1))
        assert create(f"{s3}/a", b"not mine") is None


def test_a_network_disk_that_lost_the_answer_of_a_link(tmp_path, monkeypatch):
    link = os.link

    def lose(source, target):
        link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", lose)
    assert create(str(tmp_path / "a"), b"mine")
    assert create(str(tmp_path / "a"), b"mine") is None


def test_a_disk_without_links_takes_a_look_instead(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    etag = create(str(tmp_path / "a"), b"first")
    assert etag and create(str(tmp_path / "a"), b"second") is None
    assert read_version(str(tmp_path / "a")) == (b"first", etag)


def test_a_store_without_conditions_takes_a_look_instead(s3, monkeypatch):
    real = objects.put_object

    def refuse(uri, data, *, mode=None):
        if mode:
            raise objects.NoConditions("NotImplemented")
        return real(uri, data)

    monkeypatch.setattr(objects, "put_object", refuse)
    first = create(f"{s3}/a", b"first")
    assert first and create(f"{s3}/a", b"second") is None
    assert replace(f"{s3}/a", b"second", "another") is None
    assert replace(f"{s3}/a", b"second", first) == read_version(f"{s3}/a")[1]


def test_a_store_that_keeps_refuses_or_ignores_conditions_is_known(root, s3, s3_server, monkeypatch):
    create(f"{root}/a", b"mine")
    assert keeps_conditions(f"{root}/a", b"mine")
    create(f"{s3}/a", b"mine")
    real = objects.put_object
    with start_proxy(s3_server.endpoint) as proxy:
        proxy.add(Rule("answer", method="PUT", status=501, code="NotImplemented"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert not keeps_conditions(f"{s3}/a", b"mine")
        proxy.withdraw()
        monkeypatch.setattr(objects, "put_object", lambda uri, data, *, mode: real(uri, data))
        assert not keeps_conditions(f"{s3}/a", b"mine")


def test_refusals_are_sentences_and_do_not_wait(s3, monkeypatch):
    with pytest.raises(StorageError, match=r"writing s3://no-such-bucket/a failed .*NoSuchBucket.*; check that"):
        create("s3://no-such-bucket/a", b"")
    with pytest.raises(StorageError, match=r"reading s3://no-such-bucket/a failed .*NoSuchBucket.*; check that"):
        read_version("s3://no-such-bucket/a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"SignatureDoesNotMatch\); s3:PutObject is needed"):
        create(f"{s3}/a", b"")

"""Listing by ranges of keys: every key exactly once, whatever the keys, the threads and the store's manners."""

from __future__ import annotations

import bisect
import random
import threading
from itertools import pairwise

import pytest

from carray.core.errors import StorageError
from carray.core.store import files
from carray.core.store.listing import WHOLE, list_keys, list_pieces
from carray.core.store.s3_listing import find_split, successor
from carray.testing.list_server import LAYOUTS, Bucket, list_environment, read_stats, start_lister


class Taken:
    """Keeps pieces, as the threads hand them over."""

    def __init__(self, stop_after=None):
        self.pieces, self.stop, self._stop_after = [], threading.Event(), stop_after

    def __call__(self, piece):
        self.pieces.append(piece)
        if len(self.pieces) == self._stop_after:
            self.stop.set()

    def list(self, source, *, threads=8, gaps=WHOLE):
        list_pieces(source, self, stop=self.stop, threads=threads, gaps=gaps)
        return self

    @property
    def uris(self):
        return [uri for piece in self.pieces for uri in piece.batch["uri"].to_pylist()]

    @property
    def covered(self):
        return sorted((piece.after, piece.upto) for piece in self.pieces if piece.after != piece.upto)


@pytest.fixture
def made_up(monkeypatch):
    """Give a function that starts a server of made-up keys: -> (its endpoint, its URIs in order)."""
    running = []

    def start(keys, layout="flat", *options):
        context = start_lister(keys, layout, *options)
        endpoint = context.__enter__()
        running.append(context)
        for name, value in list_environment(endpoint).items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(keys, layout)
        return endpoint, [f"s3://bucket/{bucket.key(n)}" for n in range(keys)]

    yield start
    for context in running:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_key_once(made_up, layout, threads):
    endpoint, uris = made_up(40_500, layout)
    taken = Taken().list("s3://bucket", threads=threads)
    assert sorted(taken.uris) == uris
    assert taken.covered[0][0] == "" and taken.covered[-1][1] is None
    assert all(before[1] == after[0] for before, after in pairwise(taken.covered))
    ranges = {piece.range_number for piece in taken.pieces}
    assert len(ranges) == 1 if threads == 1 else len(ranges) > 1
    assert read_stats(endpoint)["requests"] <= 41 * (1 if threads == 1 else 6) + 1
    rows = {row["uri"]: row for piece in taken.pieces for row in piece.batch.to_pylist()}
    assert rows[uris[20]] == {"uri": uris[20], "escaped": False, "etag": f"{20:032x}", "size_bytes": 100 + 20 % 7}


@pytest.mark.parametrize(("keys", "pages"), [(0, 1), (1, 1), (1_000, 1), (1_001, 2), (3_500, 4)])
def test_a_small_listing_costs_its_pages_and_nothing_more(made_up, keys, pages):
    endpoint, uris = made_up(keys)
    assert Taken().list("s3://bucket", threads=16).uris == uris
    assert read_stats(endpoint)["requests"] == pages + 1, "one is the question itself"


def test_a_prefix_is_listed_alone(made_up):
    _, uris = made_up(30_000, "dated")
    wanted = [uri for uri in uris if uri.startswith("s3://bucket/cars/2017/")]
    assert 1_000 < len(wanted) < 30_000
    assert sorted(Taken().list("s3://bucket/cars/2017").uris) == wanted
    assert [key.uri for key in list_keys("s3://bucket/cars/2017/")] == wanted


def test_busy_answers_cost_no_key(made_up, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    _, uris = made_up(30_000, "uuid", "--fail-every", "3")
    assert sorted(Taken().list("s3://bucket").uris) == uris


def test_an_outage_is_a_sentence(made_up, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    made_up(30_000, "uuid", "--fail-every", "1")
    with pytest.raises(
        StorageError, match=r"^listing s3://bucket failed after up to 5 tries \(the store answered Slow"
    ):
        Taken().list("s3://bucket")


def test_a_store_that_is_not_there_is_asked_again(made_up, monkeypatch):
    waits = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    made_up(10)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"^listing s3://bucket failed after up to 5 tries \(Could not connect"):
        Taken().list("s3://bucket")
    assert len(waits) == files.TRIES - 1


def test_a_store_that_ignores_where_to_begin_is_listed_by_one(made_up):
    _, uris = made_up(30_000, "uuid", "--ignore-after")
    taken = Taken().list("s3://bucket")
    assert taken.uris == uris
    with pytest.raises(StorageError, match="not from where it is asked to; give an inventory or a table"):
        Taken().list("s3://bucket", gaps=[("8", None)])


def test_a_store_without_order_is_listed_by_one_and_says_so(made_up):
    _, uris = made_up(30_000, "uuid", "--shuffled", "--ignore-after")
    taken = Taken().list("s3://bucket")
    assert sorted(taken.uris) == uris
    assert not any(piece.ordered for piece in taken.pieces)


@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_what_was_not_handed_over_is_listed_later(made_up, stop_after):
    _, uris = made_up(60_000, "uuid")
    first = Taken(stop_after).list("s3://bucket")
    covered = first.covered
    gaps, reached = [], ""
    for after, upto in covered:
        gaps += [(reached, after)] if reached != after else []
        reached = upto
    gaps += [(reached, None)] if reached is not None else []
    second = Taken().list("s3://bucket", gaps=gaps)
    assert 0 < len(first.uris) < len(uris)
    assert sorted(first.uris + second.uris) == uris


def test_a_folder_has_gaps_too(tmp_path):
    for name in ("a.jpg", "a/b.jpg", "a/c/d.jpg", "a-b/e.jpg", "f.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    uris = Taken().list(str(tmp_path)).uris
    assert uris == sorted(uris, key=str.encode)
    assert Taken().list(str(tmp_path), gaps=[("", uris[1]), (uris[3], None)]).uris == [*uris[:2], uris[4]]


ALPHABETS = ["0123456789", "0123456789abcdef", "ab", "aZ9/-_ .~", "aé車\U0001f697\U0010ffff"]


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_has_keys_on_both_sides(seed):
    """Random keys, with a common beginning or without: the cut leaves some of them beyond, after few questions."""
    rng = random.Random(seed)
    alphabet, start = rng.choice(ALPHABETS), rng.choice(["", "cars/", "photos/2024-0000000"])
    keys = sorted({start + "".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(400)})
    position = keys[rng.randint(0, len(keys) * 3 // 4)]
    asked = []

    def has_key(after, upto):
        asked.append(after)
        after.encode()
        i = bisect.bisect_right(keys, after)
        return i < len(keys) and (upto is None or keys[i] <= upto)

    cut, bound = find_split(position, rng.choice([None, successor(start), keys[-1]]), has_key)
    assert cut is not None and position < cut < keys[-1]
    assert bound is None or bound >= keys[-1], "nothing lies between the new bound and the old"
    assert len(asked) <= 5 + 8 + 1


def test_one_key_left_is_not_cut():
    cut, bound = find_split("a/000", None, lambda after, upto: False)
    assert cut is None
    assert bound is not None and bound > "a/000"


def test_successor():
    assert successor("ab") == "ac"
    assert successor("a\U0010ffff") == "b"
    assert successor("\ud7ff") == "\ue000"
    assert successor("") is None and successor("\U0010ffff") is None

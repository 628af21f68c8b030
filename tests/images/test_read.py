"""Reading many images: how far ahead of the consumer it goes."""

from __future__ import annotations

import threading

import pytest

from carray.images.read import read_all

AHEAD = 8


@pytest.mark.parametrize("slow", [0, AHEAD - 1])
def test_a_slow_image_does_not_stop_those_behind_it_up_to_a_limit(slow):
    last = slow + AHEAD - 1  # read ahead while the slow one is waited for
    release, is_last_read, read = threading.Event(), threading.Event(), set()

    def read_one(i: int) -> int:
        if i == slow:
            assert release.wait(60)
        read.add(i)
        if i == last:
            is_last_read.set()
        return i

    found = read_all(range(100), read_one, what="reading", threads=2, ahead=AHEAD)
    threading.Thread(target=lambda: is_last_read.wait(60) and release.set()).start()
    before = [next(found) for _ in range(slow)]
    seen = [next(found)]
    assert is_last_read.is_set() and before + seen == list(range(slow + 1))
    assert max(read) <= last + 1  # one more is submitted when the slow one is taken
    assert list(found) == list(range(slow + 1, 100))


def test_a_consumer_that_stops_leaves_nothing_to_be_read():
    is_begun, release, read = threading.Event(), threading.Event(), []

    def read_one(i: int) -> int:
        if i == 1:
            is_begun.set()
            assert release.wait(60)
        read.append(i)
        return i

    found = read_all(range(100), read_one, what="reading", threads=1, ahead=AHEAD)
    assert next(found) == 0 and is_begun.wait(60)
    threading.Timer(0.3, release.set).start()
    found.close()
    assert read == [0, 1]

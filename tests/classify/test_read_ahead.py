"""What is on its way, what is noted of it, and that nothing of it stays held."""

from __future__ import annotations

import threading

import pytest

from carray.classify import read_ahead as module
from carray.classify.attempts import Attempt
from carray.classify.predictions_folder import PlannedImage
from carray.classify.read_ahead import read_ahead
from carray.classify.read_images import SeenImage

IMAGES = [PlannedImage(f"/{i}.jpg") for i in range(40)]


class Reader:
    """Gives images at once, the later first, and counts what is neither finished nor dropped."""

    def __init__(self):
        self.held, self.most_held = set(), 0

    def begin(self, images, arrived):
        for place in reversed(list(images)):
            self.held.add(place)
            self.most_held = max(self.most_held, len(self.held))
            arrived.put((place, lambda place=place: self.finish(place)))

    def finish(self, place):
        self.held.remove(place)
        return SeenImage({"uri": IMAGES[place].uri}, None)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(module, "WINDOW_IMAGES", 4)
    monkeypatch.setattr(module, "NOTE_IMAGES", 10)


def test_each_image_comes_once_and_is_noted_before():
    reader, notes, came = Reader(), [], []
    for arrivals in read_ahead(reader, IMAGES, range(3, 40), Attempt(shard=0, pid=1, images=[]), notes.append, most=3):
        assert 1 <= len(arrivals) <= 3
        for place, finish in arrivals:
            assert place in notes[-1].images
            assert finish().row["uri"] == IMAGES[place].uri
            came.append(place)
    assert sorted(came) == list(range(3, 40))
    assert reader.most_held <= 2 * 4
    assert len(notes) == 4
    assert not any(note.alone for note in notes)


def test_a_suspect_is_on_its_way_alone():
    reader, notes = Reader(), []
    note = Attempt(shard=0, pid=1, images=[], suspects=[5, 6])
    for arrivals in read_ahead(reader, IMAGES, range(12), note, notes.append, most=8):
        places = {place for place, _ in arrivals}
        if notes[-1].alone:
            assert places == set(notes[-1].images) == reader.held
        for _, finish in arrivals:
            finish()
    assert [note.images for note in notes if note.alone] == [[5], [6]]


def test_a_consumer_that_stops_leaves_nothing_held():
    reader = Reader()
    arrivals = read_ahead(reader, IMAGES, range(40), Attempt(shard=0, pid=1, images=[]), lambda note: None, most=2)
    for _, finish in next(arrivals):
        finish()
    assert reader.held
    arrivals.close()
    assert not reader.held


def test_few_are_taken_at_once_rather_than_waited_for():
    """The second image needs the memory that the first one holds: waiting for both would never end."""
    free = threading.Semaphore(1)

    class Tight:
        def begin(self, images, arrived):
            def read():
                for place in images:
                    free.acquire()
                    arrived.put((place, finish))

            threading.Thread(target=read, daemon=True).start()

    def finish():
        free.release()
        return SeenImage({}, None)

    taken = []
    for arrivals in read_ahead(
        Tight(), IMAGES, range(6), Attempt(shard=0, pid=1, images=[]), lambda note: None, most=4
    ):
        taken += [finish() for _, finish in arrivals]
    assert len(taken) == 6

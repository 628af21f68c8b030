"""Reading ahead: memory is bounded by settings, an image is noted before it is read, and nothing stays held."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import pytest

from carray.bundle.bundle_folder import open_bundle
from carray.classify import read_images
from carray.classify.attempts import Attempt
from carray.classify.predictions_folder import ClassifySettings, PlannedImage
from carray.classify.read_images import ImageReader, read_ahead
from carray.core.at_once import ByteBudget
from carray.core.errors import DataError, FetchError
from carray.core.store.image_bytes import FetchedImage
from carray.images import read
from carray.images.read import ReadImage


def see(reader, images):
    """Read images, and decode each as it comes; gives what became of them in their order."""
    arrived, seen = SimpleQueue(), {}
    reader.begin(dict(enumerate(images)), arrived)
    for _ in images:
        index, finish = arrived.get(timeout=30)
        seen[index] = finish()
    return [seen[i] for i in range(len(images))]


def test_bytes_in_hand_never_pass_the_limit():
    budget, lock, seen = ByteBudget(100), threading.Lock(), []
    held = 0

    def hold(size):
        nonlocal held
        budget.take(size)
        with lock:
            held += size
            seen.append(held)
        time.sleep(0.002)
        with lock:
            held -= size
        budget.give_back(size)

    threads = [threading.Thread(target=hold, args=(size,)) for size in [30, 60, 90, 10] * 10]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert 60 < max(seen) <= 100


def test_one_that_is_larger_than_the_limit_is_held_alone():
    budget = ByteBudget(100)
    budget.take(10)
    waiting = threading.Thread(target=budget.take, args=(500,))
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    budget.give_back(10)
    waiting.join(5)
    assert not waiting.is_alive()


def test_an_original_above_the_limit_is_a_row_and_is_not_read(small_bundle, tmp_path, make_image):
    (tmp_path / "small.jpg").write_bytes(make_image(0))
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(2_000_001)  # a hole: no disk is used
    reader = ImageReader(ClassifySettings(max_image_mb=2), open_bundle(small_bundle).pixels)
    images = [PlannedImage(str(tmp_path / name)) for name in ("small.jpg", "huge.jpg")]
    small, huge = see(reader, images)
    assert small.status == "ok"
    assert (huge.status, huge.error_code) == ("decode_error", "too_large")
    assert "at most max_image_mb = 2 are read" in huge.error
    assert huge.pixels_HWC is None


def test_the_budget_is_given_back_whatever_happens(small_bundle, monkeypatch):
    """More failures than the budget has room for, of every kind, and bodies that are read again."""
    reader = ImageReader(ClassifySettings(fetch_memory_mb=1), open_bundle(small_bundle).pixels)

    def fetch(uri, *, escaped, admit):
        admit(900_000)
        if uri.endswith("again"):
            admit(900_000)
        if uri.endswith("gone"):
            raise FetchError("unavailable", "gone")
        return FetchedImage(b"no image", None)

    monkeypatch.setattr(read, "fetch_image", fetch)
    images = [PlannedImage(f"{i} {kind}") for i in range(5) for kind in ("gone", "again", "broken")]
    codes = [seen.error_code for seen in see(reader, images)]
    assert codes == ["unavailable", "unsupported", "unsupported"] * 5


def test_a_bug_is_raised_where_the_image_is_taken(small_bundle, monkeypatch):
    reader = ImageReader(ClassifySettings(), open_bundle(small_bundle).pixels)
    monkeypatch.setattr(read, "fetch_image", lambda uri, *, escaped, admit: 1 / 0)
    with pytest.raises(RuntimeError, match="reading '/a.jpg' failed with ZeroDivisionError"):
        see(reader, [PlannedImage("/a.jpg")])


def test_damage_is_damage_to_every_command(small_bundle, tmp_path, make_image):
    from carray.bundle.scorer import Classifier
    from carray.manifest.manifest_file import read_manifest, read_row
    from carray.manifest.prepare import prepare
    from carray.tensors.block import ensure_block

    for label in ("a", "b"):
        (tmp_path / "cars" / label).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "cars" / label / f"{i}.jpg").write_bytes(make_image(i + 9 * (label == "a"), width=200))
    damaged = tmp_path / "cars" / "a" / "0.jpg"
    damaged.write_bytes(damaged.read_bytes()[:1200] + b"\xff\xd9")
    info = open_bundle(small_bundle)
    (classified,) = see(ImageReader(ClassifySettings(), info.pixels), [PlannedImage(str(damaged))])
    (predicted,) = Classifier.load(small_bundle).predict([damaged]).to_dict("records")
    prepare(str(tmp_path / "cars"), out=str(tmp_path / "manifest.parquet"))
    manifest = read_manifest(str(tmp_path / "manifest.parquet"))
    (prepared,) = manifest.rows[manifest.rows["uri"] == str(damaged)].to_dict("records")
    evaluated = read_row(prepared, info.pixels, crop_boxes=False, as_input=True)
    rows = [classified.columns, predicted, prepared, evaluated.columns]
    for row in rows:
        assert (row["status"], row["error_code"]) == ("decode_error", "damaged")
        assert "libjpeg: Corrupt JPEG data: premature end" in row["error"]
    manifest.rows.loc[manifest.rows["uri"] == str(damaged), ["status", "split"]] = ["ok", "train"]  # as prepared before
    with pytest.raises(DataError, match="cannot be used: .*libjpeg"):
        ensure_block(manifest, info.pixels)


IMAGES = [PlannedImage(f"/{i}.jpg") for i in range(40)]


class Reader:
    """Gives images at once, the later first, and counts what is neither finished nor dropped."""

    def __init__(self):
        self.held, self.most_held = set(), 0

    def begin(self, images, arrived):
        for index in reversed(list(images)):
            self.held.add(index)
            self.most_held = max(self.most_held, len(self.held))
            arrived.put((index, lambda index=index: self.finish(index)))

    def finish(self, index):
        self.held.remove(index)
        return ReadImage(error=IMAGES[index].uri)


@pytest.fixture
def short_windows(monkeypatch):
    monkeypatch.setattr(read_images, "WINDOW_IMAGES", 4)
    monkeypatch.setattr(read_images, "NOTE_IMAGES", 10)


def test_each_image_comes_once_and_is_noted_before(short_windows):
    reader, notes, came = Reader(), [], []
    for arrivals in read_ahead(reader, IMAGES, range(3, 40), Attempt(shard=0, pid=1, images=[]), notes.append, most=3):
        assert 1 <= len(arrivals) <= 3
        for index, finish in arrivals:
            assert index in notes[-1].images
            assert finish().error == IMAGES[index].uri
            came.append(index)
    assert sorted(came) == list(range(3, 40))
    assert reader.most_held <= 2 * 4
    assert len(notes) == 4
    assert not any(note.alone for note in notes)


def test_a_suspect_is_on_its_way_alone(short_windows):
    reader, notes = Reader(), []
    note = Attempt(shard=0, pid=1, images=[], suspects=[5, 6])
    for arrivals in read_ahead(reader, IMAGES, range(12), note, notes.append, most=8):
        indices = {index for index, _ in arrivals}
        if notes[-1].alone:
            assert indices == set(notes[-1].images) == reader.held
        for _, finish in arrivals:
            finish()
    assert [note.images for note in notes if note.alone] == [[5], [6]]


def test_a_consumer_that_stops_leaves_nothing_held(short_windows):
    reader = Reader()
    arrivals = read_ahead(reader, IMAGES, range(40), Attempt(shard=0, pid=1, images=[]), lambda note: None, most=2)
    for _, finish in next(arrivals):
        finish()
    assert reader.held
    arrivals.close()
    assert not reader.held


def test_few_are_taken_at_once_rather_than_waited_for(short_windows):
    """The second image needs the memory that the first one holds: waiting for both would never end."""
    free = threading.Semaphore(1)

    class Tight:
        def begin(self, images, arrived):
            def read_each():
                for index in images:
                    free.acquire()
                    arrived.put((index, finish))

            threading.Thread(target=read_each, daemon=True).start()

    def finish():
        free.release()
        return ReadImage()

    taken = []
    for arrivals in read_ahead(
        Tight(), IMAGES, range(6), Attempt(shard=0, pid=1, images=[]), lambda note: None, most=4
    ):
        taken += [finish() for _, finish in arrivals]
    assert len(taken) == 6

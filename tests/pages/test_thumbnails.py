"""Images read again: upright, small, and honest about what is not there any more."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from carray.core.errors import FetchError, StorageError
from carray.core.store.image_bytes import fetch_image
from carray.images import read
from carray.pages import thumbnails
from carray.pages.thumbnails import THUMBNAIL_PIXELS, Thumbnail, read_thumbnails


def _pixels(thumbnail: Thumbnail) -> np.ndarray:
    head, _, data = thumbnail.data_uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def _etag(path: Path) -> str | None:
    return fetch_image(str(path)).etag


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [(672, 448, (168, 112)), (448, 672, (112, 168)), (96, 64, (96, 64)), (1, 1, (1, 1)), (3000, 2, (168, 1))],
)
def test_a_picture_keeps_its_shape_and_is_never_enlarged(
    tmp_path: Path, make_image: Callable[..., bytes], width: int, height: int, shown: tuple[int, int]
) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(make_image(width=width, height=height, format="PNG"))
    [made] = read_thumbnails([(str(path), _etag(path))])
    assert (made.width, made.height, made.reason, made.changed) == (*shown, "", False)
    assert _pixels(made).shape == (shown[1], shown[0], 3)
    assert len(made.data_uri) < 20_000


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    pixels_HWC = np.zeros((400, 300, 3), dtype=np.uint8)
    pixels_HWC[:200, :, 0] = 255  # red above, as it should be seen
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, to be turned right
    path = tmp_path / "turned.jpg"
    Image.fromarray(pixels_HWC).rotate(90, expand=True).save(path, exif=exif.tobytes())
    [made] = read_thumbnails([(str(path), None)])
    seen = _pixels(made)
    assert (made.width, made.height) == (126, THUMBNAIL_PIXELS)
    assert seen[20, 60, 0] > 200 and seen[150, 60, 0] < 60


def test_another_etag_says_so_and_no_etag_says_nothing(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(make_image(1))
    before = _etag(path)
    path.write_bytes(make_image(2, width=100))
    changed, unknown, same = read_thumbnails([(str(path), before), (str(path), None), (str(path), _etag(path))])
    assert (changed.changed, unknown.changed, same.changed) == (True, False, False)
    assert changed.data_uri == same.data_uri  # what is there now


def test_what_cannot_be_read_says_why_in_its_place(
    tmp_path: Path, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "_MOST_MB", 0.01)
    contents = {"good": make_image(), "cut": make_image()[:-500], "text": b"no image", "large": bytes(20_000)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    names = ["cut", "absent", "good", "text", "large"]
    made = dict(zip(names, read_thumbnails([(str(tmp_path / name), None) for name in names]), strict=True))
    assert made["good"].data_uri and not made["good"].reason
    reasons = {name: thumbnail.reason for name, thumbnail in made.items() if not thumbnail.data_uri}
    assert reasons.keys() == {"cut", "absent", "text", "large"}
    assert "truncated" in reasons["cut"] or "damaged" in reasons["cut"]
    assert reasons["absent"] == "the file does not exist"
    assert "not an image" in reasons["text"]
    assert "not read again" in reasons["large"]


def test_names_with_percent_signs_and_names_that_are_not_utf8(tmp_path: Path, make_image: Callable[..., bytes]) -> None:
    (tmp_path / "100%.jpg").write_bytes(make_image())
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb") as file:
        file.write(make_image())
    made = read_thumbnails([(f"{tmp_path}/100%.jpg", None), (f"{tmp_path}/caf%E9.jpg", None)])
    assert all(thumbnail.data_uri for thumbnail in made)


def test_a_store_that_does_not_answer_is_not_asked_for_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def away(uri: str, **_: object) -> None:
        asked.append(uri)
        raise FetchError("timeout", "no whole answer after 5 tries")

    monkeypatch.setattr(read, "fetch_image", away)
    made = read_thumbnails([(f"s3://b/{i}.jpg", None) for i in range(300)])
    assert len(asked) < 60
    assert made[-1].reason.startswith("not tried") and "no whole answer" in made[0].reason


def test_credentials_that_expired_are_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def expired(uri: str, **_: object) -> None:
        raise StorageError("the credentials at hand have expired")

    monkeypatch.setattr(read, "fetch_image", expired)
    assert "expired" in read_thumbnails([("s3://b/1.jpg", None)])[0].reason


def test_the_order_is_that_of_the_question(image_folder: Path) -> None:
    paths = sorted(image_folder.rglob("*.jpg"))
    together = read_thumbnails([(str(path), None) for path in paths])
    assert [made.data_uri for made in together] == [read_thumbnails([(str(path), None)])[0].data_uri for path in paths]
    assert len({made.data_uri for made in together}) == len(paths)

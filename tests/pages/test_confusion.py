from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from carray.pages.confusion import confusion_png, confusion_svg


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


@pytest.mark.parametrize("class_count", [1, 6, 196])
def test_any_number_of_classes_gives_a_picture(class_count: int) -> None:
    counts_KK = np.random.default_rng(0).integers(0, 5, (class_count, class_count))
    pixels_HWC = _pixels(confusion_png(counts_KK, [f"Make{i // 4} Model{i} 2012" for i in range(class_count)]))
    assert 400 < pixels_HWC.shape[0] < 2000
    assert len(np.unique(pixels_HWC.reshape(-1, 3), axis=0)) > 20


def test_rows_are_normalised_so_ten_times_the_images_look_the_same() -> None:
    # 13 classes: names are drawn, counts are not, so the cells alone are compared.
    counts_KK = np.random.default_rng(1).integers(0, 4, (40, 40))
    names = [f"class {i}" for i in range(40)]
    once, tenfold = _pixels(confusion_png(counts_KK, names)), _pixels(confusion_png(counts_KK * 10, names))
    assert (once[200:] == tenfold[200:]).all()


def test_a_class_without_images_is_a_grey_row() -> None:
    counts_KK = np.diag([4, 0, 4])
    grey = (_pixels(confusion_png(counts_KK, ["a", "b", "c"])) == 204).all(axis=2)
    assert grey.any(axis=1).sum() > 30
    assert not (_pixels(confusion_png(np.diag([4, 4, 4]), ["a", "b", "c"])) == 204).all(axis=2).any(axis=1).sum() > 30


def test_names_of_any_length_leave_room_for_the_matrix() -> None:
    names = ["a" * 500, "two\nlines and $x_1$ and <b>", *(f"class {i} of some length" for i in range(20))]
    counts_KK = np.diag(np.arange(1, 23))
    for written in (confusion_svg(counts_KK, names, title="Matrix"), confusion_png(counts_KK, names).hex()):
        assert len(written) > 5000
    svg = confusion_svg(counts_KK, names, title="Matrix")
    assert "a" * 39 + "…" in svg and "a" * 41 not in svg
    assert "two lines and $x_1$ and &lt;b&gt;" in svg


def test_above_thirty_classes_each_make_has_one_tick() -> None:
    names = [f"Chevrolet Silverado {i} of a very long name Crew Cab 2012" for i in range(20)]
    names += [f"Ford F-{i} Sedan 2012" for i in range(20)]
    svg = confusion_svg(np.diag(np.arange(1, 41)), names, title="Matrix")
    assert svg.count(">Chevrolet<") == svg.count(">Ford<") == 2  # beside rows and below columns
    assert svg.count("<text") == 6  # and the two axes' own names


def test_the_svg_takes_the_pages_colours_and_holds_one_picture_of_cells() -> None:
    svg = confusion_svg(np.diag([4, 0, 4]), ["a", "b", "c"], title="Matrix")
    assert "var(--ink)" in svg and svg.count("<image") == 1
    assert "data:image/png;base64" in svg
    assert ">b (0)<" in svg

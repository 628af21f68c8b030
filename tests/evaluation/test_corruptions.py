"""Each corruption does what its name says, deterministically, and gives bytes that the one decoder reads."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from carray.evaluation.corruptions import CORRUPTIONS, PICTURE_SIDE, REENCODED, as_picture
from carray.images.pixels import PixelSettings, decode, decode_original, view

WIDTH, HEIGHT = 160, 120


@pytest.fixture(scope="module")
def original_HWC() -> np.ndarray:
    """Draw coarse colours with a fine pattern on them, so that blur and low resolution have something to take away."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(60, 200, (6, 8, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
    pattern = random.integers(-40, 40, (HEIGHT, WIDTH, 1))
    return (np.asarray(coarse).astype(int) + pattern).clip(0, 255).astype(np.uint8)


def corrupted(original_HWC: np.ndarray, name: str) -> list[np.ndarray]:
    """Give what each severity of a corruption leaves, the weakest first."""
    picture = as_picture(original_HWC, decode_size=96)
    return [decode_original(corruption.apply(picture)) for corruption in CORRUPTIONS if corruption.name == name]


def detail(pixels_HWC: np.ndarray) -> float:
    return float(np.abs(np.diff(pixels_HWC.astype(float), axis=1)).mean())


def test_every_corruption_gives_the_same_readable_bytes_again(original_HWC: np.ndarray) -> None:
    settings = PixelSettings(decode_size=96, input_size=80)
    picture = as_picture(original_HWC, decode_size=96)
    for corruption in CORRUPTIONS:
        data = corruption.apply(picture)
        assert data == corruption.apply(picture)
        assert view(decode(data, settings).pixels_HWC, settings).shape == (80, 80, 3)


def test_the_control_changes_no_pixel(original_HWC: np.ndarray) -> None:
    assert np.array_equal(corrupted(original_HWC, REENCODED)[0], original_HWC)


@pytest.mark.parametrize("name", ["blur", "jpeg", "low_resolution"])
def test_what_takes_detail_away_takes_more_at_each_severity(original_HWC: np.ndarray, name: str) -> None:
    def change(pixels_HWC: np.ndarray) -> float:
        again = Image.fromarray(pixels_HWC).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        return float(np.abs(np.asarray(again).astype(float) - original_HWC).mean())

    changes = [change(pixels_HWC) for pixels_HWC in [original_HWC, *corrupted(original_HWC, name)]]
    # The weakest low resolution, 128 pixels, is more than this picture has.
    assert changes == sorted(changes) and changes[-1] > changes[0]
    if name == "blur":
        details = [detail(pixels_HWC) for pixels_HWC in corrupted(original_HWC, name)]
        assert details[0] < 0.9 * detail(original_HWC)
        assert details[2] < details[1] < details[0]


def test_low_resolution_never_makes_a_picture_larger(original_HWC: np.ndarray) -> None:
    assert [min(pixels_HWC.shape[:2]) for pixels_HWC in corrupted(original_HWC, "low_resolution")] == [120, 64, 32]


def test_a_crop_is_the_middle(original_HWC: np.ndarray) -> None:
    first = corrupted(original_HWC, "crop")[0]
    assert np.array_equal(first, original_HWC[12:108, 16:144])


def test_grey_has_no_colour_and_keeps_its_lights(original_HWC: np.ndarray) -> None:
    (grey,) = corrupted(original_HWC, "grey")
    assert np.ptp(grey, axis=2).max() == 0
    luma = original_HWC @ np.array([0.299, 0.587, 0.114])
    assert np.abs(grey[:, :, 0] - luma).max() <= 1


def test_a_rotation_turns_left_about_the_middle_and_leaves_no_black_corner() -> None:
    white_HWC = np.full((HEIGHT, WIDTH, 3), 255, dtype=np.uint8)
    assert all(pixels_HWC.min() == 255 for pixels_HWC in corrupted(white_HWC, "rotation"))
    dotted_HWC = white_HWC.copy()
    dotted_HWC[58:62, 138:142] = 0  # 60 pixels right of the middle
    turned = corrupted(dotted_HWC, "rotation")[2]
    rows, columns = np.nonzero(turned[:, :, 0] < 100)
    assert turned.shape == dotted_HWC.shape
    assert abs(rows.mean() - (60 - 60 * np.sin(np.radians(30)))) < 1.5
    assert abs(columns.mean() - (80 + 60 * np.cos(np.radians(30)))) < 1.5


@pytest.mark.parametrize(("name", "factors"), [("darkness", [0.5, 0.25]), ("brightness", [1.5, 2.0])])
def test_light_is_multiplied(original_HWC: np.ndarray, name: str, factors: list[float]) -> None:
    for pixels_HWC, factor in zip(corrupted(original_HWC, name), factors, strict=True):
        assert np.abs(pixels_HWC - (original_HWC * factor).clip(0, 255)).max() <= 1


def test_jpeg_is_a_jpeg_file(original_HWC: np.ndarray) -> None:
    picture = as_picture(original_HWC, decode_size=96)
    files = [corruption.apply(picture) for corruption in CORRUPTIONS if corruption.name == "jpeg"]
    assert {Image.open(io.BytesIO(data)).format for data in files} == {"JPEG"}
    assert len(files[2]) < len(files[1]) < len(files[0])


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 400), (400, 3), (7, 900)])
def test_the_oddest_shapes_are_no_exception(width: int, height: int) -> None:
    settings = PixelSettings(decode_size=96, input_size=80)
    picture = as_picture(np.full((height, width, 3), 90, dtype=np.uint8), decode_size=96)
    for corruption in CORRUPTIONS:
        assert decode(corruption.apply(picture), settings).pixels_HWC.shape == (96, 96, 3)


def test_a_large_original_is_brought_down_but_not_below_what_is_decoded() -> None:
    original_HWC = np.zeros((900, 1200, 3), dtype=np.uint8)
    assert min(as_picture(original_HWC, decode_size=224).size) == PICTURE_SIDE
    assert min(as_picture(original_HWC, decode_size=800).size) == 800
    assert as_picture(original_HWC[:300], decode_size=224).size == (1200, 300)

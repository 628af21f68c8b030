"""Makes small JPEGs of images, for pages."""

from __future__ import annotations

import io

from carray.images.pixels import Box, PixelSettings
from carray.images.read import ReadImage

__all__ = ["picture_settings", "small_jpeg"]


def picture_settings(longer_side: int) -> PixelSettings:
    """Give the settings to read an image with for `small_jpeg`: squeezed into a square."""
    return PixelSettings(decode_size=longer_side, input_size=longer_side, aspect="squash")


def small_jpeg(
    read: ReadImage, *, quality: int, box: Box | None = None, shortest: int = 1, enlarge: bool = False
) -> tuple[bytes, int, int]:
    """Stretch a readable image's square back to its shape: JPEG bytes, width and height.

    Args:
        read: Read with `picture_settings`; its square's side is the picture's longer side.
        quality: Of the JPEG, 1..95.
        box: What the image was cut to.
        shortest: Least side in pixels, so that a very long image can be seen.
        enlarge: Whether an image smaller than the square is enlarged.

    Raises:
        ValueError: the image could not be read.
    """
    from PIL import Image

    if read.pixels_HWC is None or read.width is None or read.height is None:
        raise ValueError(f"there is no picture of an image that was not read: {read.error}")
    width, height = read.width, read.height
    if box is not None:
        width, height = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
    scale = len(read.pixels_HWC) / max(width, height)
    scale = scale if enlarge else min(1.0, scale)
    size = max(shortest, round(width * scale)), max(shortest, round(height * scale))
    buffer = io.BytesIO()
    picture = Image.fromarray(read.pixels_HWC).resize(size, Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue(), *size

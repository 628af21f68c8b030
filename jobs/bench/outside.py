"""Makes images that show no car: tiles of photographs that installed packages ship, and drawn pages and patterns.

From: the files of scikit-image, scikit-learn and matplotlib; a seed. To: PNG files and outside.parquet (uri, kind,
source), which `carray stress --outside` takes.

    photographs   what a camera sees: a cat, a cup, a temple, grass, and a motorcycle, the nearest to a car
    instruments   the moon, cells, a retina, distant galaxies
    drawn         pages of text, charts, noise, flat colours: easy, and therefore measured apart

Invariants: the same packages and seed give the same pixels; tiles of one photograph share its source; of a stereo pair
one picture is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["make_outside"]

_SKIMAGE, _SKLEARN, _MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"
_PHOTOGRAPHS = {
    "photographs": [
        *(f"{_SKIMAGE}/{name}.png" for name in "astronaut brick camera chelsea clock_motion coffee coins".split()),
        *(f"{_SKIMAGE}/{name}.png" for name in "grass gravel motorcycle_left page text".split()),
        f"{_SKIMAGE}/rocket.jpg",
        *(f"{_SKLEARN}/china.jpg", f"{_SKLEARN}/flower.jpg", f"{_MATPLOTLIB}/grace_hopper.jpg"),
    ],
    "instruments": [
        *(f"{_SKIMAGE}/{name}.png" for name in "cell ihc moon".split()),
        *(f"{_SKIMAGE}/hubble_deep_field.jpg", f"{_SKIMAGE}/retina.jpg"),
    ],
}
TILES = 8
"""Of each photograph, beside the whole of it; one that is no larger than a tile has none to give."""
DRAWN = 30
"""Of each sort."""
TILE_SIDE = 160
"""Least side of a part, pixels: less would be blown up too far, and betrayed by its blur."""
SIDE = 256
"""Short side of every image, pixels: that of the photographs of Stanford Cars, so that sharpness tells nothing."""


def make_outside(folder: Path, *, seed: int = 0) -> Path:
    """Write the images and their table into a folder, and give the table's path.

    Raises:
        FileNotFoundError: an installed package no longer ships a photograph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for kind, source, picture in [*_tiles(seed), *_drawings(seed)]:
        name = f"{kind}-{len(rows):04d}.png"
        _of_side(picture).save(folder / name, compress_level=1)
        rows.append({"uri": name, "kind": kind, "source": source})
    table = folder / "outside.parquet"
    pd.DataFrame(rows).to_parquet(table, index=False)
    return table


def _of_side(picture: Any) -> Any:
    from PIL import Image

    scale = SIDE / min(picture.size)
    return picture.resize([max(SIDE, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def _tiles(seed: int) -> Iterator[tuple[str, str, Any]]:
    """Give each photograph, and parts of a half to nine tenths of its sides, of TILE_SIDE at least if it has that."""
    from PIL import Image

    random = np.random.default_rng([seed, 0])
    for kind, paths in _PHOTOGRAPHS.items():
        for path in paths:
            package, _, below = path.partition("/")
            with resources.as_file(resources.files(package).joinpath(below)) as file:
                photograph = Image.open(file).convert("RGB")
            yield kind, path, photograph
            for _ in range(TILES):
                sides = [max(min(TILE_SIDE, side), round(random.uniform(0.5, 0.9) * side)) for side in photograph.size]
                corner = [random.integers(whole - side + 1) for whole, side in zip(photograph.size, sides, strict=True)]
                ends = [start + side for start, side in zip(corner, sides, strict=True)]
                yield kind, path, photograph.crop((int(corner[0]), int(corner[1]), int(ends[0]), int(ends[1])))


def _drawings(seed: int) -> Iterator[tuple[str, str, Any]]:
    sorts: list[Callable[[np.random.Generator], Any]] = [_page, _chart, _noise, _flat]
    for number, draw in enumerate(sorts):
        random = np.random.default_rng([seed, 1 + number])
        for i in range(DRAWN):
            yield "drawn", f"{draw.__name__.strip('_')} {i}", draw(random)


def _page(random: np.random.Generator) -> Any:
    """Draw a page of words that mean nothing."""
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (400, 300), tuple(int(value) for value in random.integers(225, 256, 3)))
    pen, size = ImageDraw.Draw(page), int(random.integers(10, 22))
    font, letters = ImageFont.load_default(size), "etaoinshrdlu"
    for top in range(16, 290 - size, round(1.5 * size)):
        words = ["".join(random.choice(list(letters), int(random.integers(2, 9)))) for _ in range(40)]
        line = " ".join(words)[: int(random.integers(20, 640 // size))]
        pen.text((16, top), line, fill=(20, 20, 30), font=font)
    return page


def _chart(random: np.random.Generator) -> Any:
    """Draw lines, bars, points or a pie with matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4, 3), dpi=100, layout="constrained")
    axes, values = figure.subplots(), random.uniform(1, 9, (3, 12))
    match int(random.integers(4)):
        case 0:
            axes.plot(values.cumsum(axis=1).T)
        case 1:
            axes.bar(range(12), values[0], color=random.uniform(0, 1, 3))
        case 2:
            axes.scatter(values[0], values[1], s=40 * values[2], color=random.uniform(0, 1, 3))
        case _:
            axes.pie(values[0, :5], labels=list("abcde"))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _noise(random: np.random.Generator) -> Any:
    """Draw random colours in grains from 1 to 32 pixels."""
    from PIL import Image

    grain = 2 ** int(random.integers(0, 6))
    shape = (-(-SIDE // grain), -(-384 // grain), 3)
    coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    smooth = Image.Resampling.BILINEAR if random.random() < 0.5 else Image.Resampling.NEAREST
    return coarse.resize((384, SIDE), smooth)


def _flat(random: np.random.Generator) -> Any:
    """Draw one colour, or a passage from one to another."""
    from PIL import Image

    ends = random.integers(0, 256, (2, 1, 3))
    if random.random() < 0.5:
        ends[1] = ends[0]
    share = np.linspace(0, 1, 384)[None, :, None]
    return Image.fromarray(np.broadcast_to(ends[0] * (1 - share) + ends[1] * share, (SIDE, 384, 3)).astype(np.uint8))

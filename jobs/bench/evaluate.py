"""Measures what corrupted images cost a bundle, and how well ood_score separates images without cars.

    python -m jobs.bench.evaluate --bundle runs/cars/run/bundle --manifest runs/cars/manifest.parquet [--images 300]

Reads what jobs.bench.cars leaves. Appends to results/robustness.csv and results/outliers.csv. Cost: classifying 22
images for each one, about 8 minutes for all 815 test images on two cores. Ends with one JSON line. The images without
cars are tiles of photographs that installed packages ship, and drawings; the same packages and seed give the same ones:

    photographs   a cat, a cup, a temple, grass, and a motorcycle, the nearest to a car
    instruments   the moon, cells, a retina, distant galaxies
    drawn         pages of text, charts, noise, flat colours: easy, and therefore measured separately
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from carray.evaluation.stress import stress
from jobs.bench.rows import ROOT, Program

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
"""Per photograph, besides the whole of it."""
DRAWN = 30
"""Images of each drawn sort."""
TILE_SIDE = 160
"""Least side of a tile, pixels: a smaller one would be recognised by its blur."""
SIDE = 256
"""Short side of every image, pixels: that of Stanford Cars, so that sharpness does not give them away."""


def main() -> None:
    """Measure, write the results, and print them."""
    program, cars = Program(__doc__, "robustness.csv"), ROOT / "runs" / "cars"
    program.option("--bundle", default=cars / "run" / "bundle", type=Path, help="folder of the bundle")
    program.option("--manifest", default=cars / "manifest.parquet", type=Path, help="of the bundle's own classes")
    program.option("--images", default=0, type=int, help="of the test split; 0 takes all")
    program.option("--seed", default=0, type=int, help="of the sample, the tiles, the drawings and the intervals")
    program.option("--work", default=ROOT / "runs" / "stress", type=Path, help="folder of images and tables")
    given = program.parse()
    if not (given.bundle / "bundle.json").exists():
        program.parser.error(
            f"--bundle is {given.bundle}, which holds no bundle.json; run jobs.bench.cars, or name one"
        )
    outside, out = make_outside(given.work / "outside", seed=given.seed), given.work / "tables"
    tables = measure(given.bundle, given.manifest, outside=outside, out=out, images=given.images, seed=given.seed)
    for name, rows in tables.items():
        program.table, given.results = f"{name}.csv", given.results.with_name(f"{name}.csv")
        program.record(rows)
    auroc = {row["kind"]: row["auroc"] for row in tables["outliers"]}
    print(json.dumps({"top1": tables["robustness"][0]["top1"], "auroc_of_ood_score": auroc}))


def measure(
    bundle: Path, manifest: Path, *, outside: Path, out: Path, images: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Run `stress`; returns the rows of `robustness` and `outliers`, each with bundle, runtime and seed."""
    found = stress(str(bundle), str(manifest), out=str(out), outside=str(outside), images=images or None, seed=seed)
    same = {name: found["robustness"][name] for name in ("bundle_id", "runtime", "seed")}
    corrupted = pd.read_parquet(out / "robustness.parquet").astype(object).where(lambda values: values.notna(), None)
    rows: dict[str, list[dict[Any, Any]]] = {
        "robustness": corrupted.to_dict("records"),
        "outliers": list(_outliers(found["outside"])),
    }
    return {
        table: [
            same | {str(name): round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            for row in of_table
        ]
        for table, of_table in rows.items()
    }


def _outliers(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, own in found["kinds"].items():
        yield {
            "kind": kind,
            "score": "centred_energy",  # the name of ood_score in earlier rows
            **{name: own[name] for name in ("auroc", "auroc_low", "auroc_high")},
            "fpr_at_95_tpr": None,
            "inside_images": found["inside_images"],
            "outside_images": own["scored"],
            "outside_sources": own["sources"],
        }


def make_outside(folder: Path, *, seed: int = 0) -> Path:
    """Write the images and their table (uri, kind, source) into a folder; returns the table's path.

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
    scale = SIDE / min(picture.size)
    return picture.resize([max(SIDE, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def _tiles(seed: int) -> Iterator[tuple[str, str, Any]]:
    """Yield each photograph, and tiles of a half to nine tenths of its sides."""
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
    """Draw a page of meaningless words."""
    from PIL import ImageDraw, ImageFont

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
    """Draw random colours in grains of 1 to 32 pixels."""
    grain = 2 ** int(random.integers(0, 6))
    shape = (-(-SIDE // grain), -(-384 // grain), 3)
    coarse = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
    smooth = Image.Resampling.BILINEAR if random.random() < 0.5 else Image.Resampling.NEAREST
    return coarse.resize((384, SIDE), smooth)


def _flat(random: np.random.Generator) -> Any:
    """Draw one colour, or a gradient between two."""
    ends = random.integers(0, 256, (2, 1, 3))
    if random.random() < 0.5:
        ends[1] = ends[0]
    share = np.linspace(0, 1, 384)[None, :, None]
    return Image.fromarray(np.broadcast_to(ends[0] * (1 - share) + ends[1] * share, (SIDE, 384, 3)).astype(np.uint8))


if __name__ == "__main__":
    main()

"""The commands that make data: a manifest of the user's images, or the demo's drawn ones."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.cli.options import Column, new_file, path
from carray.core.limits import MOST_COUNT

__all__ = ["demo", "prepare"]


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="Folders by class or split, Stanford Cars, a CSV/Parquet table, or a prefix.", parser=path("SOURCE")
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Manifest to write, a .parquet file; local or s3://.",
            parser=new_file("--out", suffix=".parquet"),
        ),
    ],
    layout: Annotated[
        str,
        typer.Option(help="auto, folder (no folder is a split), splits, stanford-cars, table or images (no labels)."),
    ] = "auto",
    label_from: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Folder names of the class: auto, path (all), N (the first N below the split) or -N (the last N).",
        ),
    ] = "auto",
    split: Annotated[
        str, typer.Option(help="Shares of train/val/test in percent, where the source gives no test split.")
    ] = "70/15/15",
    crop_boxes: Annotated[
        bool, typer.Option("--crop-boxes", help="Cut every image to its box, if it has one.")
    ] = False,
    extend: Annotated[
        str | None, typer.Option(help="Older manifest whose images keep their splits.", parser=path("--extend"))
    ] = None,
    column: Column = None,
    balance: Annotated[
        int | None, typer.Option(metavar="N", max=MOST_COUNT, help="Keep at most N training images of a class.")
    ] = None,
) -> None:
    """Read labelled images and write the manifest: one row an image, checked, hashed and split.

    Says first how the folders were read (layout, splits, classes, what was skipped), then how healthy the images are.

    Reads every image once; writes one Parquet file; deletes nothing. An unreadable image is a row with its reason.

    Cost: about 400 photographs a second and core.

    Example: `carray prepare photos/ --out manifest.parquet`
    """
    from carray.core.uri_tables import parse_columns
    from carray.manifest.prepare import prepare as build_manifest
    from carray.manifest.splits import parse_split

    report = build_manifest(
        source,
        out=out,
        layout=layout,
        label_from=label_from,
        split=parse_split(split),
        crop_boxes=crop_boxes,
        extend=extend,
        balance=balance,
        column=parse_columns(column or []),
        show=typer.echo,
    )
    typer.echo(report.text())


def demo(
    out: Annotated[
        str, typer.Option("--out", help="Folder for everything the demo makes.", parser=path("--out"))
    ] = "carray-demo",
) -> None:
    """Run everything once on drawn cars: prepare, tune, evaluate, classify, and three questions in pandas.

    Reads nothing from outside; writes only below OUT; needs no download.

    Cost: under 5 minutes on two cores.

    Example: `carray demo --out carray-demo`
    """
    from carray.demo import run_demo

    run_demo(out)

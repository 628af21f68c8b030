"""The commands prepare and demo."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.cli.options import Column, new_file_option, path_argument, path_option
from carray.core.limits import MOST_COUNT

__all__ = ["demo", "prepare"]


def prepare(
    source: Annotated[
        str,
        path_argument(
            "SOURCE", "Folders by class or by split, Stanford Cars, a CSV or Parquet table, or a bucket prefix."
        ),
    ],
    out: Annotated[str, new_file_option("Manifest to write, a .parquet file; local or s3://.", suffix=".parquet")],
    layout: Annotated[
        str,
        typer.Option(
            help="How SOURCE is organised: auto, folder (by class), splits, stanford-cars, table, images (no labels)."
        ),
    ] = "auto",
    label_from: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Folders that name the class: auto, path (all), N (the first N below the split) or -N (the last N).",
        ),
    ] = "auto",
    split: Annotated[
        str, typer.Option(help="Percentages of train/val/test, where the source gives no test split.")
    ] = "70/15/15",
    crop_boxes: Annotated[
        bool, typer.Option("--crop-boxes", help="Crop every image to its bounding box, if it has one.")
    ] = False,
    extend: Annotated[str | None, path_option("--extend", "Earlier manifest; its images keep their splits.")] = None,
    column: Column = None,
    balance: Annotated[
        int | None, typer.Option(metavar="N", max=MOST_COUNT, help="Use at most N training images of a class.")
    ] = None,
) -> None:
    """Read labelled images and write the manifest: one row an image, checked, hashed and assigned to a split.

    Prints how the source was understood (layout, splits, classes, skipped files), then a report on the images.

    Reads every image once. Writes one Parquet file; deletes nothing. An unreadable image becomes a row with the reason.

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
    out: Annotated[str, path_option("--out", "Folder for everything the demo makes.")] = "carray-demo",
) -> None:
    """Run the whole flow on drawn cars: prepare, tune, evaluate, classify, and three questions in pandas.

    Reads nothing from outside; writes only below OUT; needs no download.

    Cost: under 5 minutes on two cores.

    Example: `carray demo --out carray-demo`
    """
    from carray.demo import run_demo

    run_demo(out)

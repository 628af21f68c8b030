"""The commands that turn what others wrote into a page for people."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.cli.options import Predictions, SeedOption, new_file

__all__ = ["report"]


def report(
    predictions: Predictions,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            help="Page to write, such as report.html; local or s3://.",
            parser=new_file("--out", suffix=".html"),
        ),
    ],
    thumbnails: Annotated[
        int, typer.Option(metavar="N", help="Images read again at most, for small pictures; 0 reads none.")
    ] = 300,
    seed: SeedOption = 0,
) -> None:
    """Show what is in a bucket: one page of counts, failures, folders, near duplicates, and a gallery with filters.

    Reads OUT/*.parquet of carray classify, and of the images a few hundred again. Writes one HTML file that needs no
    network and nothing beside it. The last line of output is one JSON document.

    The page holds small copies of photographs, on which number plates and faces may be seen: mind whom you give it
    to. `--thumbnails 0` leaves them out.

    Cost: the counted columns once or twice, and one request a thumbnail; about 10 s for a few thousand rows.

    Example: `carray report predictions --out report.html`
    """
    from carray.core.progress import print_result
    from carray.pages.bucket import write_page

    print_result(write_page(predictions, out=out, thumbnails=thumbnails, seed=seed))

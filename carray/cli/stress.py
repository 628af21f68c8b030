"""The command that puts a bundle under stress."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.cli.options import Bundle, ManifestOption, SeedOption, path
from carray.core.limits import MOST_COUNT

__all__ = ["stress"]


def stress(
    bundle: Bundle,
    manifest: ManifestOption,
    out: Annotated[
        str,
        typer.Option(
            "--out", help="Folder for the tables; that of carray evaluate may be given.", parser=path("--out")
        ),
    ],
    outside: Annotated[
        str | None,
        typer.Option(
            help="Images that are no vehicles: a folder, or a Parquet table with uri, kind and source.",
            parser=path("--outside"),
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, max=MOST_COUNT, help="So many of the split, drawn by content; 0: all.")
    ] = 500,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    seed: SeedOption = 0,
    runtime: Annotated[str, typer.Option(help="fp32, int8, torch-bf16, or auto.")] = "fp32",
) -> None:
    """Measure what corrupted pictures cost a bundle, and how well ood_score tells images from outside.

    Reads the split's images and those of --outside. Writes robustness.parquet: top-1 under blur, JPEG, low resolution,
    crop, grey, rotation and light, with intervals. With --outside it writes outside.json: the probability that one of
    those images has a higher ood_score than one of the split (AUROC). The same command again reads what stands.

    Cost: that of classifying 22 times as many images as --images.

    Example: `carray stress run/bundle --manifest manifest.parquet --out evaluation --outside no-cars`
    """
    from carray.core.progress import print_result
    from carray.evaluation.stress import stress as measure
    from carray.evaluation.stress import summary_text

    found = measure(
        bundle, manifest, out=out, outside=outside, split=split, images=images or None, seed=seed, runtime=runtime
    )
    typer.echo(summary_text(found))
    robustness = found["robustness"]
    result = {"images": robustness["images"], "top1": robustness["top1"], "out": out}
    result |= {"worst_top1": {name: row["top1"] for name, row in robustness["worst"].items()}}
    if "outside" in found:
        result |= {"auroc": {kind: own["auroc"] for kind, own in found["outside"]["kinds"].items()}}
    print_result(result)

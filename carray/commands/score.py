"""The commands that use a bundle: measure it, classify a bucket with it, look at a few images."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.commands.options import Bundle, Config, ManifestOption, Settings, short_for

__all__ = ["classify", "evaluate", "predict"]


def evaluate(
    bundle: Bundle,
    manifest: ManifestOption,
    out: Annotated[str, typer.Option("--out", help="Folder for metrics.json, tables and confusion.png.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
) -> None:
    """Measure a bundle on a labelled split: top-1, top-5, loss, per-class table, confusions.

    Reads the split's images; writes metrics.json, per_class.parquet, confused_pairs.parquet, predictions.parquet and
    confusion.png.

    Cost: that of classifying the split once.

    Example: `carray evaluate run/bundle --manifest manifest.parquet --out evaluation`
    """
    from carray.core.progress import print_result
    from carray.evaluation.report import evaluate as measure
    from carray.evaluation.report import summary_text

    metrics = measure(bundle, manifest, split=split, out=out)
    typer.echo(summary_text(metrics))
    print_result({key: metrics[key] for key in ("images", "top1", "top5", "loss") if key in metrics} | {"out": out})


def classify(
    bundle: Bundle,
    source: Annotated[str, typer.Argument(help="Folder, s3://bucket/prefix, manifest or table of URIs.")],
    out: Annotated[str, typer.Option("--out", help="Predictions folder; local or s3://. Repeat to continue.")],
    split: Annotated[str | None, typer.Option(help="Of a manifest, this split only.")] = None,
    all_files: Annotated[bool, typer.Option("--all-files", help="Take every key, whatever its suffix.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score fetch_error rows again.")] = False,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Classify every image of a folder, bucket or table into Parquet, one row an image.

    Reads the images and the bundle; writes OUT/*.parquet, and its ledger under OUT/_carray/. A broken image is a row
    with its reason. The same command again does only what is missing. The last line of output is one JSON document.

    Cost: about 70 images a second on two cores for EfficientNet-Lite0 at 160 pixels; one GET an image on S3.

    Example: `carray classify run/bundle s3://photos/2026 --out s3://photos-predictions/2026`
    """
    from carray.core.progress import print_result
    from carray.core.settings import load_settings
    from carray.predictions.format import ClassifySettings
    from carray.predictions.on_ray import classify as run_classify

    overrides = short_for(settings, all_files=all_files or None, retry_failed=retry_failed or None, split=split)
    chosen = load_settings(ClassifySettings, config=config, overrides=overrides)
    print_result(run_classify(bundle, source, out=out, settings=chosen))


def predict(
    bundle: Bundle,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files; local or s3://.")],
) -> None:
    """Classify a few images and print a table with the five likeliest classes of each.

    Reads the bundle and the images; writes nothing; needs no Ray.

    Cost: about a second to start; images are scored one after another.

    Example: `carray predict run/bundle car.jpg`
    """
    from carray.bundle.predict import Classifier, prediction_text

    typer.echo(prediction_text(Classifier.load(bundle).predict(images)))

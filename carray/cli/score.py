"""The commands that use a bundle: measure it, classify a bucket with it, look at a few images."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from carray.cli.options import (
    Bundle,
    Column,
    Config,
    ManifestOption,
    Settings,
    Source,
    number,
    path,
    short_for,
)
from carray.core.limits import MOST_COUNT

__all__ = ["calibrate", "classify", "compact", "evaluate", "predict", "quantize"]


def quantize(
    bundle: Bundle,
    manifest: ManifestOption,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the file even if its certificate fails; only --runtime int8 takes it.")
    ] = False,
    split: Annotated[str, typer.Option(help="Labelled images to judge by: val or test.")] = "val",
) -> None:
    """Add the int8 runtime to a bundle that has none, with a certificate of what it loses against fp32.

    Reads the bundle and some of the manifest's training images and of those of --split. Writes model.int8.onnx into
    the bundle, unless it loses too much, and the certificate into bundle.json; the bundle's id stays. Images that the
    network was trained on do not judge: after a refit no validation image is left. Every newly packed bundle has been
    through this already, a refit with the network before it.

    Cost: about a minute for EfficientNet-Lite0 at 160 pixels, on one core.

    Example: `carray quantize run/bundle --manifest manifest.parquet`
    """
    from carray.bundle.originals import quantise_bundle
    from carray.core.progress import print_result

    info = quantise_bundle(bundle, manifest, keep=keep, split=split)
    certificate = info.certificates["int8"].model_dump(mode="json")
    print_result({"bundle": bundle, "bundle_id": info.bundle_id, "int8": certificate})


def calibrate(
    bundle: Bundle,
    manifest: ManifestOption,
    target_precision: Annotated[
        float,
        typer.Option(
            help="Share of accepted labels that are to be right, such as 0.98.", parser=number("--target-precision")
        ),
    ] = 0.95,
    split: Annotated[str, typer.Option(help="Labelled images that the bundle has not learned from.")] = "val",
) -> None:
    """Choose from which score a bundle's labels are accepted without a look, so that a stated share is right.

    Reads the split's images; writes the threshold and what it promises into bundle.json; the bundle's id stays. Where
    the precision cannot be shown with 95 % confidence, says why, and leaves the bundle as it is. A classification
    begun with another threshold is not continued with this one.

    Cost: that of classifying the split once.

    Example: `carray calibrate run/bundle --manifest manifest.parquet --target-precision 0.98`
    """
    from carray.core.progress import print_result
    from carray.evaluation.recalibrate import recalibrate

    info = recalibrate(bundle, manifest, target_precision=target_precision, split=split)
    promised = info.acceptance.model_dump(mode="json") if info.acceptance else None
    print_result(
        {
            "bundle": bundle,
            "bundle_id": info.bundle_id,
            "accept_threshold": info.accept_threshold,
            "acceptance": promised,
        }
    )


def evaluate(
    bundle: Bundle,
    manifest: ManifestOption,
    out: Annotated[
        str, typer.Option("--out", help="Folder for report.html, metrics.json and tables.", parser=path("--out"))
    ],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    runtime: Annotated[str, typer.Option(help="fp32, int8, torch-bf16, or auto.")] = "fp32",
) -> None:
    """Measure a bundle on a labelled split: how often it is right, where it is wrong, and what can be trusted.

    Reads the split's images; writes report.html, one page with accuracies and their intervals, kinds of mistakes with
    pictures, calibration, and what can be accepted without a look; the same as metrics.json and Parquet tables. Where
    the bundle has int8, it scores the same pixels, too, and stands beside its certificate.

    Cost: that of classifying the split once; with int8 in the bundle, 40 % more.

    Example: `carray evaluate run/bundle --manifest manifest.parquet --out evaluation`
    """
    from carray.core.progress import print_result
    from carray.evaluation.evaluate import evaluate as measure
    from carray.evaluation.evaluate import summary_text

    metrics = measure(bundle, manifest, split=split, out=out, runtime=runtime)
    typer.echo(summary_text(metrics))
    keys = ("runtime", "images", "unreadable", "top1", "top5", "macro_f1", "loss", "ece", "aurc")
    print_result({key: metrics[key] for key in keys if key in metrics} | {"out": out})


def classify(
    bundle: Bundle,
    source: Source,
    out: Annotated[
        str,
        typer.Option("--out", help="Predictions folder; local or s3://. Repeat to continue.", parser=path("--out")),
    ],
    split: Annotated[str | None, typer.Option(help="Of a manifest, this split only.")] = None,
    column: Column = None,
    all_files: Annotated[bool, typer.Option("--all-files", help="Take every key, whatever its suffix.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score fetch_error rows again.")] = False,
    only_new: Annotated[
        bool, typer.Option("--only-new", help="Leave out what --since has, unchanged and by this bundle.")
    ] = False,
    since: Annotated[
        str | None, typer.Option(help="Folder of an earlier run, for --only-new.", parser=path("--since"))
    ] = None,
    max_failed_fraction: Annotated[
        float | None,
        typer.Option(
            help="Stop once more than this fraction of the images failed, such as 0.2.",
            parser=number("--max-failed-fraction"),
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Scoring processes at most; as the CPUs allow if unset.")] = None,
    runtime: Annotated[str | None, typer.Option(help="auto, or one of the bundle's runtimes.")] = None,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Classify every image of a folder, bucket or table into Parquet, one row an image.

    Reads the images and the bundle; writes OUT/*.parquet, and its ledger under OUT/_carray/. A broken image is a row
    with its reason. The same command again does only what is missing. The last line of output is one JSON document.

    Cost: see results/classify.csv; one GET an image on S3.

    Example: `carray classify run/bundle s3://photos/2026 --out s3://photos-predictions/2026`
    """
    from carray.classify.classify_on_ray import classify as run_classify
    from carray.classify.predictions_folder import ClassifySettings
    from carray.core.progress import print_result
    from carray.core.settings import load_settings
    from carray.core.uri_tables import parse_columns

    _check_pair(only_new, since)
    overrides = short_for(
        settings,
        all_files=all_files or None,
        retry_failed=retry_failed or None,
        split=split,
        since=since,
        max_failed_fraction=max_failed_fraction,
        workers=workers,
        runtime=runtime,
    )
    overrides += [f"column.{what}={json.dumps(name)}" for what, name in parse_columns(column or []).items()]
    chosen = load_settings(ClassifySettings, config=config, overrides=overrides)
    print_result(run_classify(bundle, source, out=out, settings=chosen))


def _check_pair(only_new: bool, since: str | None) -> None:
    from carray.core.errors import SettingsError

    if only_new != (since is not None):
        given, missing = ("--only-new", "--since") if only_new else ("--since", "--only-new")
        raise SettingsError(f"{given} is given without {missing}; the two belong together.")


def compact(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder of a finished classify; local or s3://.", parser=path("OUT"))
    ],
    to: Annotated[str, typer.Option("--to", help="Folder for the merged files; local or s3://.", parser=path("--to"))],
    rows_per_file: Annotated[int, typer.Option(min=1, max=MOST_COUNT, help="Rows of one file.")] = 1_000_000,
) -> None:
    """Merge a finished run's many Parquet files into few large ones, in another folder.

    Reads OUT/*.parquet; writes TO/compact-*.parquet. OUT stays as it is: delete it when nobody reads it any more.

    Cost: that of reading and writing the tables once; memory for one file of rows.

    Example: `carray compact s3://photos-predictions/2026 --to s3://photos-predictions/2026-compact`
    """
    from carray.classify.compact import compact as merge
    from carray.core.progress import print_result

    print_result(merge(out, to=to, rows_per_file=rows_per_file))


def predict(
    bundle: Bundle,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files; local or s3://.", parser=path("IMAGE"))
    ],
) -> None:
    """Classify a few images and print a table with the five likeliest classes of each.

    Reads the bundle and the images; writes nothing; needs no Ray.

    Exit code: 0 when any image was scored, 2 when none could be read.

    Cost: about a second to start; images are scored one after another.

    Example: `carray predict run/bundle car.jpg`
    """
    from carray.bundle.scorer import Classifier, prediction_text

    predictions = Classifier.load(bundle).predict(images)
    typer.echo(prediction_text(predictions))
    _check_any_scored(predictions["status"])


def _check_any_scored(status: Iterable[str]) -> None:
    from carray.core.errors import DataError

    states = list(status)
    if "ok" not in states:
        raise DataError(f"none of {len(states):,} images could be scored; the lines above say why.")

"""The commands that use a bundle: complete and measure it, and classify images with it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from carray.cli.options import (
    AllFiles,
    Bundle,
    Column,
    Config,
    ManifestOption,
    ManifestSplit,
    Runtime,
    SeedOption,
    Settings,
    Source,
    number_option,
    path_argument,
    path_option,
    refuse,
    short_for,
)
from carray.core.errors import DataError
from carray.core.limits import MOST_COUNT
from carray.core.progress import print_result

__all__ = ["calibrate", "classify", "compact", "evaluate", "predict", "quantize", "stress"]

AnySplit = Annotated[str, typer.Option("--split", help="train, val or test.")]
MeasuredRuntime = Annotated[str, typer.Option("--runtime", help="fp32, int8, bf16, torch-bf16, or auto.")]


def quantize(
    bundle: Bundle,
    manifest: ManifestOption,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep int8 even if its certificate fails; only --runtime int8 will use it.")
    ] = False,
    split: Annotated[str, typer.Option(help="Labelled images for the certificate: val or test.")] = "val",
) -> None:
    """Add the int8 runtime to a bundle that has none, with a certificate of its accuracy compared with fp32.

    Reads the bundle, and training images and images of --split of the manifest. Writes model.int8.onnx into the
    bundle, unless it loses too much accuracy, and the certificate into bundle.json; the bundle_id stays. Images that
    the network was trained on do not count; after a refit no validation image is left. Every new bundle has been
    quantized when it was packed.

    Where it loses too much with all layers in integers, some are left in floats if it then still pays.

    Cost: about a minute for EfficientNet-Lite0 at 160 pixels, on one core; up to 150 s more to look for such layers.

    Example: `carray quantize run/bundle --manifest manifest.parquet`
    """
    from carray.bundle.certificates import quantise_bundle

    info = quantise_bundle(bundle, manifest, keep=keep, split=split)
    certificate = info.certificates["int8"].model_dump(mode="json")
    print_result({"bundle": bundle, "bundle_id": info.bundle_id, "int8": certificate})


def calibrate(
    bundle: Bundle,
    manifest: ManifestOption,
    target_precision: Annotated[
        float, number_option("--target-precision", "Wanted fraction of right labels among the accepted, such as 0.98.")
    ] = 0.95,
    split: Annotated[str, typer.Option(help="Labelled images that the bundle was not trained on.")] = "val",
) -> None:
    """Choose the score from which a bundle's labels are accepted without review, for a stated precision.

    Reads the split's images. Writes the threshold and its expected precision into bundle.json; the bundle_id stays.
    Where the precision cannot be shown with 95 % confidence, prints why and leaves the bundle as it is. A
    classification that began with another threshold cannot be resumed with the new one.

    Cost: that of classifying the split once.

    Example: `carray calibrate run/bundle --manifest manifest.parquet --target-precision 0.98`
    """
    from carray.evaluation.recalibrate import recalibrate

    info = recalibrate(bundle, manifest, target_precision=target_precision, split=split)
    acceptance = info.acceptance.model_dump(mode="json") if info.acceptance else None
    found = {"accept_threshold": info.accept_threshold, "acceptance": acceptance}
    print_result({"bundle": bundle, "bundle_id": info.bundle_id, **found})


def evaluate(
    bundle: Bundle,
    manifest: ManifestOption,
    out: Annotated[str, path_option("--out", "Folder for report.html, metrics.json and tables.")],
    split: AnySplit = "test",
    runtime: MeasuredRuntime = "fp32",
) -> None:
    """Measure a bundle on a labelled split: accuracy, kinds of mistakes, calibration, and what can be accepted.

    Reads the split's images. Writes report.html, one page with accuracies and their intervals, mistakes with pictures,
    calibration and coverage, and the same as metrics.json and Parquet tables. Where the bundle has int8, int8 scores
    the same pixels, and the result is compared with its certificate.

    Cost: that of classifying the split once; with int8 in the bundle, 40 % more.

    Example: `carray evaluate run/bundle --manifest manifest.parquet --out evaluation`
    """
    from carray.evaluation.evaluate import evaluate as measure
    from carray.evaluation.evaluate import summary_text
    from carray.pages.evaluation import write_page

    metrics = measure(bundle, manifest, split=split, out=out, runtime=runtime, write_page=write_page)
    typer.echo(summary_text(metrics))
    keys = ("runtime", "images", "unreadable", "top1", "top5", "macro_f1", "loss", "ece", "aurc")
    print_result({key: metrics[key] for key in keys if key in metrics} | {"out": out})


def stress(
    bundle: Bundle,
    manifest: ManifestOption,
    out: Annotated[str, path_option("--out", "Folder for the tables; may be that of carray evaluate.")],
    outside: Annotated[
        str | None,
        path_option("--outside", "Images that are no vehicles: a folder, or a Parquet table with uri, kind, source."),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, max=MOST_COUNT, help="Number of images of the split, drawn at random; 0 is all.")
    ] = 500,
    split: AnySplit = "test",
    seed: SeedOption = 0,
    runtime: MeasuredRuntime = "fp32",
) -> None:
    """Measure a bundle's accuracy on corrupted images, and how well ood_score detects images that are no vehicles.

    Reads the split's images and those of --outside. Writes robustness.parquet: top-1 under blur, JPEG compression, low
    resolution, crop, grey, rotation and light, with intervals. With --outside it writes outside.json: the probability
    that such an image has a higher ood_score than one of the split (AUROC). Results that exist are read, not measured
    again.

    Cost: that of classifying 22 times as many images as --images.

    Example: `carray stress run/bundle --manifest manifest.parquet --out evaluation --outside no-cars`
    """
    from carray.evaluation.stress import stress as measure
    from carray.evaluation.stress import summary_text
    from carray.pages.evaluation import write_page

    found = measure(
        bundle,
        manifest,
        out=out,
        outside=outside,
        split=split,
        images=images or None,
        seed=seed,
        runtime=runtime,
        write_page=write_page,
    )
    typer.echo(summary_text(found))
    robustness = found["robustness"]
    result = {"images": robustness["images"], "top1": robustness["top1"], "out": out}
    result |= {"worst_top1": {name: row["top1"] for name, row in robustness["worst"].items()}}
    if "outside" in found:
        result |= {"auroc": {kind: own["auroc"] for kind, own in found["outside"]["kinds"].items()}}
    print_result(result)


def classify(
    bundle: Bundle,
    source: Source,
    out: Annotated[
        str, path_option("--out", "Predictions folder; local or s3://. An unfinished run there is resumed.")
    ],
    split: ManifestSplit = None,
    column: Column = None,
    all_files: AllFiles = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Fetch and score rows with status fetch_error again.")
    ] = False,
    only_new: Annotated[
        bool, typer.Option("--only-new", help="Skip images that the run --since has, if unchanged and by this bundle.")
    ] = False,
    since: Annotated[
        str | None, path_option("--since", "Predictions folder of an earlier run, for --only-new.")
    ] = None,
    max_failed_fraction: Annotated[
        float | None,
        number_option("--max-failed-fraction", "Stop once more than this fraction of the images failed, such as 0.2."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="The most scoring processes; default: as the CPUs allow.")] = None,
    runtime: Runtime = None,
    engine: Annotated[
        str | None, typer.Option(help="auto, local (processes of this machine) or ray; auto is ray only on a cluster.")
    ] = None,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Classify every image of a folder, bucket or table into Parquet, one row an image.

    Reads the images and the bundle. Writes OUT/*.parquet, and its ledger under OUT/_carray/. A broken image becomes a
    row with the reason. The same command again resumes an interrupted run. The last line of output is one JSON
    document.

    Cost: see results/classify.csv; one GET an image on S3.

    Example: `carray classify run/bundle s3://photos/2026 --out s3://photos-predictions/2026`
    """
    from carray.core.fork_server import starting_early
    from carray.core.ray.resources import is_cluster

    if only_new != (since is not None):
        given, missing = ("--only-new", "--since") if only_new else ("--since", "--only-new")
        refuse(f"{given} is given without {missing}; the two belong together.")
    overrides = short_for(
        settings,
        all_files=all_files or None,
        retry_failed=retry_failed or None,
        split=split,
        since=since,
        max_failed_fraction=max_failed_fraction,
        workers=workers,
        runtime=runtime,
        engine=engine,
    )
    with starting_early("carray.classify.local", likely=engine != "ray" and not is_cluster()):
        from carray.classify.job import classify as run_classify
        from carray.classify.predictions_folder import ClassifySettings
        from carray.core.settings import load_settings

        if column:
            from carray.core.uri_tables import parse_columns

            overrides += [f"column.{what}={json.dumps(name)}" for what, name in parse_columns(column).items()]
        chosen = load_settings(ClassifySettings, config=config, overrides=overrides)
        print_result(run_classify(bundle, source, out=out, settings=chosen))


def compact(
    out: Annotated[str, path_argument("OUT", "Predictions folder of a finished classify; local or s3://.")],
    to: Annotated[str, path_option("--to", "Folder for the merged files; local or s3://.")],
    rows_per_file: Annotated[int, typer.Option(min=1, max=MOST_COUNT, help="Rows of one file.")] = 1_000_000,
) -> None:
    """Merge the many Parquet files of a finished run into few large ones, in another folder.

    Reads OUT/*.parquet. Writes TO/compact-*.parquet. OUT stays as it is: delete it once it is no longer used.

    Cost: that of reading and writing the tables once; memory for one file of rows.

    Example: `carray compact s3://photos-predictions/2026 --to s3://photos-predictions/2026-compact`
    """
    from carray.classify.compact import compact as merge

    print_result(merge(out, to=to, rows_per_file=rows_per_file))


def predict(
    bundle: Bundle,
    images: Annotated[list[str], path_argument("IMAGE...", "Image files; local or s3://.")],
) -> None:
    """Classify a few images and print the five likeliest classes of each.

    Reads the bundle and the images; writes nothing; needs no Ray.

    Exit code: 0 when at least one image was scored, 2 when none could be.

    Cost: about a second to start; images are scored one after another.

    Example: `carray predict run/bundle car.jpg`
    """
    from carray.bundle.scorer import Classifier, prediction_text

    predictions = Classifier.load(bundle).predict(images)
    typer.echo(prediction_text(predictions))
    _check_any_scored(predictions["status"].tolist())


def _check_any_scored(statuses: list[str]) -> None:
    if "ok" not in statuses:
        raise DataError(f"none of {len(statuses):,} images could be scored; the lines above say why.")

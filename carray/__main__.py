"""The `carray` command: one thin function a subcommand, heavy imports inside.

Invariants: a user's mistake is one sentence and an exit code (core.errors), never a traceback; results go to standard
output, progress to standard error. Exit codes: 0 done, 2 settings or tables, 3 bundle, 4 storage, 5 budget, 6 search.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from carray import __version__
from carray.core.errors import CarrayError, SettingsError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Find the best car-image classifier by a search, then classify whole image buckets with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Bundle = Annotated[str, typer.Argument(metavar="BUNDLE", help="Bundle folder, such as RUN/bundle; local or s3://.")]
ManifestOption = Annotated[str, typer.Option("--manifest", help="Table written by carray prepare; local or s3://.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as search.seed=1; repeatable.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find the best car-image classifier by a search, then classify whole image buckets with it."""


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(help="Class folders, Stanford Cars devkit, CSV/Parquet table, or a prefix.")],
    out: Annotated[str, typer.Option("--out", help="Manifest to write, a .parquet file; local or s3://.")],
    layout: Annotated[str, typer.Option(help="auto, folder, stanford-cars, table or images.")] = "auto",
    split: Annotated[
        str, typer.Option(help="Shares of train/val/test in percent, where the source gives no test split.")
    ] = "70/15/15",
    crop_boxes: Annotated[
        bool, typer.Option("--crop-boxes", help="Cut every image to its box, if it has one.")
    ] = False,
    extend: Annotated[str | None, typer.Option(help="Older manifest whose images keep their splits.")] = None,
) -> None:
    """Read labelled images and write the manifest: one row an image, checked, hashed and split.

    Reads every image once; writes one Parquet file; deletes nothing. An unreadable image is a row with its reason.

    Cost: about 400 photographs a second and core.

    Example: `carray prepare photos/ --out manifest.parquet`
    """
    from carray.manifest.build import prepare as build_manifest
    from carray.manifest.splits import parse_split

    report = build_manifest(
        source, out=out, layout=layout, split=parse_split(split), crop_boxes=crop_boxes, extend=extend
    )
    typer.echo(report.text())


@app.command()
def tune(
    manifest: ManifestOption,
    out: Annotated[str, typer.Option("--out", help="Run folder; local or s3://. Repeat the command to continue it.")],
    config: Annotated[str | None, typer.Option(help="YAML file of settings; see jobs/configs.")] = None,
    settings: Settings = None,
    trials: Annotated[int | None, typer.Option(help="Short for --set search.trials=N.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set search.epochs=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set search.seed=N.")] = None,
) -> None:
    """Search for the best network with Ray Tune and ASHA, and pack the winner into OUT/bundle.

    Reads the manifest's training and validation images once a machine, into a block of decoded pixels under
    $CARRAY_CACHE (default ~/.cache/carray). Writes trials.parquet, epochs.parquet, curves.png and bundle/.

    Cost: trials x epochs at most; ASHA stops weak trials early, search.time_budget_minutes ends the search.

    Example: `carray tune --manifest manifest.parquet --out run --trials 8 --epochs 6`
    """
    from carray.bundle.build import pack_winner
    from carray.core.progress import print_result
    from carray.core.settings import load_settings
    from carray.core.storage import exists, join
    from carray.trials.on_ray import search
    from carray.trials.space import TuneSettings

    short = {"search.trials": trials, "search.epochs": epochs, "search.seed": seed}
    overrides = [*(settings or []), *(f"{key}={value}" for key, value in short.items() if value is not None)]
    outcome = search(manifest, run=out, settings=load_settings(TuneSettings, config=config, overrides=overrides))
    bundle = join(outcome["run"], "bundle")
    if not exists(join(bundle, "bundle.json")):
        pack_winner(outcome["run"])
    print_result({**outcome, "bundle": bundle})


@app.command()
def leaderboard(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder that carray tune wrote; local or s3://.")],
) -> None:
    """Print a search's trials, best first.

    Reads RUN/trials.parquet and writes nothing.

    Cost: one small file.

    Example: `carray leaderboard run`
    """
    from carray.core.storage import absolute
    from carray.trials.format import read_trials
    from carray.trials.leaderboard import leaderboard_text

    typer.echo(leaderboard_text(read_trials(absolute(run))))


@app.command()
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


@app.command()
def classify(
    bundle: Bundle,
    source: Annotated[str, typer.Argument(help="Folder, s3://bucket/prefix, manifest or table of URIs.")],
    out: Annotated[str, typer.Option("--out", help="Predictions folder; local or s3://. Repeat to continue.")],
    split: Annotated[str | None, typer.Option(help="Of a manifest, this split only.")] = None,
    all_files: Annotated[bool, typer.Option("--all-files", help="Take every key, whatever its suffix.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Score fetch_error rows again.")] = False,
    config: Annotated[str | None, typer.Option(help="YAML file of settings; see jobs/configs.")] = None,
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

    flags = {"all_files": all_files or None, "retry_failed": retry_failed or None, "split": split}
    overrides = [*(settings or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]
    chosen = load_settings(ClassifySettings, config=config, overrides=overrides)
    print_result(run_classify(bundle, source, out=out, settings=chosen))


@app.command()
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


@app.command()
def query(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS", help="Folder that carray classify wrote.")],
    sql: Annotated[str | None, typer.Argument(help="SQL over the table `predictions`; without it, a summary.")] = None,
) -> None:
    """Summarise predictions, or ask them a question in SQL (DuckDB's dialect, read-only).

    Reads OUT/*.parquet, only the columns that the question names; writes nothing.

    Cost: the columns that the question names are read, no others.

    Example: `carray query predictions "select make, count(*) n from predictions group by make order by n desc"`
    """
    from carray import queries

    if sql is None:
        typer.echo(queries.summary_text(queries.summarize(predictions)))
    else:
        typer.echo(queries.query(predictions, sql).to_string(index=False, max_rows=1000))


@app.command()
def demo(
    out: Annotated[str, typer.Option("--out", help="Folder for everything the demo makes.")] = "carray-demo",
) -> None:
    """Run everything once on drawn cars: prepare, tune, evaluate, classify, and three questions in pandas.

    Reads nothing from outside; writes only below OUT; needs no download.

    Cost: under 5 minutes on two cores.

    Example: `carray demo --out carray-demo`
    """
    from carray.demo import run_demo

    run_demo(out)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with an exit code."""
    try:
        app(args=arguments, prog_name="carray")
    except CarrayError as err:
        sys.stdout.flush()
        problems = err.problems if isinstance(err, SettingsError) else [str(err)]
        for problem in problems:
            print(f"carray: {problem}", file=sys.stderr)
        raise SystemExit(err.exit_code) from None


if __name__ == "__main__":
    main()

"""The commands to run before a job: check the machines, and estimate what the job will take."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from carray.cli.options import (
    AllFiles,
    Bundle,
    Command,
    Config,
    ManifestOption,
    ManifestSplit,
    Runtime,
    SearchEpochs,
    SearchSeed,
    SearchTrials,
    Settings,
    Source,
    number_option,
    path_argument,
    path_option,
    short_for,
)
from carray.core.errors import SettingsError
from carray.core.limits import MOST_COUNT
from carray.core.progress import print_result

__all__ = ["doctor", "estimate", "estimate_classify", "estimate_tune"]

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    sources: Annotated[
        list[str] | None,
        path_argument("[SOURCE]...", "What a job would read: folders, s3:// prefixes, tables, bundles."),
    ] = None,
    out: Annotated[
        list[str] | None,
        path_option("--out", "Folder for results; a small test object is written there. Repeatable.", metavar="FOLDER"),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Check every machine of the Ray cluster at RAY_ADDRESS.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all findings as one JSON document instead.")] = False,
) -> None:
    """Check whether this machine, or a whole cluster, can run carray's jobs; each problem comes with its remedy.

    Reads the first image of each source, the machine's limits and the installed software; tries the decoders,
    onnxruntime and torch, each in its own process. Writes nothing, except with --out: a small object under
    FOLDER/_carray/, deleted again. The last line of output is one JSON document.

    Exit code: 0 when nothing failed, 4 when only storage failed, else 2. A machine without torch passes: it can
    classify, but not search.

    Cost: 5 to 25 s, with --cluster up to 2 minutes; about ten requests for each source or folder on S3.

    Example: `carray doctor s3://photos/2026 --out s3://results/2026`
    """
    from carray.preflight.doctor import examine, examine_cluster
    from carray.preflight.findings import as_json as plain
    from carray.preflight.findings import exit_code, finding_text, summary

    if cluster:
        _check_address()
    findings = []
    for found in (examine_cluster if cluster else examine)(sources or [], out or []):
        findings.append(found)
        if not as_json:
            text = finding_text(found)
            typer.echo(typer.style(text[:4], fg=_COLOURS[found.status]) + text[4:])
    print_result(summary(findings) | ({"findings": plain(findings)} if as_json else {}))
    if code := exit_code(findings):
        raise typer.Exit(code)


def _check_address() -> None:
    if os.environ.get("RAY_ADDRESS", "") in ("", "local"):
        raise SettingsError(
            "--cluster is given, but RAY_ADDRESS names no cluster; set it to HOST:6379 of the head node, or submit the "
            "command as a job."
        )


estimate = typer.Typer(
    help="Estimate what a job will take: hours, requests and money, as ranges.", no_args_is_help=True
)

Machines = Annotated[int, typer.Option("--machines", min=1, max=MOST_COUNT, help="Number of machines of the job.")]
Cores = Annotated[
    int | None,
    typer.Option("--cores", min=1, max=MOST_COUNT, help="Cores of each machine; default: those of this machine."),
]
MachinePrice = Annotated[
    float | None, number_option("--price-per-machine-hour", "Price in any currency; without it, no cost is given.")
]
ListPrice = Annotated[float, number_option("--lists-price", "Price of 1,000 LIST requests; S3, us-east-1, 2026.")]
GetPrice = Annotated[float, number_option("--gets-price", "Price of 1,000 GET requests; likewise.")]
PutPrice = Annotated[float, number_option("--puts-price", "Price of 1,000 PUT requests; likewise.")]
ResultsFolder = Annotated[
    str | None, path_option("--out", "Where results would be written; default: beside the images.")
]
ProbeWorkers = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Processes of the measurement; default: one a core.")
]


@estimate.command("classify", cls=Command)
def estimate_classify(
    bundle: Bundle,
    source: Source,
    machines: Machines = 1,
    cores: Cores = None,
    machine_price: MachinePrice = None,
    list_price: ListPrice = 0.005,
    get_price: GetPrice = 0.0004,
    put_price: PutPrice = 0.005,
    out: ResultsFolder = None,
    total_images: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="Number of images, if known; else the source is listed."),
    ] = None,
    listing_seconds: Annotated[
        float, number_option("--listing-seconds", "Time limit of the listing.", least=1)
    ] = 120.0,
    probe_images: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Images to score here; default: 200 for each process.")
    ] = None,
    probe_workers: ProbeWorkers = None,
    split: ManifestSplit = None,
    all_files: AllFiles = False,
    runtime: Runtime = None,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Estimate what carray classify would take: wall-clock time, machine-hours, requests and money, as ranges.

    Reads a listing of the source, the bundle, and a few hundred images, which the job's own worker code fetches,
    decodes and scores in as many processes as this machine has cores. Writes nothing. The last line of output is one
    JSON document.

    Prices are not looked up: requests default to S3's prices in us-east-1 in 2026, machines cost what you say.

    Cost: listing the source for at most --listing-seconds; one GET for each measured image; about half a minute.

    Example: `carray estimate classify run/bundle s3://photos/2026 --machines 10 --cores 16`
    """
    from carray.classify.predictions_folder import ClassifySettings
    from carray.core.cgroups import usable_cores
    from carray.core.settings import load_settings
    from carray.preflight import estimate_classify as classify
    from carray.preflight import estimates

    overrides = short_for(settings, all_files=all_files or None, split=split, runtime=runtime)
    found = classify.estimate_classify(
        bundle,
        source,
        settings=load_settings(ClassifySettings, config=config, overrides=overrides),
        machines=estimates.Machines(machines, cores or max(1, int(usable_cores())), hour_price=machine_price),
        prices={"list": list_price, "get": get_price, "put": put_price},
        probe=classify.Probe(probe_images, probe_workers, total_images, listing_seconds),
        out=out,
    )
    typer.echo(found.as_text())
    print_result(found.as_json())


@estimate.command("tune", cls=Command)
def estimate_tune(
    manifest: ManifestOption,
    machines: Machines = 1,
    cores: Cores = None,
    gpus: Annotated[
        int, typer.Option(min=0, max=1024, help="GPUs of each machine, of the same kind as this machine's.")
    ] = 0,
    machine_price: MachinePrice = None,
    networks: Annotated[int, typer.Option(min=1, max=1_000_000, help="The most different networks to measure.")] = 6,
    probe_workers: ProbeWorkers = None,
    earlier_run: Annotated[
        str | None,
        path_option("--earlier-run", "Run folder of a similar search, for how many epochs it ran.", metavar="RUN"),
    ] = None,
    config: Config = None,
    settings: Settings = None,
    trials: SearchTrials = None,
    epochs: SearchEpochs = None,
    seed: SearchSeed = None,
) -> None:
    """Estimate what carray tune would take: epochs after early stopping, time, machine-hours and money, as ranges.

    Reads the manifest and 224 of its images, and trains the networks of the search space on them with a trial's own
    code, in as many processes as trials would run on this machine. Writes nothing. How many epochs early stopping
    leaves is taken from an earlier run; without one the range goes from the fewest possible to all. The last line of
    output is one JSON document.

    Cost: one to five minutes: three epochs of 160 images for each network.

    Example: `carray estimate tune --manifest manifest.parquet --config jobs/configs/cars-cpu.yaml --machines 4`
    """
    from carray.core.cgroups import usable_cores
    from carray.core.settings import load_settings
    from carray.preflight import estimate_tune as tune
    from carray.preflight import estimates
    from carray.search.space import TuneSettings

    overrides = short_for(settings, search__trials=trials, search__epochs=epochs, search__seed=seed)
    found = tune.estimate_tune(
        manifest,
        settings=load_settings(TuneSettings, config=config, overrides=overrides),
        machines=estimates.Machines(machines, cores or max(1, int(usable_cores())), gpus, machine_price),
        most_networks=networks,
        probe_workers=probe_workers,
        earlier_run=earlier_run,
    )
    typer.echo(found.as_text())
    print_result(found.as_json())

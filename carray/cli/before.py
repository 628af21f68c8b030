"""The commands before a job: is everything in order, and what will it take."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from carray.cli.options import (
    Bundle,
    Command,
    Config,
    ManifestOption,
    Settings,
    Source,
    number,
    path,
    short_for,
)
from carray.core.errors import SettingsError
from carray.core.limits import MOST_COUNT

__all__ = ["doctor", "estimate", "estimate_classify", "estimate_tune"]

_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}


def doctor(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SOURCE]...",
            help="Places to read: folders, s3:// prefixes, tables, bundles.",
            parser=path("SOURCE"),
        ),
    ] = None,
    out: Annotated[
        list[str] | None,
        typer.Option(
            "--out",
            metavar="PLACE",
            help="Place for results; a small object is written there. Repeatable.",
            parser=path("--out"),
        ),
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Let every machine of RAY_ADDRESS's cluster examine itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every finding as one JSON document instead.")] = False,
) -> None:
    """Look whether this machine, or a whole cluster, can do carray's jobs; each line says what to do about trouble.

    Reads the first image of each source, the machine's limits and the installed software; tries the decoders,
    onnxruntime and torch in processes of their own. Writes nothing but, with --out, a small object under
    PLACE/_carray/, and deletes it. The last line of output is one JSON document.

    Exit code: 0 when nothing failed, 4 when only storage did, else 2. A machine without torch is in order: it scores
    and does not search.

    Cost: 5 to 25 s, with --cluster up to 2 minutes; some ten requests for each place on S3.

    Example: `carray doctor s3://photos/2026 --out s3://results/2026`
    """
    from carray.core.progress import print_result
    from carray.preflight.doctor.examine import examine, examine_cluster
    from carray.preflight.doctor.findings import as_json as plain
    from carray.preflight.doctor.findings import exit_code, finding_text, summary

    if cluster:
        _check_address()
    places = [uris or [] for uris in (sources, out)]
    findings = []
    for found in (examine_cluster if cluster else examine)(*places):
        findings.append(found)
        if not as_json:
            status, rest = finding_text(found)[:4], finding_text(found)[4:]
            typer.echo(typer.style(status, fg=_COLOURS[found.status]) + rest)
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
    help="Say beforehand what a job will take: hours, requests and money, as ranges.", no_args_is_help=True
)

Machines = Annotated[
    int, typer.Option("--machines", min=1, max=MOST_COUNT, help="How many machines the job is to have.")
]
Cores = Annotated[
    int | None,
    typer.Option("--cores", min=1, max=MOST_COUNT, help="Cores of each machine; as many as this one has if unset."),
]
MachinePrice = Annotated[
    float | None,
    typer.Option(
        "--price-per-machine-hour",
        help="In any currency; unpriced if unset.",
        parser=number("--price-per-machine-hour"),
    ),
]
ListPrice = Annotated[
    float,
    typer.Option("--lists-price", help="Of 1,000 LISTs; S3's in us-east-1 in 2026.", parser=number("--lists-price")),
]
GetPrice = Annotated[
    float, typer.Option("--gets-price", help="Of 1,000 GETs; likewise.", parser=number("--gets-price"))
]
PutPrice = Annotated[
    float, typer.Option("--puts-price", help="Of 1,000 PUTs; likewise.", parser=number("--puts-price"))
]
ResultsPlace = Annotated[
    str | None, typer.Option("--out", help="Where results would go; beside the images if unset.", parser=path("--out"))
]
ProbeWorkers = Annotated[
    int | None, typer.Option(min=1, max=1024, help="Processes to measure in; one a core if unset.")
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
    out: ResultsPlace = None,
    total_images: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_COUNT, help="How many images there are, if known; else they are listed."),
    ] = None,
    listing_seconds: Annotated[
        float, typer.Option(help="After which the listing is stopped.", parser=number("--listing-seconds", least=1))
    ] = 120.0,
    probe_images: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Images to score here; 200 for each process if unset.")
    ] = None,
    probe_workers: ProbeWorkers = None,
    split: Annotated[str | None, typer.Option(help="Of a manifest, this split only.")] = None,
    all_files: Annotated[bool, typer.Option("--all-files", help="Take every key, whatever its suffix.")] = False,
    runtime: Annotated[str | None, typer.Option(help="auto, or one of the bundle's runtimes.")] = None,
    config: Config = None,
    settings: Settings = None,
) -> None:
    """Say what carray classify would take: wall-clock, machine-hours, requests and money, as ranges.

    Reads a listing of the source, the bundle, and some hundred images, which the job's own worker code reads, decodes
    and scores in as many processes as this machine has cores. Writes nothing. The last line of output is one JSON
    document.

    Prices are not looked up: requests cost what S3 asks in us-east-1 in 2026 unless said otherwise, and machines what
    you say.

    Cost: listing the source, or its first two minutes; one GET an image of the probe; about half a minute beside.

    Example: `carray estimate classify run/bundle s3://photos/2026 --machines 10 --cores 16`
    """
    from carray.classify.predictions_folder import ClassifySettings
    from carray.core.progress import print_result
    from carray.core.settings import load_settings
    from carray.preflight.doctor.machine import usable_cores
    from carray.preflight.estimate import classify

    overrides = short_for(settings, all_files=all_files or None, split=split, runtime=runtime)
    found = classify.estimate_classify(
        bundle,
        source,
        settings=load_settings(ClassifySettings, config=config, overrides=overrides),
        machines=classify.Machines(machines, cores or max(1, int(usable_cores()))),
        prices=classify.Prices(list_price, get_price, put_price, machine_price),
        probe=classify.Probe(probe_images, probe_workers, total_images, listing_seconds),
        out=out,
    )
    typer.echo(classify.classify_text(found))
    print_result(found.as_json())


@estimate.command("tune", cls=Command)
def estimate_tune(
    manifest: ManifestOption,
    machines: Machines = 1,
    cores: Cores = None,
    gpus: Annotated[
        int, typer.Option(min=0, max=1024, help="GPUs of each machine, of the kind that this one has.")
    ] = 0,
    machine_price: MachinePrice = None,
    networks: Annotated[int, typer.Option(min=1, max=1_000_000, help="Different networks to measure at most.")] = 6,
    probe_workers: ProbeWorkers = None,
    earlier_run: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Run folder of such a search, to see how many epochs it ran.",
            parser=path("--earlier-run"),
        ),
    ] = None,
    config: Config = None,
    settings: Settings = None,
    trials: Annotated[int | None, typer.Option(help="Short for --set search.trials=N.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set search.epochs=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set search.seed=N.")] = None,
) -> None:
    """Say what carray tune would take: epochs after early stopping, wall-clock, machine-hours and money, as ranges.

    Reads the manifest and 224 of its images, and trains the networks of the space on those, by a trial's own code, in
    as many processes as trials would run on this machine. Writes nothing. How many epochs early stopping leaves is
    what an earlier run shows; without one the range goes from the fewest possible to all. The last line of output is
    one JSON document.

    Cost: one to five minutes: three epochs of 160 images for each network.

    Example: `carray estimate tune --manifest manifest.parquet --config jobs/configs/cars-cpu.yaml --machines 4`
    """
    from carray.core.progress import print_result
    from carray.core.settings import load_settings
    from carray.preflight.doctor.machine import usable_cores
    from carray.preflight.estimate import tune
    from carray.search.space import TuneSettings

    overrides = short_for(settings, search__trials=trials, search__epochs=epochs, search__seed=seed)
    found = tune.estimate_tune(
        manifest,
        settings=load_settings(TuneSettings, config=config, overrides=overrides),
        cluster=tune.Cluster(machines, cores or max(1, int(usable_cores())), gpus, machine_price),
        most_networks=networks,
        probe_workers=probe_workers,
        earlier_run=earlier_run,
    )
    typer.echo(tune.tune_text(found))
    print_result(found.as_json())

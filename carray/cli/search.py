"""The commands that find a network: a search, one training, the leaderboard, and the packing of a chosen trial."""

from __future__ import annotations

from typing import Annotated

import typer

from carray.cli.options import (
    Config,
    ManifestOption,
    Run,
    SearchEpochs,
    SearchSeed,
    SearchTrials,
    Settings,
    path_option,
    short_for,
)
from carray.core.errors import SettingsError
from carray.core.progress import print_result, say

__all__ = ["export", "leaderboard", "train", "tune"]

RunFolder = Annotated[str, path_option("--out", "Run folder; local or s3://. An unfinished run there is resumed.")]


def tune(
    manifest: ManifestOption,
    out: RunFolder,
    config: Config = None,
    settings: Settings = None,
    trials: SearchTrials = None,
    epochs: SearchEpochs = None,
    seed: SearchSeed = None,
) -> None:
    """Search for the best network with Ray Tune, stop weak trials early, and pack the winner into OUT/bundle.

    Reads the training and validation images of the manifest once on each machine, into a block of decoded pixels under
    $CARRAY_CACHE (default ~/.cache/carray). Writes trials.parquet, epochs.parquet, leaderboard.html, curves.png and
    bundle/.

    The same command resumes an interrupted search. With more --trials it adds to a finished one, and packs the winner
    again if it is better. `--set search.refit=true` trains the winner again on train and val before it is packed.

    Cost: at most trials x epochs; ASHA stops weak trials early, and the search ends when the first of
    search.time_budget_minutes, search.device_hours_budget and search.money_budget is used up. A refit is extra.

    Example: `carray tune --manifest manifest.parquet --out run --trials 8 --epochs 6`
    """
    from carray.bundle.winner import keep_winner
    from carray.core.settings import load_settings
    from carray.pages.leaderboard import write_curves, write_page
    from carray.search.search_on_ray import search
    from carray.search.space import TuneSettings

    overrides = short_for(settings, search__trials=trials, search__epochs=epochs, search__seed=seed)
    chosen = load_settings(TuneSettings, config=config, overrides=overrides)

    def finish(run: str) -> dict[str, str]:
        write_curves(run)
        return {"bundle": keep_winner(run, finish_refit=write_curves), "page": write_page(run)}

    print_result(search(manifest, run=out, settings=chosen, finish=finish))


def train(
    manifest: ManifestOption,
    out: RunFolder,
    config: Annotated[
        str | None, path_option("--config", "YAML file with hyper, epochs, seed, pixels; or one for carray tune.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as hyper.learning_rate=0.001; repeatable."),
    ] = None,
    source: Annotated[
        str | None, path_option("--from", "Run folder with the trial whose settings to use.", metavar="RUN")
    ] = None,
    row: Annotated[
        str, typer.Option(help="That trial: its rank on the leaderboard (1 is the best), or its id, such as t00003.")
    ] = "1",
    refit: Annotated[
        bool, typer.Option("--refit", help="Train that trial again on train and val, and pack the last epoch.")
    ] = False,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed=N.")] = None,
) -> None:
    """Train one configuration without a search, on all cores or the GPU of this machine, and pack it into OUT/bundle.

    Reads the training and validation images as carray tune does. Writes a run folder like that of a search with one
    trial: trials.parquet, epochs.parquet, curves.png and bundle/. The same command again resumes.

    From a --config for carray tune it takes the default of the first family. A refit has no validation results; its
    bundle keeps the temperature of the trial that it refits, and says so.

    Cost: epochs times images; after each epoch a line says the rate and the time left.

    Example: `carray train --manifest manifest.parquet --out refit --from run --row 1 --refit`
    """
    from carray.bundle.winner import keep_trained
    from carray.bundle.winner import refit as refit_row
    from carray.pages.leaderboard import write_curves
    from carray.search import train_one

    _check_one_source(source, config=config, refit=refit, changed=bool(settings) or seed is not None)
    if source and refit:
        print_result(refit_row(source, row, manifest=manifest, out=out, epochs=epochs, finish=write_curves))
        return
    overrides = short_for(settings, epochs=epochs, seed=seed)
    if source:
        training, _ = train_one.settings_of_row(source, row, overrides=overrides)
    else:
        training = train_one.read_settings(config, overrides=overrides)

    def finish(run: str) -> dict[str, str]:
        write_curves(run)
        return {"bundle": keep_trained(run)}

    print_result(train_one.train(manifest, run=out, settings=training, finish=finish))


def _check_one_source(source: str | None, *, config: str | None, refit: bool, changed: bool) -> None:
    if source is not None and config is not None:
        raise SettingsError(f"--from {source} and --config {config} both name a configuration; give one of them.")
    if refit and (source is None or changed):
        raise SettingsError(
            "--refit trains a trial again with its own settings, so it needs --from RUN and takes neither --set nor "
            "--seed; without --refit, --from RUN --set KEY=VALUE trains it with changed settings."
        )


def leaderboard(
    run: Run,
    measure: Annotated[
        bool, typer.Option("--measure", help="First measure each network's images a second, decoding included.")
    ] = False,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Also write the page RUN/leaderboard.html.")] = True,
) -> None:
    """Print a search's trials, best first, and write them as a page for the browser.

    Reads RUN's tables, or the log of a search that still runs or was killed. Writes RUN/leaderboard.html: learning
    curves, where trials were stopped, which hyperparameters mattered, accuracy against speed.

    Cost: about 10 s; with --measure 15 s to start and 4 s for each different network, measured once.

    Example: `carray leaderboard run`
    """
    from carray.pages.leaderboard import write_page
    from carray.search.leaderboard import leaderboard_text
    from carray.search.run_folder import read_trials
    from carray.search.throughput import measure_throughput, trial_speeds

    trials = read_trials(run)
    if measure:
        measure_throughput(run)
    typer.echo(leaderboard_text(trials, speeds=trial_speeds(run, trials)))
    if page:
        say(f"the page: {write_page(run)}")


def export(
    run: Run,
    trial: Annotated[
        str,
        typer.Option("--trial", metavar="ID", help="Trial id, such as t00003, or rank on the leaderboard, such as 2."),
    ],
    out: Annotated[str | None, path_option("--out", "Bundle folder to write; default: RUN/bundle.")] = None,
) -> None:
    """Pack any trial of a search as a bundle; a search that goes on does not replace it in RUN/bundle.

    Reads the trial's best weights, and the validation images to fit the temperature. Writes a bundle. The search may
    still run, or have been killed.

    Cost: about 20 s, and classifying the validation images once.

    Example: `carray export run --trial t00003 --out fast-bundle`
    """
    from carray.bundle.winner import export_trial
    from carray.core.store.files import join

    info = export_trial(run, trial, out=out)
    print_result({"bundle": out or join(run, "bundle"), "bundle_id": info.bundle_id})

"""Runs many trials at once under Ray Tune, and goes on where an earlier start was killed.

From: a manifest and settings. To: a run folder (search.run_folder).
Invariants: a configuration is stored before it is launched; one trial failing ends that trial only; what has ended is
not run again, what was running goes on from its checkpoint, and every scheduler stands where the log left it; Tune's
own files lie in a temporary folder, and nothing is ever read from them. Worker processes are reused from trial to
trial, since importing torch and timm takes about 15 s.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from carray.core.errors import SearchError, StorageError
from carray.core.exit_lines import advise, keeping_handlers, stopping_in_order
from carray.core.leftovers import scratch_folder
from carray.core.progress import say
from carray.core.ray.connect import start_ray
from carray.core.ray.internals import withhold_aws_variables
from carray.core.ray.metrics import Meter
from carray.core.store.aws import aws_environment
from carray.core.store.files import absolute, join, write_json
from carray.core.store.lease import Lease, hold_run
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.driver_on_ray import MOST_LOSSES, SearchDriver, SearchStopper
from carray.search.loggers import EpochLoggers
from carray.search.metrics_on_ray import SearchMetrics
from carray.search.proposals import candidates, draw_trials, grid_size
from carray.search.resources import share_out
from carray.search.run_log import SearchLog, check_search, open_run
from carray.search.rung0_on_ray import rank_trials
from carray.search.searchers_on_ray import build_searcher
from carray.search.space import TuneSettings
from carray.search.trial_on_ray import TrialRunner
from carray.tensors.block import ensure_block

__all__ = ["search"]

_STOPPED = "every logged epoch stays, and the same command goes on from there."
_MOST_PENDING = 200
"""Trials that wait for resources at once, which is what a growing cluster grows by; Tune's own figure."""


def search(
    manifest: str, *, run: str, settings: TuneSettings, finish: Callable[[str], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Search for the best network and write the run's tables; the same call again does only what is missing.

    Args:
        manifest: Table written by carray prepare.
        run: Folder of the run.
        settings: What is searched, and for how long.
        finish: What is done with the finished run before another process may have it; what it gives is added.

    Raises:
        SettingsError: settings no network takes, resources the cluster has not, or a run folder of another search.
        SchemaError: the manifest has no usable training or validation image, or fewer than two classes.
        DataError: an image changed since the manifest was prepared.
        StorageError: the run's place is full or away; what was logged stays, and the same call goes on.
        SearchError: no trial came to a result, whose first cause it names, or Tune gave up again and again.
        BudgetError: another process searches there.
        StoppedError: Ctrl-C or SIGTERM.
    """
    run = absolute(run)
    source = read_manifest(absolute(manifest))
    drawn = draw_trials(settings)
    if settings.search.searcher == "grid":
        say(f"tune: of the grid's {grid_size(settings)} combinations, {len(drawn)} are tried")
    proposes = settings.search.searcher == "tpe"
    check_search(source, [*drawn, *candidates(settings)] if proposes else drawn)
    with hold_run(run, what="tune") as lease:
        configurations = open_run(run, source, settings, [None] * len(drawn) if proposes else drawn)
        outcome = _search(run, source, settings, configurations, lease)
        return outcome if finish is None else {**outcome, **finish(run)}


def _search(
    run: str, source: Manifest, settings: TuneSettings, configurations: list[dict[str, Any] | None], lease: Lease
) -> dict[str, Any]:
    log = SearchLog(run, settings.search, count=len(configurations), check=lease.check)
    ended_by = log.budget.spent_up() if log.missing else None
    if log.missing and not ended_by:
        loggers = EpochLoggers(run, settings.search.loggers)
        log.listeners.append(loggers)
        run_folder.delete_tables(run)  # what is read meanwhile comes from the log
        try:
            ended_by = _run_trials(run, source, settings, configurations, log)
        finally:
            loggers.close()
    if ended_by:
        say(f"tune: {ended_by}: {len(log.missing)} trials are unfinished; a higher limit goes on with them")
    lease.check()
    trials = run_folder.write_tables(run, ended_by=ended_by)
    winner = run_folder.best_trial(trials)
    outcome = {
        "run": run,
        "trials": len(trials),
        "best_trial": winner["trial_id"],
        "best_val_top1": float(winner["val_top1"]),
        "by_status": trials["status"].value_counts().to_dict(),
        "ended_by": ended_by,
        "spent": log.budget.spent(),
    }
    write_json(join(run, run_folder.DONE), outcome)
    return outcome


def _run_trials(
    run: str,
    manifest: Manifest,
    settings: TuneSettings,
    configurations: list[dict[str, Any] | None],
    log: SearchLog,
) -> str | None:
    """Run what is missing; gives what ended the search before all was run, in words."""
    _quieten_tune()
    withhold_aws_variables()
    needs = {"CPU": settings.search.cpus_per_trial or 1.0, "GPU": settings.search.gpus_per_trial or 0.0}
    with start_ray(worker=needs) as ray_here, scratch_folder("carray-tune-") as scratch:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_out(nodes, settings.search, len(configurations))
        log.devices = share.devices
        log.listeners.append(SearchMetrics(Meter(run, private=ray_here.private), log))
        if ray_here.private:  # on this machine: an image that changed is known before anything is launched
            ensure_block(manifest, settings.pixels)
        say(
            f"tune: {len(log.missing)} of {len(configurations)} trials to run, each on {share.text()}, "
            f"{share.at_once} at once"
        )
        shared: dict[str, Any] = {
            "run": run,
            "manifest": manifest.uri,
            "settings": settings.model_dump(mode="json"),
            "cpus": share.cpus,
            "gpus": share.gpus,
            # Workers of our own private Ray are this user's processes; a cluster has credentials of its own.
            # Parameters, unlike a configuration, are written to no file.
            "environment": dict(aws_environment()) if ray_here.private else {},
        }
        # A proposal is the better the more is known, so only trials that are drawn beforehand may queue.
        pending = 1 if settings.search.searcher == "tpe" else max(_MOST_PENDING, share.at_once)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(pending)
        trainable = tune.with_resources(
            tune.with_parameters(TrialRunner, shared=shared), {"cpu": share.cpus, "gpu": share.gpus}
        )
        numbers = list(range(len(configurations)))
        # All are ranked, those too that have ended, so that every start comes to the same order.
        order, dropped = rank_trials(
            run, manifest, settings, configurations, numbers, share, environment=shared["environment"]
        )
        for number in set(log.missing) - set(log.running):
            if number in dropped:
                log.drop(number, dropped[number])
        advise(log.advice)
        return _run_rounds(trainable, run, settings, configurations, log, order, scratch)


def _run_rounds(
    trainable: Any,
    run: str,
    settings: TuneSettings,
    configurations: list[dict[str, Any] | None],
    log: SearchLog,
    order: list[int],
    scratch: str,
) -> str | None:
    """Let Tune run what is missing, again where it gave up what could go on, until nothing is left."""
    losses: dict[int, int] = defaultdict(int)
    broken = 0
    while log.missing and not log.budget.spent_up():
        waiting = set(log.missing) - set(log.running)
        numbers = [*log.running, *(number for number in order if number in waiting)]
        configurations = run_folder.read_search(run)["configurations"]  # what a searcher proposed stands there
        driver = SearchDriver(settings.search, log, losses)
        searcher = build_searcher(settings, run, configurations, numbers)
        with stopping_in_order(_STOPPED, ask=driver.stop):
            _run_round(trainable, driver, searcher, len(numbers), scratch)
        broken += driver.broken
        if (log.missing and not driver.goes_on and not log.budget.spent_up()) or broken > MOST_LOSSES:
            raise SearchError(
                f"the search was interrupted with {len(log.missing)} of {len(configurations)} trials unfinished; "
                "repeat the command to go on."
            )
    return log.budget.spent_up() if log.missing else None


def _quieten_tune() -> None:
    # No result files and no callbacks of Tune's own, and no complaint that they are absent: the log is ours.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # That a trial failed, and why, is a line of ours and a row of the table.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # Deciding includes writing the log, which takes its time on a bucket.
    logging.getLogger("ray.tune.utils.util").setLevel(logging.ERROR)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would take the first Ctrl-C for itself
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output engine prints boxes even when told to be silent
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1000000"  # nobody reads the state that Tune would write meanwhile
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


def _run_round(trainable: Any, driver: SearchDriver, searcher: Searcher, count: int, scratch: str) -> None:
    """Let Tune run trials until all have ended, or the driver's stopper says stop.

    Raises:
        StorageError: the run's place, or the disk of Tune's own files, is full or away.
        DataError: the images are not those of the manifest.
        StoppedError: the driver was asked to stop.
    """
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            scheduler=driver,
            search_alg=searcher,
            num_samples=count,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: run_folder.trial_id(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=scratch,
            verbose=0,
            stop=SearchStopper(driver),
            failure_config=tune.FailureConfig(max_failures=MOST_LOSSES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    try:
        with keeping_handlers():
            tuner.fit()
    except Exception as err:
        if driver.trouble is None and isinstance(err, OSError):
            raise StorageError(
                f"Tune could not write below {scratch} ({err}); free space there, or set TMPDIR to a larger disk, and "
                "repeat the command."
            ) from err
        driver.broken = True
        traceback.print_exc()  # of a process that was lost where Tune does not expect it; the search goes on
    if driver.trouble is not None:
        raise driver.trouble

"""Runs many trials at once under Ray Tune, and resumes a search that was killed.

A configuration is stored before it is launched; ended trials are not run again, running ones resume from their
checkpoint. Tune's own files lie in a temporary folder and are never read.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
from carray.core.store.files import absolute, join, write_json
from carray.core.store.lease import Lease, hold_run
from carray.core.store.s3 import aws_environment
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.loggers import EpochLoggers
from carray.search.proposals import candidates, draw_trials, grid_size
from carray.search.resources import share_out
from carray.search.run_log import SearchLog, check_search, open_run
from carray.search.rung0_on_ray import rank_trials
from carray.search.scheduler_on_ray import MOST_LOSSES, SearchMetrics, SearchScheduler, SearchStopper
from carray.search.space import TuneSettings
from carray.search.tpe import Observation, propose
from carray.search.trial_on_ray import TrialRunner
from carray.tensors.block import ensure_block

__all__ = ["Configurations", "search"]

_STOPPED = "every logged epoch stays, and the same command goes on from there."
_MOST_PENDING = 200
"""Trials that wait for resources at once, by which an autoscaling cluster grows; Tune's own default."""


def search(
    manifest: str, *, run: str, settings: TuneSettings, finish: Callable[[str], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Search for the best network and write the run's tables; the same call again resumes.

    Args:
        manifest: Table written by carray prepare.
        run: Folder of the run.
        settings: What is searched, and for how long.
        finish: Called with the finished run while this process holds it; its result is added to the outcome.

    Raises:
        SettingsError: settings no network takes, resources the cluster has not, or a run folder of another search.
        SchemaError: the manifest has no usable training or validation image, or fewer than two classes.
        DataError: an image changed since the manifest was prepared.
        StorageError: the run's store is full or unreachable; what was logged stays, and the same call resumes.
        SearchError: no trial has a result, with the first cause, or Tune gave up repeatedly.
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
    ended_by = log.budget_reached() if log.missing else None
    if log.missing and not ended_by:
        loggers = EpochLoggers(run, settings.search.loggers)
        log.listeners.append(loggers)
        run_folder.delete_tables(run)  # readers use the log meanwhile
        try:
            ended_by = _run_trials(run, source, settings, configurations, log)
        finally:
            loggers.close()
    if ended_by:
        say(f"tune: {ended_by}: {len(log.missing)} trials are unfinished; a higher limit resumes them")
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
        "spent": log.spent(),
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
    """Run the missing trials; gives what ended the search early, in words."""
    _quieten_tune()
    withhold_aws_variables()
    needs = {"CPU": settings.search.cpus_per_trial or 1.0, "GPU": settings.search.gpus_per_trial or 0.0}
    with start_ray(worker=needs) as ray_here, scratch_folder("carray-tune-") as scratch:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = share_out(nodes, settings.search, len(configurations))
        log.devices = share.devices
        log.listeners.append(SearchMetrics(Meter(run, private=ray_here.private), log))
        if ray_here.private:  # on this machine: a changed image is found before anything is launched
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
            # Workers of a private Ray are this user's processes; a cluster has its own credentials. Tune writes a
            # configuration to files, but not parameters.
            "environment": dict(aws_environment()) if ray_here.private else {},
        }
        # TPE proposes better the more trials have ended, so its trials do not queue.
        pending = 1 if settings.search.searcher == "tpe" else max(_MOST_PENDING, share.at_once)
        os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(pending)
        trainable = tune.with_resources(
            tune.with_parameters(TrialRunner, shared=shared), {"cpu": share.cpus, "gpu": share.gpus}
        )
        order, dropped = rank_trials(run, manifest, settings, configurations, share, environment=shared["environment"])
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
    """Let Tune run the missing trials, in further rounds where it gave trials up, until none is left."""
    losses: dict[int, int] = defaultdict(int)
    broken = 0
    while log.missing and not log.budget_reached():
        waiting = set(log.missing) - set(log.running)
        numbers = [*log.running, *(number for number in order if number in waiting)]
        scheduler = SearchScheduler(log, losses)
        searcher = Configurations(run, settings, log, configurations, numbers)
        with stopping_in_order(_STOPPED, ask=scheduler.stop):
            _run_round(trainable, scheduler, searcher, len(numbers), scratch)
        broken += scheduler.broken
        if (log.missing and not scheduler.goes_on and not log.budget_reached()) or broken > MOST_LOSSES:
            raise SearchError(
                f"the search was interrupted with {len(log.missing)} of {len(configurations)} trials unfinished; "
                "repeat the command to resume."
            )
    return log.budget_reached() if log.missing else None


class Configurations(Searcher):
    """Hands Tune the configurations to run, in their order; with TPE, proposes those that are not stored yet.

    Tune needs `num_samples=len(numbers)`, or it asks for one. This keeps no state; results are in the log.
    """

    def __init__(
        self,
        run: str,
        settings: TuneSettings,
        log: SearchLog,
        configurations: list[dict[str, Any] | None],
        numbers: Sequence[int],
    ) -> None:
        """Take every configuration by number, None where it is to be proposed, and the numbers to run."""
        super().__init__()
        self._run, self._settings, self._log, self._configurations = run, settings, log, configurations
        self._waiting = list(reversed(numbers))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles a copy, which is never read

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take no metric and no space from Tune: both are known, and the config holds what all trials share."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Give the next configuration, with its number, or say that there are no more."""
        if not self._waiting:
            return Searcher.FINISHED
        number = self._waiting[-1]
        hyper = self._configurations[number]
        if hyper is None:
            hyper = propose(self._settings, number, self._observations()).model_dump(mode="json")
            run_folder.store_configuration(self._run, number, hyper)  # before Tune hears of it
            self._configurations[number] = hyper
        self._waiting.pop()
        return {"number": number, "hyper": hyper}

    def _observations(self) -> list[Observation]:
        results = [(number, self._configurations[number], result) for number, result in self._log.results().items()]
        return [Observation(number, hyper, *result) for number, hyper, result in results if hyper is not None]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Take note of nothing: the log has it."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Keep nothing: a later start begins from the run folder."""


def _quieten_tune() -> None:
    # Tune's own result files and callbacks are off, and so are its complaints about that.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    # A failed trial has a line of ours and a row of the table.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    # A decision includes writing the log, which is slow on a bucket.
    logging.getLogger("ray.tune.utils.util").setLevel(logging.ERROR)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would take the first Ctrl-C for itself
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output engine prints boxes even when told to be silent
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "1000000"  # Tune's state is never read
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


def _run_round(trainable: Any, scheduler: SearchScheduler, searcher: Searcher, count: int, scratch: str) -> None:
    """Let Tune run trials until all have ended, or the stopper ends them.

    Raises:
        StorageError: the run's folder, or the disk of Tune's own files, is full or away.
        DataError: the images are not those of the manifest.
        StoppedError: the search was asked to stop.
    """
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            search_alg=searcher,
            num_samples=count,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: run_folder.trial_id(trial.config["number"]),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=scratch,
            verbose=0,
            stop=SearchStopper(scheduler),
            failure_config=tune.FailureConfig(max_failures=MOST_LOSSES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    try:
        with keeping_handlers():
            tuner.fit()
    except Exception as err:
        if scheduler.trouble is None and isinstance(err, OSError):
            raise StorageError(
                f"Tune could not write below {scratch} ({err}); free space there, or set TMPDIR to a larger disk, and "
                "repeat the command."
            ) from err
        scheduler.broken = True
        traceback.print_exc()  # a process was lost where Tune does not expect it; the search continues
    if scheduler.trouble is not None:
        raise scheduler.trouble

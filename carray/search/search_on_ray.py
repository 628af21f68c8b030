"""Runs many trials at once under Ray Tune, and resumes a search that was killed.

First Ray tasks probe the candidate backbones (rung 0); each probe is written to RUN/probes.json as it comes, so a
resumed search repeats none. A configuration is stored before it is launched; ended trials are not run again, running
ones resume from their checkpoint. Tune's own files lie in a temporary folder and are never read.
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
from ray.exceptions import RayError
from ray.tune.search import Searcher

from carray.core.errors import CarrayError, SearchError, StorageError
from carray.core.exit_lines import advise, keeping_handlers, stopping_in_order
from carray.core.leftovers import scratch_folder
from carray.core.progress import say
from carray.core.ray.connect import start_ray
from carray.core.ray.internals import withhold_aws_variables
from carray.core.ray.metrics import Meter
from carray.core.store.files import absolute, join, write_json
from carray.core.store.lease import hold_run
from carray.core.store.s3 import aws_environment
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.loggers import EpochLoggers
from carray.search.resources import Share, share_out
from carray.search.run_log import STOPPED, SearchLog, check_search, open_run
from carray.search.rung0 import Candidate, Probe, candidate_of, named, order_trials, probe, read_probes, write_probes
from carray.search.scheduler_on_ray import MOST_LOSSES, SearchMetrics, SearchScheduler
from carray.search.space import TuneSettings, candidates, draw_trials, grid_size
from carray.search.tpe import Observation, propose
from carray.search.train.hyperparameters import read_hyper
from carray.search.trial_on_ray import TrialRunner
from carray.tensors.block import ensure_block

__all__ = ["Configurations", "rank_trials", "search"]

_MOST_PENDING = 200
"""Trials that wait for resources at once, by which an autoscaling cluster grows; Tune's own default."""


def search(
    manifest: str, *, run: str, settings: TuneSettings, finish: Callable[[str], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Search for the best network and write the run's tables; the same call again resumes.

    `finish` is called with the finished run while this process holds it; its result is added to the outcome.

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
        open_run(run, source, settings, [None] * len(drawn) if proposes else drawn)
        configurations: list[dict[str, Any] | None] = [hyper.model_dump(mode="json") for hyper in drawn]
        if proposes:
            configurations = run_folder.read_search(run)["configurations"]
        outcome = _Search(run, source, settings, configurations, check=lease.check).finish()
        return outcome if finish is None else {**outcome, **finish(run)}


class _Search:
    """A search whose run folder this process holds."""

    def __init__(
        self,
        run: str,
        manifest: Manifest,
        settings: TuneSettings,
        configurations: list[dict[str, Any] | None],
        *,
        check: Callable[[], None],
    ) -> None:
        self.run, self.manifest, self.settings, self.configurations = run, manifest, settings, configurations
        self.check = check
        self.log = SearchLog(run, settings.search, count=len(configurations), check=check)

    def finish(self) -> dict[str, Any]:
        """Run the missing trials, within the budgets, and write the tables; gives the outcome, as in done.json."""
        run, log = self.run, self.log
        ended_by = log.budget_reached() if log.missing else None
        if log.missing and not ended_by:
            loggers = EpochLoggers(run, self.settings.search.loggers)
            log.listeners.append(loggers)
            run_folder.delete_tables(run)  # readers use the log meanwhile
            try:
                self._run_trials()
            finally:
                loggers.close()
            ended_by = log.budget_reached() if log.missing else None
        if ended_by:
            say(f"tune: {ended_by}: {len(log.missing)} trials are unfinished; a higher limit resumes them")
        self.check()
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

    def _run_trials(self) -> None:
        """Start Ray or join it, and run the missing trials until all have ended or a budget is used up."""
        _quieten_tune()
        withhold_aws_variables()
        log, search = self.log, self.settings.search
        needs = {"CPU": search.cpus_per_trial or 1.0, "GPU": search.gpus_per_trial or 0.0}
        with start_ray(worker=needs) as ray_here, scratch_folder("carray-tune-") as scratch:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            share = share_out(nodes, search, len(self.configurations))
            log.devices = share.devices
            log.listeners.append(SearchMetrics(Meter(self.run, private=ray_here.private), log))
            if ray_here.private:  # on this machine: a changed image is found before anything is launched
                ensure_block(self.manifest, self.settings.pixels)
            say(
                f"tune: {len(log.missing)} of {len(self.configurations)} trials to run, each on {share.text()}, "
                f"{share.at_once} at once"
            )
            shared: dict[str, Any] = {
                "run": self.run,
                "manifest": self.manifest.uri,
                "settings": self.settings.model_dump(mode="json"),
                "cpus": share.cpus,
                "gpus": share.gpus,
                # Workers of a private Ray are this user's processes; a cluster has its own credentials. Tune writes a
                # configuration to files, but not parameters.
                "environment": dict(aws_environment()) if ray_here.private else {},
            }
            # TPE proposes better the more trials have ended, so its trials do not queue.
            pending = 1 if search.searcher == "tpe" else max(_MOST_PENDING, share.at_once)
            os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(pending)
            trainable = tune.with_resources(
                tune.with_parameters(TrialRunner, shared=shared), {"cpu": share.cpus, "gpu": share.gpus}
            )
            order, dropped = rank_trials(
                self.run, self.manifest, self.settings, self.configurations, share, environment=shared["environment"]
            )
            for number in set(log.missing) - set(log.running):
                if number in dropped:
                    log.drop(number, dropped[number])
            advise(log.advice)
            self._run_rounds(trainable, order, scratch)

    def _run_rounds(self, trainable: Any, order: list[int], scratch: str) -> None:
        """Let Tune run the missing trials, in further rounds where it gave trials up, until none is left."""
        log = self.log
        losses: dict[int, int] = defaultdict(int)
        broken = 0
        while log.missing and not log.budget_reached():
            waiting = set(log.missing) - set(log.running)
            numbers = [*log.running, *(number for number in order if number in waiting)]
            scheduler = SearchScheduler(log, losses)
            searcher = Configurations(self.run, self.settings, log, self.configurations, numbers)
            with stopping_in_order(STOPPED, ask=scheduler.stop):
                _run_round(trainable, scheduler, searcher, len(numbers), scratch)
            broken += scheduler.broken
            if (log.missing and not scheduler.goes_on and not log.budget_reached()) or broken > MOST_LOSSES:
                raise SearchError(
                    f"the search was interrupted with {len(log.missing)} of {len(self.configurations)} trials "
                    "unfinished; repeat the command to resume."
                )


def rank_trials(
    run: str,
    manifest: Manifest,
    settings: TuneSettings,
    configurations: Sequence[Mapping[str, Any] | None],
    share: Share,
    *,
    environment: Mapping[str, str] = {},
) -> tuple[list[int], dict[int, str]]:
    """Order all trials, best backbone first; gives those to run and, with a reason, those not worth running.

    `configurations` are of every trial, ended or not, so that every start of a search has the same order; None for one
    that the searcher proposes later. A probe takes a trial's share of the cluster, and `environment` beside its own
    variables. The trials of a candidate that cannot be probed are not dropped.

    Raises:
        StorageError: storage refused to keep an answer.
    """
    hypers = [None if values is None else read_hyper(values) for values in configurations]
    candidates = list(dict.fromkeys(candidate for hyper in hypers if (candidate := candidate_of(hyper))))
    if settings.search.rung0 == "off" or len(candidates) < (2 if settings.search.rung0 == "auto" else 1):
        return list(range(len(hypers))), {}
    probes = read_probes(run)
    asked = set(candidates) - {one.candidate for one in probes}
    if asked:
        say(f"tune: rung 0 compares {len(candidates)} backbones on {share.text()} each, {len(asked)} to go")
    # max_calls=0: Ray would end a process that used a GPU after each task, and the next would import torch again.
    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_calls=0)(_probe_here)
    shared = (manifest.uri, settings.pixels, share, dict(environment))
    tasks = {task.remote(candidate, *shared): candidate for candidate in candidates if candidate in asked}
    while tasks:
        (done,), _ = ray.wait(list(tasks), num_returns=1)
        candidate = tasks.pop(done)
        answer = _result_of(done)
        if isinstance(answer, Probe):
            probes.append(answer)
            write_probes(run, probes)
            text = f"{answer.val_top1:.1%} validation top-1 of a linear head, {answer.seconds:.0f} s"
        else:
            text = f"no answer ({answer}); its trials are not held back"
        say(f"tune: rung 0: {named(candidate)}: {text}")
    return order_trials(hypers, probes, margin=settings.search.rung0_margin)


def _probe_here(
    candidate: Candidate, manifest_uri: str, pixels: PixelSettings, share: Share, environment: Mapping[str, str]
) -> Probe | str:
    """Probe one candidate in a worker; gives a sentence where that fails."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(max(1, int(share.cpus)))
    device = "cuda" if share.gpus and torch.cuda.is_available() else "cpu"
    try:
        manifest = read_manifest(manifest_uri)
        block = ensure_block(manifest, pixels)
        return probe(candidate, block, pixels, class_count=len(manifest.classes), device=device)
    except CarrayError as err:
        return str(err)


def _result_of(task: Any) -> Probe | str:
    """Give a task's probe, or a sentence where its process was lost or torch cannot run the backbone."""
    try:
        return ray.get(task)
    except RayError as err:
        lines = [line.strip() for line in str(err).splitlines() if line.strip()]
        return lines[-1][:300] if lines else type(err).__name__


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
            stop=scheduler,
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

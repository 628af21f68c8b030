"""Runs many trials at once under Ray Tune, one ASHA a family, and keeps our own log of every epoch and decision.

From: a manifest and settings. To: a run folder (trials.format).
Invariants: a configuration is stored before it is launched; a non-finite epoch ends its trial before any scheduler
sees its figures; one trial failing ends that trial only; finished trials of an earlier start are not run again. Worker
processes are reused from trial to trial, since importing torch and timm takes about 15 s.
Source of ASHA: Li et al., 'A System for Massively Parallel Hyperparameter Tuning', 2020; the rungs are Ray's.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

from ray import cluster_resources, tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from carray.core.errors import SearchError, SettingsError
from carray.core.on_ray import start_ray
from carray.core.progress import say
from carray.core.storage import absolute, aws_environment, exists, join, write_bytes, write_json
from carray.manifest.format import Manifest, read_manifest
from carray.tensors.build import ensure_block
from carray.trials import format as runs
from carray.trials.curves import plot_curves
from carray.trials.draw import draw_trials
from carray.trials.hyper import CnnHyper, TransferHyper, read_hyper
from carray.trials.record import METRIC, SearchLog, check_search, open_run
from carray.trials.space import SearchSettings, TuneSettings

__all__ = ["search"]


def search(manifest: str, *, run: str, settings: TuneSettings) -> dict[str, Any]:
    """Search for the best network and write the run's tables and curves; the same call again does only what is missing.

    Raises:
        SettingsError: settings no network takes, resources the cluster has not, or a run folder of another search.
        SchemaError: the manifest has no usable training or validation image, or fewer than two classes.
        SearchError: no trial came to a result, whose first cause it names, or the search was interrupted.
    """
    run = absolute(run)
    source = read_manifest(absolute(manifest))
    configurations = draw_trials(settings)
    check_search(source, configurations)
    open_run(run, source, settings, configurations)
    if not exists(join(run, runs.DONE)):
        _run_trials(run, source, settings, configurations)
    trials = runs.write_tables(run)
    winner = runs.best_trial(trials)
    plot_curves(run)
    outcome = {
        "run": run,
        "trials": len(trials),
        "best_trial": winner["trial_id"],
        "best_val_top1": winner["val_top1"],
        "by_status": trials["status"].value_counts().to_dict(),
    }
    write_json(join(run, runs.DONE), outcome)
    return outcome


def _run_trials(
    run: str, manifest: Manifest, settings: TuneSettings, configurations: list[CnnHyper | TransferHyper]
) -> None:
    ended = runs.read_trial_ends(run, len(configurations))
    missing = [number for number in range(len(configurations)) if number not in ended]
    if not missing:
        return
    # No result files and no callbacks of Tune's own, and no complaint that they are absent: the log is ours.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output engine prints boxes even when told to be silent
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    with start_ray() as ray_here, tempfile.TemporaryDirectory(prefix="carray-tune-") as scratch:
        resources = _resources(settings, ray_here.node_cpus)
        say(f"tune: {len(missing)} of {len(configurations)} trials to run, each on {resources}")
        # Workers of our own private Ray are this user's processes; a cluster has credentials of its own. Parameters,
        # unlike a configuration, are written to no file.
        environment = dict(aws_environment()) if ray_here.private else {}
        scheduler = FamilyScheduler(SearchLog(run, settings.search, ended), settings.search)
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(TrialRunner, environment=environment), resources),
            param_space={
                "number": tune.grid_search(missing),
                "run": run,
                "manifest": manifest.uri,
                "settings": settings.model_dump(mode="json"),
                "configurations": [hyper.model_dump(mode="json") for hyper in configurations],
            },
            tune_config=tune.TuneConfig(
                scheduler=scheduler, reuse_actors=True, time_budget_s=_seconds(settings.search.time_budget_minutes)
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=scratch,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            ),
        )
        started = time.monotonic()
        tuner.fit()
    _check_ended(run, len(configurations), settings, time.monotonic() - started)


def _check_ended(run: str, count: int, settings: TuneSettings, elapsed_seconds: float) -> None:
    """Tell an interrupted search, which Tune ends as if all were well, from one whose time was up."""
    budget_seconds = _seconds(settings.search.time_budget_minutes)
    unfinished = count - len(runs.read_trial_ends(run, count))
    if unfinished and (budget_seconds is None or elapsed_seconds < budget_seconds):
        raise SearchError(
            f"the search was interrupted with {unfinished} of {count} trials unfinished; repeat the command to go on."
        )


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else minutes * 60


def _resources(settings: TuneSettings, node_cpus: int) -> dict[str, float]:
    gpus_there = cluster_resources().get("GPU", 0.0)
    gpus = settings.search.gpus_per_trial
    gpus = (1.0 if gpus_there else 0.0) if gpus is None else gpus
    if (settings.search.cpus_per_trial or 1) > node_cpus:
        raise SettingsError(
            f"search.cpus_per_trial is {settings.search.cpus_per_trial:g}, but the largest machine has {node_cpus}; "
            "lower it."
        )
    if gpus > gpus_there:
        raise SettingsError(
            f"search.gpus_per_trial is {gpus:g}, but the cluster has {gpus_there:g} GPUs; lower it or leave it out."
        )
    return {"cpu": settings.search.cpus_per_trial or 1, "gpu": gpus}


def _cause(trace: str) -> str:
    """Give the last line of a failed trial's trace: the error and its sentence."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    return (lines[-1] if lines else "its process was lost").removeprefix("carray.core.errors.")[:500]


class TrialRunner(tune.Trainable):
    """Is one worker process that trains trial after trial, an epoch a step."""

    def setup(self, config: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        """Build the trial's network on this machine's shared block.

        Raises:
            SettingsError: the backbone's weights are not to be had.
            DataError: an image changed since the manifest was prepared.
        """
        import torch

        from carray.trials.fit import Fit

        os.environ.update(environment or {})
        # It would say of every trial that its setup takes long; the imports it speaks of happen once a process.
        logging.getLogger("ray.tune.trainable.trainable").setLevel(logging.ERROR)

        settings = TuneSettings.model_validate(config["settings"])
        self.number, self.run_folder = config["number"], config["run"]
        hyper = read_hyper(config["configurations"][self.number])
        torch.set_num_threads(max(1, int(settings.search.cpus_per_trial or 1)))
        manifest = read_manifest(config["manifest"])
        pixels = settings.trial_pixels(hyper)
        self.epochs, self.best_val_top1 = settings.search.epochs, -1.0
        self.fit = Fit(
            hyper,
            ensure_block(manifest, pixels),
            pixels,
            class_count=len(manifest.classes),
            epochs=settings.search.epochs,
            seed=settings.search.seed + self.number,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial in this process, whose imports are done."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch, keep its weights if they are the best, and report."""
        result = self.fit.run_epoch()
        entry: dict[str, Any] = {name: _finite(value) for name, value in vars(result).items()}
        entry |= {"number": self.number, "family": self.fit.hyper.family}
        finite = runs.is_finite(entry)
        if finite and result.val_top1 > self.best_val_top1:
            self.best_val_top1 = result.val_top1
            self._keep_weights()
        # Tune takes no null for a metric; a non-finite epoch is caught before its metric is compared.
        return {
            "entry": json.dumps(entry),
            "epoch": result.epoch,
            METRIC: self.best_val_top1,
            "done": not finite or result.epoch >= self.epochs,
        }

    def _keep_weights(self) -> None:
        from safetensors.torch import save

        tensors = {name: value.detach().cpu().contiguous() for name, value in self.fit.net.state_dict().items()}
        note = {"weights_from": self.fit.net.weights_from}
        write_bytes(runs.best_weights(self.run_folder, runs.trial_id(self.number)), save(tensors, metadata=note))


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None


class FamilyScheduler(FIFOScheduler):
    """Gives each family an ASHA of its own, so that slow starters are judged among themselves, and logs decisions."""

    def __init__(self, log: SearchLog, search: SearchSettings) -> None:
        super().__init__()
        self._log, self._search = log, search
        self._families: dict[str, AsyncHyperBandScheduler] = defaultdict(self._asha)
        for entry in log.replayed():
            bracket = self._families[entry["family"]]._brackets[0]
            bracket.on_result(cast("Trial", _Named(runs.trial_id(entry["number"]))), entry["epoch"], entry[METRIC])

    def _asha(self) -> AsyncHyperBandScheduler:
        return AsyncHyperBandScheduler(
            time_attr="epoch",
            metric=METRIC,
            mode="max",
            max_t=self._search.epochs,
            grace_period=self._search.grace_epochs,
            reduction_factor=self._search.reduction_factor,
            brackets=1,
        )

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take no metric from outside: each family's ASHA has its own."""
        return True

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide about a trial after an epoch, and log the decision before anybody acts on it."""
        entry = json.loads(result["entry"])
        decision = self._decide(tune_controller, trial, result, entry)
        self._log.add(entry, decision)
        return TrialScheduler.CONTINUE if decision == "continue" else TrialScheduler.STOP

    def _decide(self, controller: Any, trial: Trial, result: dict[str, Any], entry: dict[str, Any]) -> str:
        if not runs.is_finite(entry):
            return "non_finite"  # Ray's ASHA would let it go on, and keep the figure in its rung
        family = self._families[entry["family"]]
        if trial.trial_id not in family._trial_info:
            family.on_trial_add(controller, trial)
        answer = family.on_trial_result(controller, trial, result)
        if entry["epoch"] >= self._search.epochs:
            return "finish"
        return "stop" if answer == TrialScheduler.STOP else "continue"

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Take the last epoch of a trial that ended by itself, which Tune reports here and not as a result."""
        entry = json.loads(result.get("entry", "null"))
        if entry and not self._log.has(entry):
            self.on_trial_result(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Note a trial that ended in an error: only Ray knows of it, since its process may be gone."""
        # Tune's own reader looks where the file is copied to later.
        trace = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        self._log.fail(trial.config["number"], _cause(trace))


class _Named:
    """Stands for a trial of an earlier start where ASHA asks for a trial's id only."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id

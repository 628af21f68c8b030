"""Trains one configuration in this process, on all its cores or its GPU, without a search and without Ray.

From `TrainSettings` (YAML, `--set key=value`, or a row of a leaderboard) it makes a run folder like that of a search of
one trial (search.run_folder), and RUN/training.json, which says on which images and after which model. The same call
resumes from the last whole epoch. A refit trains on the validation images, too, so it has no validation figures and its
last epoch is what counts. Importing torch and timm takes about 15 s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import Field

from carray.core.errors import SettingsError
from carray.core.exit_lines import advise, stopping_in_order
from carray.core.progress import say
from carray.core.settings import Seed, Settings, load_settings, parse_settings, read_yaml
from carray.core.store.files import absolute, exists, join, read_json, write_json
from carray.core.store.lease import Lease, hold_run
from carray.images.pixels import PixelSettings
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.judge import diverged
from carray.search.run_log import STOPPED, SearchLog, check_search, open_run
from carray.search.space import FamilySettings, SearchSettings, TuneSettings, draw_trials
from carray.search.train.checkpoint import TrialFiles
from carray.search.train.hyperparameters import HYPERS, CnnHyper, TransferHyper
from carray.tensors.block import ensure_block

if TYPE_CHECKING:
    from carray.search.train.fit import Fit

__all__ = [
    "TRAINING",
    "TrainSettings",
    "find_row",
    "read_settings",
    "refit_run",
    "settings_of_row",
    "train",
    "train_epochs",
]

TRAINING = "training.json"


class TrainSettings(Settings):
    """All settings of `carray train`."""

    hyper: dict[str, Any] = Field(default_factory=dict)
    """The configuration: `family` (transfer, or cnn) and the values that it takes, over its own defaults."""
    epochs: int = Field(default=6, ge=1, le=10_000)
    """Epochs, which the learning rate schedule spans."""
    seed: Seed = 0
    """Seed of all random numbers."""
    pixels: PixelSettings = PixelSettings()
    """Pixel settings, as of `carray tune`."""

    def configuration(self) -> CnnHyper | TransferHyper:
        """Check the configuration, its sizes against pixels.decode_size included.

        Raises:
            SettingsError: an unknown family, or values that it does not take.
        """
        return draw_trials(self.as_search())[0]

    def as_search(self) -> TuneSettings:
        """Give the search of one trial that this training is, for the run's files.

        Raises:
            SettingsError: an unknown family, or values that it does not take.
        """
        family = self.hyper.get("family", "transfer")
        if family not in HYPERS:
            raise SettingsError(f"hyper.family is {family!r}; allowed are {' and '.join(sorted(HYPERS))}.")
        try:
            hyper = parse_settings(HYPERS[family], self.hyper)
        except SettingsError as err:
            raise SettingsError([f"hyper.{problem}" for problem in err.problems]) from None
        default = hyper.model_dump(mode="json", exclude={"family"})
        search = SearchSettings(trials=1, epochs=self.epochs, seed=self.seed, scheduler="none", rung0="off")
        return TuneSettings(search=search, pixels=self.pixels, families={family: FamilySettings(default=default)})


def read_settings(config: str | None = None, *, overrides: Iterable[str] = ()) -> TrainSettings:
    """Read a training's settings from a YAML file and `key.sub=value` overrides, which win.

    A file of `carray tune` gives the default of its first family.

    Raises:
        SettingsError: a value is not one, or the file is none of `train` and none of `tune`.
        StorageError: the file cannot be read.
    """
    start = read_yaml(config) if config else {}
    if config and {"families", "search"} & set(start):
        tune = load_settings(TuneSettings, config=config)
        first = draw_trials(tune.model_copy(update={"search": tune.search.model_copy(update={"trials": 1})}))[0]
        start = _values(first.model_dump(mode="json"), tune, number=0)
    settings = load_settings(TrainSettings, start=start, overrides=overrides)
    settings.configuration()
    return settings


def settings_of_row(run: str, row: str, *, overrides: Iterable[str] = ()) -> tuple[TrainSettings, dict[str, Any]]:
    """Give the settings that a row of a run's leaderboard was trained with, and the row.

    The search's pixels, epochs and seed are among them, so that it trains as the trial did.

    Raises:
        SettingsError: no run lies there, it has no such row, or an override is not one.
    """
    chosen = find_row(run, row)
    hyper = json.loads(chosen["hyper"])
    if hyper is None:
        raise SettingsError(f"{chosen['trial_id']} of {run} was never begun and has no configuration; choose another.")
    tune = parse_settings(TuneSettings, run_folder.read_search(run)["settings"])
    settings = load_settings(
        TrainSettings, start=_values(hyper, tune, number=int(chosen["number"])), overrides=overrides
    )
    settings.configuration()
    return settings, chosen


def find_row(run: str, row: str) -> dict[str, Any]:
    """Give a row of a run's leaderboard, by its rank, counted from 1, or by its trial's id.

    Raises:
        SettingsError: no run lies there, or it has no such row.
    """
    trials = run_folder.read_trials(run)
    ids = list(trials["trial_id"])
    if row.isdecimal() and 1 <= int(row) <= len(ids):
        row = ids[int(row) - 1]
    if row not in ids:
        raise SettingsError(
            f"{run} has no row {row!r}; allowed are 1 to {len(ids)}, as carray leaderboard counts them, and the trials "
            f"{min(ids)} to {max(ids)}."
        )
    return {str(key): value for key, value in trials.iloc[ids.index(row)].items()}


def _values(hyper: dict[str, Any], tune: TuneSettings, *, number: int) -> dict[str, Any]:
    return {
        "hyper": hyper,
        "epochs": tune.search.epochs,
        "seed": tune.search.seed + number,  # as the trial's own
        "pixels": tune.pixels.model_dump(mode="json"),
    }


def refit_run(run: str, trial: str, epochs: int) -> str:
    """Give the folder in which a search's trial is trained once more, on train and val, for so many epochs."""
    return join(run, "refit", f"{trial}-{epochs}")


def train(
    manifest: str,
    *,
    run: str,
    settings: TrainSettings,
    refit_of: Mapping[str, Any] | None = None,
    finish: Callable[[str], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train one configuration and write its run; the same call again resumes.

    `refit_of` names the run and the trial that is trained once more, then on the validation images, too. `finish` is
    called with the finished run while this process holds it; its result is added to the outcome.

    Raises:
        SettingsError: values no network takes, or a folder that holds another run.
        SchemaError: the manifest has no usable training or validation image.
        SearchError: the loss was not finite in the first epoch.
        BudgetError: another process trains there.
        StoppedError: Ctrl-C or SIGTERM.
        StorageError: storage refused to keep the weights or the log.
    """
    run = absolute(run)
    source, search = read_manifest(absolute(manifest)), settings.as_search()
    (hyper,) = draw_trials(search)
    check_search(source, [hyper])
    splits = ["train", "val"] if refit_of else ["train"]
    with hold_run(run, what="train") as lease:
        _check_folder(run, {"splits": splits, "refit_of": dict(refit_of) if refit_of else None})
        open_run(run, source, search, [hyper])
        if exists(join(run, run_folder.DONE)):
            outcome = dict(read_json(join(run, run_folder.DONE)))
        else:
            advise(f"to resume from the last whole epoch, run the same command again; OUT={run}")
            with stopping_in_order(STOPPED):
                _run_epochs(run, source, search, hyper, splits, lease)
            outcome = _outcome(run)
            write_json(join(run, run_folder.DONE), outcome)
        return outcome if finish is None else {**outcome, **finish(run)}


def _check_folder(run: str, training: Mapping[str, Any]) -> None:
    """Write training.json into a new folder, or check that the folder there is of this very training."""
    uri = join(run, TRAINING)
    if not exists(join(run, run_folder.SEARCH)):
        write_json(uri, training)
    elif not exists(uri):
        raise SettingsError(f"{run} holds a search, which carray tune continues; name another --out.")
    elif (there := read_json(uri)) != training:
        raise SettingsError(
            f"{run} holds another training: one {_described(there)}, not one {_described(training)}; name another "
            "--out."
        )


def _described(training: Mapping[str, Any]) -> str:
    of = training["refit_of"]
    after = f", again after {of['trial_id']} of {of['run']}" if of else ""
    return f"on {' and '.join(training['splits'])}{after}"


def _run_epochs(
    run: str,
    manifest: Manifest,
    settings: TuneSettings,
    hyper: CnnHyper | TransferHyper,
    splits: Sequence[str],
    lease: Lease,
) -> None:
    import torch

    from carray.search.train.fit import Fit

    cpus, gpu = len(os.sched_getaffinity(0)), torch.cuda.is_available()
    torch.set_num_threads(cpus)
    log = _TrainLog(run, settings.search, devices=1.0 if gpu else float(cpus), check=lease.check)
    if not log.missing:
        return
    say(f"train: on {torch.cuda.get_device_name() if gpu else f'{cpus} CPUs'}, {settings.search.epochs} epochs")
    fit = Fit(
        hyper,
        ensure_block(manifest, settings.pixels),
        settings.trial_pixels(hyper),
        class_count=len(manifest.classes),
        epochs=settings.search.epochs,
        seed=settings.search.seed,
        device="cuda" if gpu else "cpu",
        splits=splits,
    )
    files = TrialFiles(run, 0)
    if damage := files.restore(fit):
        log.remark(0, damage)
    for entry in train_epochs(fit, files, 0):
        log.add(entry)


def train_epochs(fit: Fit, files: TrialFiles, number: int) -> Iterator[dict[str, Any]]:
    """Train a trial to its end, and yield each epoch's entry for the log once its weights and checkpoint are written.

    The first entry is that of the checkpoint's last epoch, if there is one: a killed process may not have logged it.

    Raises:
        SettingsError: not even two images fit into the device's memory.
        StorageError: storage refused the files after every try, or another process has claimed the trial.
    """
    files.take()
    if fit.history:
        yield fit.history[-1].log_entry(number, fit.hyper.family)
    while fit.epoch < fit.epochs:
        result = fit.run_epoch()
        entry = result.log_entry(number, fit.hyper.family)
        if not diverged(entry):
            refitted = entry["val_top1"] is None and fit.epoch == fit.epochs
            files.keep(fit, result, always=refitted)
        yield entry
        if diverged(entry):
            return


class _TrainLog(SearchLog):
    """The log of a single training; its lines give the time that is left."""

    def _say(self, entry: Mapping[str, Any]) -> None:
        epochs = self._search.epochs
        loss = "not finite" if entry["train_loss"] is None else f"{entry['train_loss']:.3f}"
        top1 = "" if entry["val_top1"] is None else f"  val top-1 {entry['val_top1']:.1%}"
        left_minutes = (epochs - entry["epoch"]) * entry["seconds"] / 60
        left = f"  ETA {left_minutes:.1f} min" if entry["decision"] == "continue" else ""
        note = f"  ({entry['note']})" if entry["note"] else ""
        say(
            f"train {entry['clock_seconds'] / 60:5.1f} min  epoch {entry['epoch']}/{epochs}  loss {loss}{top1}  "
            f"{entry['images_per_second']:,.0f} images a second{left}{note}"
        )


def _outcome(run: str) -> dict[str, Any]:
    trials = run_folder.write_tables(run)
    row = trials.iloc[0]
    refitted = row["status"] == "finished" and pd.isna(row["val_top1"])
    best = None if refitted else float(run_folder.best_trial(trials)["val_top1"])
    return {"run": run, "trial": str(row["trial_id"]), "epochs": int(row["epochs"]), "val_top1": best}

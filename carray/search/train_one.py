"""Trains one configuration in this process, on all its cores or its GPU, without a search and without Ray.

From: a manifest and TrainSettings. To: a run folder like that of a search of one trial (search.run_folder), and
RUN/training.json, which says on which images and after which model.
Invariants: the same call goes on from the last whole epoch; an epoch's weights and checkpoint are written before it is
logged; a refit takes the validation images, too, so it has no validation figures and its last epoch is what counts.
Cost: importing torch and timm takes about 15 s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from carray.core.errors import SettingsError
from carray.core.exit_lines import advise, stopping_in_order
from carray.core.progress import say
from carray.core.store.files import absolute, exists, join, read_json, write_json
from carray.core.store.lease import Lease, hold_run
from carray.manifest.manifest_file import Manifest, read_manifest
from carray.search import run_folder
from carray.search.run_log import SearchLog, check_search, open_run
from carray.search.train.trial_files import Kept
from carray.search.train_settings import TrainSettings
from carray.tensors.block import ensure_block

__all__ = ["TRAINING", "refit_run", "train"]

TRAINING = "training.json"
_STOPPED = "every logged epoch stays, and the same command goes on from there."


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
    """Train one configuration and write its run; the same call again does only what is missing.

    Args:
        manifest: Table written by carray prepare.
        run: Folder of the run.
        settings: The configuration, and for how many epochs.
        refit_of: What names the trial that is trained once more; the validation images are then trained on, too.
        finish: What is done with the finished run before another process may have it; what it gives is added.

    Raises:
        SettingsError: values no network takes, or a folder that holds another run.
        SchemaError: the manifest has no usable training or validation image.
        SearchError: the loss became no number in the first epoch.
        BudgetError: another process trains there.
        StoppedError: Ctrl-C or SIGTERM.
        StorageError: storage refused to keep the weights or the log.
    """
    run = absolute(run)
    source = read_manifest(absolute(manifest))
    check_search(source, [settings.configuration()])
    with hold_run(run, what="train") as lease:
        _open(run, source, settings, refit_of)
        if exists(join(run, run_folder.DONE)):
            outcome = dict(read_json(join(run, run_folder.DONE)))
        else:
            advise(f"to go on from the last whole epoch, run the same command again; OUT={run}")
            with stopping_in_order(_STOPPED):
                _run_epochs(run, source, settings, lease, refit=refit_of is not None)
            outcome = _outcome(run, refit=refit_of is not None)
            write_json(join(run, run_folder.DONE), outcome)
        return outcome if finish is None else {**outcome, **finish(run)}


def _open(run: str, manifest: Manifest, settings: TrainSettings, refit_of: Mapping[str, Any] | None) -> None:
    """Take up a new folder, or check that the one there is of this very training."""
    wanted: dict[str, Any] = {
        "splits": _splits(refit=refit_of is not None),
        "refit_of": None if refit_of is None else dict(refit_of),
    }
    place = join(run, TRAINING)
    if not exists(join(run, run_folder.SEARCH)):
        write_json(place, wanted)
    elif not exists(place):
        raise SettingsError(f"{run} holds a search, which carray tune continues; name another --out.")
    elif (there := dict(read_json(place))) != wanted:
        raise SettingsError(
            f"{run} holds another training: one {_described(there)}, not one {_described(wanted)}; name another --out."
        )
    open_run(run, manifest, settings.as_search(), [settings.configuration()])


def _splits(*, refit: bool) -> list[str]:
    return ["train", "val"] if refit else ["train"]


def _described(training: Mapping[str, Any]) -> str:
    of = training["refit_of"]
    after = f", again after {of['trial_id']} of {of['run']}" if of else ""
    return f"on {' and '.join(training['splits'])}{after}"


def _run_epochs(run: str, manifest: Manifest, settings: TrainSettings, lease: Lease, *, refit: bool) -> None:
    import torch

    from carray.search.train.fit import Fit

    cpus, gpu = len(os.sched_getaffinity(0)), torch.cuda.is_available()
    torch.set_num_threads(cpus)
    log = _TrainLog(run, settings.as_search().search, devices=1.0 if gpu else float(cpus), check=lease.check)
    if not log.missing:
        return
    say(f"train: on {torch.cuda.get_device_name() if gpu else f'{cpus} CPUs'}, {settings.epochs} epochs")
    hyper, search = settings.configuration(), settings.as_search()
    fit = Fit(
        hyper,
        ensure_block(manifest, search.pixels),
        search.trial_pixels(hyper),
        class_count=len(manifest.classes),
        epochs=settings.epochs,
        seed=settings.seed,
        device="cuda" if gpu else "cpu",
        splits=_splits(refit=refit),
    )
    kept = Kept(run, 0)
    damage = kept.restore(fit)
    if damage:
        log.remark(0, damage)
    for result in fit.history:
        _log_epoch(log, result, hyper.family, settings.epochs, refit=refit)
    while log.missing:
        result = fit.run_epoch()
        decision = _decision(result, settings.epochs, refit=refit)
        if decision != "non_finite":
            kept.keep(fit, result, always=refit and decision == "finish")
        _log_epoch(log, result, hyper.family, settings.epochs, refit=refit)


def _log_epoch(log: SearchLog, result: Any, family: str, epochs: int, *, refit: bool) -> None:
    """Log an epoch, unless the log knows it from an earlier start."""
    values = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in vars(result).items()}
    entry = {**values, "number": 0, "family": family}
    if log.decision_of(entry) is None:
        log.add(entry, _decision(result, epochs, refit=refit))


def _decision(result: Any, epochs: int, *, refit: bool) -> str:
    losses = [result.train_loss] if refit else [result.train_loss, result.val_loss]
    if not all(math.isfinite(loss) for loss in losses):
        return "non_finite"
    return "finish" if result.epoch >= epochs else "continue"


class _TrainLog(SearchLog):
    """Says each epoch as one of a single training, with the time that is left."""

    def _say(self, record: Mapping[str, Any]) -> None:
        epochs = self._search.epochs
        loss = "not finite" if record["train_loss"] is None else f"{record['train_loss']:.3f}"
        top1 = "" if record["val_top1"] is None else f"  val top-1 {record['val_top1']:.1%}"
        left_minutes = (epochs - record["epoch"]) * record["seconds"] / 60
        left = f"  ETA {left_minutes:.1f} min" if record["decision"] == "continue" else ""
        note = f"  ({record['note']})" if record["note"] else ""
        say(
            f"train {record['clock_seconds'] / 60:5.1f} min  epoch {record['epoch']}/{epochs}  loss {loss}{top1}  "
            f"{record['images_per_second']:,.0f} images a second{left}{note}"
        )


def _outcome(run: str, *, refit: bool) -> dict[str, Any]:
    trials = run_folder.write_tables(run)
    row = trials.iloc[0]
    best = None if refit and row["status"] == "finished" else float(run_folder.best_trial(trials)["val_top1"])
    return {"run": run, "trial": str(row["trial_id"]), "epochs": int(row["epochs"]), "val_top1": best}

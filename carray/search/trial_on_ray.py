"""Trains trial after trial in one process under Ray Tune, an epoch a step.

An epoch's weights and checkpoint lie in the run folder before the epoch is reported; a new process reports the
checkpoint's last epoch again, which the log knows or takes. An error ends the trial; a full disk, an unreachable store
or a changed image ends the search; a lost process or a failed device is Tune's to replace. Importing torch and timm
takes about 15 s, once a process.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import platform
import signal
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from ray import tune

from carray.core.errors import CarrayError, DataError, StorageError
from carray.manifest.manifest_file import read_manifest
from carray.search.judge import diverged
from carray.search.space import TuneSettings
from carray.search.train.checkpoint import TrialFiles
from carray.search.train.hyperparameters import read_hyper
from carray.search.train_one import train_epochs
from carray.tensors.block import ensure_block

__all__ = ["TrialRunner"]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


class TrialRunner(tune.Trainable):
    """A process that trains trials, one after another.

    Its config has `number` and `hyper`; what all trials share comes as parameters, which Tune writes to no file.
    """

    def setup(self, config: dict[str, Any], shared: Mapping[str, Any] | None = None) -> None:
        """Build the trial's network on this machine's block, and resume from its checkpoint if there is one."""
        # Tune warns that each setup is slow; the imports, which are, happen once a process.
        logging.getLogger("ray.tune.trainable.trainable").setLevel(logging.ERROR)
        # Ray's own handler raises anywhere, so each search would end with a traceback; files are written atomically.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._number = config["number"]
        self._ending: dict[str, Any] | None = None
        try:
            self._begin(config["hyper"], dict(shared or {}))
        except Exception as err:
            self._ending = _ending(err)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next trial in this process, whose imports are done."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train one epoch, write its weights if they are the best and a checkpoint, and report it."""
        try:
            return self._ending or self._next_result()
        except Exception as err:
            return _ending(err)

    def _begin(self, hyper_values: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
        import torch

        from carray.search.train.fit import Fit

        os.environ.update(shared["environment"])
        torch.set_num_threads(max(1, int(shared["cpus"])))
        settings = TuneSettings.model_validate(shared["settings"])
        self._epochs = settings.search.epochs
        self._open_block(shared["manifest"], settings)
        # The last trial's memory is freed before the next network is built.
        self._entries: Iterator[dict[str, Any]] = iter(())
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        hyper = read_hyper(hyper_values)
        fit = Fit(
            hyper,
            self._block,
            settings.trial_pixels(hyper),
            class_count=self._class_count,
            epochs=settings.search.epochs,
            seed=settings.search.seed + self._number,
            device="cuda" if shared["gpus"] and torch.cuda.is_available() else "cpu",
        )
        files = TrialFiles(shared["run"], self._number)
        self._restarted = files.restore(fit)
        self._entries = train_epochs(fit, files, self._number)

    def _open_block(self, manifest_uri: str, settings: TuneSettings) -> None:
        """Map the block, once a process, since a manifest of a million rows takes seconds to read and hash."""
        if not hasattr(self, "_block"):
            manifest = read_manifest(manifest_uri)
            try:
                self._block = ensure_block(manifest, settings.pixels)
            except DataError as err:
                raise _ImagesError(str(err)) from None
            self._class_count = len(manifest.classes)

    def _next_result(self) -> dict[str, Any]:
        entry = next(self._entries)
        remark = {"restarted": self._restarted} if self._restarted else {}
        self._restarted = None
        done = diverged(entry) or entry["epoch"] >= self._epochs
        return {"entry": json.dumps(entry), "done": done, **remark}


class _ImagesError(DataError):
    """An error of the images, which ends the search and not one trial."""


def _ending(err: Exception) -> dict[str, Any]:
    """Turn an error into the end of the trial or the search; raises one of the device, so that a new process tries."""
    if isinstance(err, StorageError):
        return {"halt": str(err), "halt_kind": "storage", "done": True}
    if isinstance(err, _ImagesError):
        return {"halt": str(err), "halt_kind": "data", "done": True}
    if isinstance(err, CarrayError):
        return {"failed": str(err), "done": True}
    if isinstance(err, OSError) and err.errno in _FULL:
        text = f"a trial could not write on {platform.node()} ({err}); free space there."
        return {"halt": text, "halt_kind": "storage", "done": True}
    if "CUDA error" in str(err):
        raise err
    traceback.print_exc()  # a bug: the run folder gets one line, a developer needs the rest
    return {"failed": " ".join(f"{type(err).__name__}: {err}".split())[:500], "done": True}

"""Keeps what a training leaves in its trial's folder: the best epoch's weights, and where it goes on from.

From: a `Fit`, epoch after epoch. To: RUN/trials/ID/best.safetensors and last.safetensors (search.run_folder).
Invariants: both are written before the epoch is logged; best.safetensors names its epoch; a checkpoint that cannot be
read is as good as none, since an epoch that is run again gives the same figures. Each process that takes a trial up
counts one turn up in holder.json, and looks whose turn it is before it writes: a machine that was cut off, and whose
trial went on elsewhere meanwhile, would else put an earlier epoch's weights in the place of a later one's.
"""

from __future__ import annotations

from typing import Any

from carray.core.errors import SettingsError, StorageError
from carray.core.store.files import delete, exists, list_files, read_bytes, read_json, write_bytes, write_json
from carray.search import run_folder
from carray.search.train.checkpoint import safetensors_metadata

__all__ = ["Kept"]


class Kept:
    """Is one trial's folder, while its training runs."""

    def __init__(self, run: str, number: int) -> None:
        self._number, self._turn = number, 0
        self._holder = run_folder.trial_holder(run, number)
        self._last = run_folder.last_checkpoint(run, number)
        self._best = run_folder.best_weights(run, run_folder.trial_id(number))
        self._folder = run_folder.trial_folder(run, number)
        self._note: dict[str, Any] = {"epoch": 0, "val_top1": -1.0}

    def restore(self, fit: Any) -> str | None:
        """Go on from the trial's checkpoint, if it has one; says why where it cannot be used.

        Raises:
            StorageError: storage refused to give it.
        """
        for uri in list_files(self._folder):
            if uri.rsplit("/", 1)[-1].startswith(".writing-"):  # of a process that was killed
                delete(uri)
        self._note = self._read_note()
        if exists(self._last):
            try:
                fit.restore(read_bytes(self._last))
            except SettingsError as err:
                return str(err)
        return None

    def take(self) -> None:
        """Take the trial up, once it is sure that this process trains it: Tune readies processes for trials of others.

        Raises:
            StorageError: storage refused.
        """
        if not self._turn:
            self._turn = self._now() + 1
            write_json(self._holder, {"turn": self._turn})

    def keep(self, fit: Any, result: Any, *, always: bool = False) -> None:
        """Keep an epoch's weights if they are the best, or `always`, and what the next epoch starts from.

        Raises:
            StorageError: storage refused either after every try, or another process has taken the trial up.
        """
        from safetensors.torch import save

        self.take()
        # Where a trial had to start anew, its earlier best stays until the same epoch, or a better one, has come.
        if always or result.val_top1 > self._note["val_top1"] or result.epoch == self._note["epoch"]:
            self._note = {"epoch": result.epoch, "val_top1": result.val_top1}
            note = {"weights_from": fit.net.weights_from, **{key: str(value) for key, value in self._note.items()}}
            tensors = {name: value.contiguous() for name, value in fit.weights().items()}
            write_bytes(self._best, save(tensors, metadata=note), check=self._check)
        write_bytes(self._last, fit.checkpoint(), check=self._check)

    def _check(self) -> None:
        if self._now() != self._turn:
            raise StorageError(
                f"{run_folder.trial_id(self._number)} went on in another process, so this one, whose machine was given "
                "up, writes no more of it."
            )

    def _now(self) -> int:
        """Give the turn that is noted; 0 where the trial has ended, or not begun."""
        try:
            return int(read_json(self._holder)["turn"]) if exists(self._holder) else 0
        except StorageError:
            if exists(self._holder):
                raise
            return 0  # the trial ended between the two looks

    def _read_note(self) -> dict[str, Any]:
        """Say what best.safetensors holds."""
        if not exists(self._best):
            return {"epoch": 0, "val_top1": -1.0}
        data = read_bytes(self._best)
        try:
            header = safetensors_metadata(data)
            return {"epoch": int(header["epoch"]), "val_top1": float(header["val_top1"])}
        except (ValueError, KeyError, TypeError):  # damaged, and so no better than none
            return {"epoch": 0, "val_top1": -1.0}

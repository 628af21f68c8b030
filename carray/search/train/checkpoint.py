"""Packs a training's state as safetensors, whose loading runs no code, and keeps it in the trial's folder.

best.safetensors, which names its epoch, and last.safetensors (search.run_folder) are written before the epoch is
logged. A checkpoint that cannot be read is as good as none, since an epoch that is run again gives the same figures.
Each process that takes up a trial writes a higher number into holder.json and checks it before it writes weights: a
machine that was cut off must not overwrite those of the process that took over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from carray.core.errors import SettingsError, StorageError
from carray.core.store.files import delete_unfinished, exists, read_bytes, read_json, write_bytes, write_json
from carray.search import run_folder

_NO_BEST: dict[str, Any] = {"epoch": 0, "val_top1": -1.0}

__all__ = ["TrialFiles", "optimizer_state", "pack", "restore_optimizer", "unpack"]


def pack(parts: Mapping[str, Mapping[str, Tensor]], note: Mapping[str, Any]) -> bytes:
    """Pack named groups of tensors and a JSON note."""
    from safetensors.torch import save

    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, named in parts.items()
        for name, value in named.items()
    }
    return save(tensors, metadata={"note": json.dumps(note)})


def unpack(data: bytes, expected: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Unpack groups of tensors and their note.

    `expected` holds tensors of the right shapes for the groups that are known beforehand.

    Raises:
        SettingsError: the bytes are cut short or no safetensors, or hold another network's tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        given = load(data)
        note = json.loads(run_folder.safetensors_metadata(data)["note"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as err:
        raise SettingsError(f"the checkpoint is cut short or damaged ({err}); the trial starts again.") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in given.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    for part, named in expected.items():
        there = {name: value.shape for name, value in parts.get(part, {}).items()}
        if there != {name: value.shape for name, value in named.items()}:
            raise SettingsError(f"the checkpoint holds another network ({part} differs); the trial starts again.")
    return parts, note


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name an optimiser's tensors by parameter number: '3.exp_avg'."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value)
        for number, named in state.items()
        for name, value in named.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put an optimiser's tensors back; its rates and other settings stay as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            # Fused kernels read both in memory order, which for channels last differs from the checkpoint's.
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class TrialFiles:
    """A trial's folder while its training runs: restores the checkpoint, keeps the best weights and the last state."""

    def __init__(self, run: str, number: int) -> None:
        self._number, self._claim = number, 0
        self._holder = run_folder.trial_holder(run, number)
        self._last = run_folder.last_checkpoint(run, number)
        self._best = run_folder.best_weights(run, run_folder.trial_id(number))
        self._folder = run_folder.trial_folder(run, number)
        self._note = _NO_BEST

    def restore(self, fit: Any) -> str | None:
        """Load the trial's checkpoint into `fit`, if there is one; gives the reason where it cannot be used."""
        delete_unfinished(self._folder)
        self._note = self._read_note()
        if exists(self._last):
            try:
                fit.restore(read_bytes(self._last))
            except SettingsError as err:
                return str(err)
        return None

    def take(self) -> None:
        """Claim the trial, at its first step only: Tune also sets up processes that never train it."""
        if not self._claim:
            self._claim = self._claimed() + 1
            write_json(self._holder, {"turn": self._claim})

    def keep(self, fit: Any, result: Any, *, always: bool = False) -> None:
        """Write an epoch's weights if they are the best, or `always`, and the checkpoint of the next epoch.

        Raises:
            StorageError: storage refused either after every try, or another process has claimed the trial.
        """
        from safetensors.torch import save

        self.take()
        # A trial that starts again keeps its earlier best until the same epoch, or a better one, is reached.
        if always or result.val_top1 > self._note["val_top1"] or result.epoch == self._note["epoch"]:
            self._note = {"epoch": result.epoch, "val_top1": result.val_top1}
            note = {"weights_from": fit.net.weights_from, **{key: str(value) for key, value in self._note.items()}}
            tensors = {name: value.contiguous() for name, value in fit.weights().items()}
            write_bytes(self._best, save(tensors, metadata=note), check=self._check)
        write_bytes(self._last, fit.checkpoint(), check=self._check)

    def _check(self) -> None:
        if self._claimed() != self._claim:
            raise StorageError(
                f"{run_folder.trial_id(self._number)} was resumed in another process, so this one, whose machine was "
                "given up, writes no more of it."
            )

    def _claimed(self) -> int:
        """Read the last claim's number; 0 where the trial has ended or not begun."""
        try:
            return int(read_json(self._holder)["turn"]) if exists(self._holder) else 0
        except StorageError:
            if exists(self._holder):
                raise
            return 0  # the trial ended between the two looks

    def _read_note(self) -> dict[str, Any]:
        """Read the epoch and accuracy of best.safetensors; those of none where it is absent or damaged."""
        if not exists(self._best):
            return _NO_BEST
        data = read_bytes(self._best)
        try:
            header = run_folder.safetensors_metadata(data)
            return {"epoch": int(header["epoch"]), "val_top1": float(header["val_top1"])}
        except (ValueError, KeyError, TypeError):
            return _NO_BEST

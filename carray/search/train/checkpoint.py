"""Turns a training's state into bytes and back, as safetensors, so that loading runs no code.

From: named tensors of the network, its running mean and its optimiser, and a note. To: bytes, and back.
Invariants: what is cut short or of another network is refused before anything is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from carray.core.errors import SettingsError

__all__ = ["optimizer_state", "pack", "restore_optimizer", "safetensors_metadata", "unpack"]


def pack(parts: Mapping[str, Mapping[str, Tensor]], note: Mapping[str, Any]) -> bytes:
    """Pack named groups of tensors and a note that JSON can hold."""
    from safetensors.torch import save

    tensors = {
        f"{part}/{name}": value.detach().cpu().contiguous().clone()
        for part, named in parts.items()
        for name, value in named.items()
    }
    return save(tensors, metadata={"note": json.dumps(note)})


def unpack(data: bytes, expected: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Unpack groups of tensors and their note.

    `expected` names, for the groups whose tensors are known beforehand, each tensor's shape.

    Raises:
        SettingsError: the bytes are cut short or no safetensors, or hold another network's tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        given = load(data)
        note = json.loads(safetensors_metadata(data)["note"])
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as err:
        raise SettingsError(f"the checkpoint is cut short or damaged ({err}); the trial has to start anew.") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in given.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    for part, named in expected.items():
        there = {name: value.shape for name, value in parts.get(part, {}).items()}
        if there != {name: value.shape for name, value in named.items()}:
            raise SettingsError(f"the checkpoint holds another network ({part} differs); the trial has to start anew.")
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
            # Fused kernels go through both in memory's order, which for channels last is another than the checkpoint's.
            value = torch.empty_like(parameter, requires_grad=False).copy_(value)
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """Read the notes of a safetensors file: 8 bytes of a length, little-endian, then so much JSON.

    Raises:
        ValueError: the bytes hold no such header.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        return {str(key): str(value) for key, value in json.loads(data[8 : 8 + length])["__metadata__"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise ValueError(f"no header of safetensors with notes ({type(err).__name__})") from None

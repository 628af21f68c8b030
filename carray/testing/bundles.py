"""Packs a tiny untrained CNN, whose scores are arbitrary and always the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["pack_small"]


def pack_small(bundle: str | os.PathLike[str], classes: Sequence[str], **described: Any) -> str:
    """Pack a CNN of 40 pixels with these classes; returns the bundle's folder.

    Args:
        bundle: A folder that does not exist.
        classes: Names of the classes.
        described: What `pack_bundle` is told else, such as a temperature.

    Raises:
        StorageError: the bundle cannot be written.
    """
    import torch

    from carray.bundle.pack import pack_bundle
    from carray.images.pixels import PixelSettings
    from carray.search.train.hyperparameters import CnnHyper
    from carray.search.train.nets import build_net

    torch.manual_seed(0)
    hyper = CnnHyper(input_size=40, stages=2, width=4)
    given: dict[str, Any] = {"temperature": 1.0, "metrics": {}, **described}
    pack_bundle(
        build_net(hyper, class_count=len(classes)),
        str(bundle),
        classes=list(classes),
        pixels=PixelSettings(decode_size=48, input_size=40),
        uses_boxes=False,
        net_note=hyper.model_dump(mode="json"),
        search_note={"trial_id": "none"},
        parity_pixels_NHWC=np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8),
        **given,
    )
    return str(bundle)

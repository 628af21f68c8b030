"""Exports a network to ONNX and proves that the file computes the same; tries a search's backbones before it begins.

torch's newer exporter makes bundles (4 to 13 s), the older one (0.5 to 3 s) where it fails, and for trying backbones.
What either made is compared with torch on batches of several sizes. A backbone is tried with random weights, and its
success is remembered under `$CARRAY_CACHE/backbones` for these versions of the libraries.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.store.files import exists, read_json, write_json
from carray.core.text import one_line
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.tensors.block import cache_home

__all__ = ["check_backbones", "export_onnx", "quiet"]

PARITY_TOLERANCE = 1e-3
"""Largest difference of a logit between torch and onnxruntime, relative to the logits' spread."""
_BATCH_IMAGES = 32
_SOFTWARE = ("timm", "torch", "onnx", "onnxscript", "onnxruntime")

Pixels = npt.NDArray[np.uint8]


def export_onnx(net: Any, pixels_NHWC: Pixels, *, fast: bool = False) -> tuple[bytes, dict[str, float]]:
    """Export a network that takes uint8 images of `pixels_NHWC`'s size; gives the file and its parity with torch.

    Args:
        net: A `search.train.nets.Net` on the CPU, in evaluation mode.
        pixels_NHWC: Images on which torch and ONNX are compared, one alone and the others in batches of 32.
        fast: Whether torch's older exporter is tried first.

    Raises:
        BundleError: neither exporter made a model with torch's logits.
    """
    problems = []
    for older in (True, False) if fast else (False, True):
        try:
            model = _export(net, pixels_NHWC.shape[1], older=older)
            return model, _check_parity(net, model, pixels_NHWC)
        except BundleError as err:
            problems.append(str(err))
        except Exception as err:  # the exporters and onnxruntime raise anything at all
            problems.append(f"{type(err).__name__}: {one_line(err, 120)}")
    raise BundleError(
        f"neither of torch's exporters made an ONNX file of the same network (the newer one: {problems[fast]}; the "
        f"older one: {problems[not fast]}); nothing was packed, so take another trial or backbone."
    )


def _export(net: Any, input_size: int, *, older: bool) -> bytes:
    import torch

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits, embedding = self.net(pixels.permute(0, 3, 1, 2).to(torch.float32))
            return logits, embedding

    probe = torch.zeros(2, input_size, input_size, 3, dtype=torch.uint8)
    any_batch: dict[str, Any] = {
        True: {"dynamo": False, "dynamic_axes": {name: {0: "batch"} for name in ("pixels", "logits", "embedding")}},
        False: {
            "dynamo": True,
            "dynamic_shapes": {"pixels": {0: torch.export.Dim("batch", min=1)}},
            "external_data": False,
            "verbose": False,
        },
    }[older]
    with tempfile.TemporaryDirectory() as folder, quiet("torch.onnx"):
        path = Path(folder) / "model.onnx"
        names: dict[str, Any] = {"input_names": ["pixels"], "output_names": ["logits", "embedding"]}
        torch.onnx.export(Exported().eval(), (probe,), str(path), **names, **any_batch)
        return path.read_bytes()


@contextlib.contextmanager
def quiet(name: str) -> Iterator[None]:
    """Silence prints, Python's warnings, and what a logger and those below it log but errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _check_parity(net: Any, model: bytes, pixels_NHWC: Pixels) -> dict[str, float]:
    import onnxruntime
    import torch

    from carray.search.train.nets import as_images

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    # One image alone first, to show a batch size that tracing made a constant.
    starts = [0, *range(1, len(pixels_NHWC), _BATCH_IMAGES)]
    batches = [pixels_NHWC[a:b] for a, b in zip(starts, [*starts[1:], len(pixels_NHWC)], strict=True)]
    onnx_NK = np.concatenate([session.run(["logits"], {"pixels": batch})[0] for batch in batches])
    with torch.inference_mode():
        torch_NK = torch.cat([net(as_images(batch))[0] for batch in batches]).numpy()
    difference = float(np.abs(torch_NK - onnx_NK).max())
    agreement = float((torch_NK.argmax(axis=1) == onnx_NK.argmax(axis=1)).mean())
    limit = PARITY_TOLERANCE * max(1.0, float(torch_NK.std()))
    if not difference <= limit:
        raise BundleError(
            f"the exported model's logits differ from torch's by {difference:.3g}, at most {limit:.3g} is allowed, and "
            f"labels agree on {agreement:.1%}"
        )
    return {"images": float(len(pixels_NHWC)), "max_logit_difference": difference, "top1_agreement": agreement}


def check_backbones(configurations: Sequence[CnnHyper | TransferHyper | None]) -> None:
    """Try each backbone of a search at its sizes: build it, run it in training, export it and compare.

    Of the sizes of a backbone that takes any, only the smallest and the largest are tried.

    Raises:
        SettingsError: one sentence for each that cannot be searched, and for each last_stages that is too high.
    """
    from carray.search.train.nets import check_stages

    transfer = [hyper for hyper in configurations if isinstance(hyper, TransferHyper)]
    counts: dict[str, int] = {}
    problems: dict[str, None] = {}
    started, tried = time.monotonic(), 0
    for hyper in _to_try(transfer):
        success = _success_uri(hyper)
        try:
            if success and exists(success):
                counts[hyper.backbone] = int(read_json(success)["stages"])
                continue
            tried += 1
            counts[hyper.backbone] = _try(hyper)
            if success:
                write_json(success, {**_deciding(hyper), "stages": counts[hyper.backbone]})
        except SettingsError as err:
            problems |= dict.fromkeys(err.problems)
    for hyper in transfer:
        try:
            check_stages(hyper, counts.get(hyper.backbone, hyper.last_stages))
        except SettingsError as err:
            problems |= dict.fromkeys(err.problems)
    if tried:
        say(f"backbones: {tried} built, run and exported with random weights in {time.monotonic() - started:.0f} s")
    if problems:
        raise SettingsError(list(problems))


def _to_try(hypers: Sequence[TransferHyper]) -> list[TransferHyper]:
    """List the configurations to try, each once, with random weights."""
    from carray.search.train.weights import takes_one_size

    by_backbone: dict[str, dict[tuple[int, int], TransferHyper]] = {}
    for hyper in hypers:
        plain = TransferHyper(
            backbone=hyper.backbone,
            weights="none",
            train="all",
            input_size=hyper.input_size,
            eval_size=hyper.eval_size,
            drop_path=0.1 if any(one.drop_path for one in hypers if one.backbone == hyper.backbone) else 0.0,
        )
        by_backbone.setdefault(hyper.backbone, {})[hyper.eval_size or hyper.input_size, hyper.input_size] = plain
    chosen = []
    for backbone, sizes in sorted(by_backbone.items()):
        each = [sizes[key] for key in sorted(sizes)]
        chosen += each if takes_one_size(backbone) else each[:1] + each[1:][-1:]
    return chosen


def _try(hyper: TransferHyper) -> int:
    """Build, train and export one backbone; gives its number of stages."""
    import torch

    from carray.search.train.nets import build_net, stages

    size, random = hyper.eval_size or hyper.input_size, np.random.default_rng(0)
    what = "built"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            net = build_net(hyper, class_count=3)
            what = "trained"
            images_BCHW = 255 * torch.rand(2, 3, hyper.input_size, hyper.input_size)
            net.train()(images_BCHW)[0].square().sum().backward()
            what = "exported to ONNX"
            export_onnx(net.eval(), random.integers(0, 256, (3, size, size, 3), dtype=np.uint8), fast=True)
        except SettingsError:
            raise
        except Exception as err:  # each family fails in its own way
            raise SettingsError(
                f"backbone {hyper.backbone} cannot be {what} at {size if what[0] == 'e' else hyper.input_size} pixels "
                f"({type(err).__name__}: {one_line(err, 300)}); choose another input_size, or take it out of the "
                "search."
            ) from None
        return len(stages(net.trunk))


def _deciding(hyper: TransferHyper) -> dict[str, Any]:
    software = {name: importlib.metadata.version(name) for name in _SOFTWARE}
    values = {name: getattr(hyper, name) for name in ("backbone", "input_size", "eval_size", "drop_path")}
    return {**values, "software": software, "version": 1}


def _success_uri(hyper: TransferHyper) -> str | None:
    """Give the file that records a success; None for a backbone of a folder or the hub, which may change."""
    from carray.search.train.weights import registered_name

    if registered_name(hyper.backbone) is None:
        return None
    digest = hashlib.sha256(json.dumps(_deciding(hyper), sort_keys=True).encode()).hexdigest()
    return str(cache_home() / "backbones" / f"{digest[:16]}.json")

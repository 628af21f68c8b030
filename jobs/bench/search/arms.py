"""Runs one measured search in its own process: carray's, or the one that Ray's documentation teaches.

Both arms get the same configurations in the same order, the same images, seeds, epochs and scheduler, a private Ray and
one core per trial, and start with an empty cache; the clock runs from before Ray starts until after it has ended.

The recipe is 'How to use Tune with PyTorch' (ray.tune.examples.cifar10_pytorch): a function trainable with Tune's
defaults, ASHA, a DataLoader over the image files in each trial, float tensors normalised by torchvision, and a report
per epoch with a `torch.save` of network and optimiser. It differs only in what must be the same in both arms (network,
images, batch, epochs, AdamW, loss, ASHA's factor), in one CPU per trial instead of two, so that both cores work, and in
`loaders` processes per trial (the documentation says 8, too many for two cores).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from jobs.bench.rows import ROOT


@dataclass(frozen=True)
class Arm:
    """A search to measure."""

    kind: Literal["carray", "recipe"]
    manifest: str
    settings: dict[str, Any]
    """As of TuneSettings."""
    configurations: list[dict[str, Any]]
    """Hyperparameters, in the order of the trials."""
    loaders: int = 0
    """The recipe's DataLoader processes per trial."""


@dataclass(frozen=True)
class Measured:
    """What a search did and how long it took."""

    wall_seconds: float
    epochs: list[dict[str, Any]]
    """In the order of their ends: number, epoch, seconds, val_top1, for carray more of its log."""
    run: str
    """carray's run folder; empty for the recipe."""

    def rate(self, cores: int) -> float:
        """Return the epochs per core-minute of the whole search on so many cores."""
        return len(self.epochs) / (self.wall_seconds / 60 * cores)

    @property
    def steady_rate(self) -> float:
        """Return the epochs per core-minute of training alone."""
        return len(self.epochs) / (sum(epoch["seconds"] for epoch in self.epochs) / 60)


def measure(arm: Arm, folder: Path) -> Measured:
    """Run one arm below `folder`, which must not exist yet; its cache is deleted afterwards."""
    folder.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps(asdict(arm)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CARRAY_CACHE": str(folder / "cache")}
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "jobs.bench.search.arms", str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=log,
        )
    if done.returncode:
        raise SystemExit(f"the {arm.kind} arm failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return Measured(**json.loads((folder / "measured.json").read_text()))


def _run_carray(arm: Arm, folder: Path) -> Measured:
    from carray.core.settings import parse_settings
    from carray.search.run_folder import read_log
    from carray.search.search_on_ray import search
    from carray.search.space import TuneSettings
    from carray.search.train.hyperparameters import read_hyper

    settings = parse_settings(TuneSettings, arm.settings)
    configurations = [read_hyper(values) for values in arm.configurations]
    run, started = str(folder / "run"), time.monotonic()
    # A search would draw them, its families' defaults first.
    with patch("carray.search.search_on_ray.draw_trials", lambda settings: configurations):
        search(arm.manifest, run=run, settings=settings)
    wall_seconds = time.monotonic() - started
    return Measured(wall_seconds, _of_log(read_log(run)), run)


def _of_log(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("number", "epoch", "seconds", "train_loss", "val_loss", "val_top1", "clock_seconds", "decision")
    return [{name: entry[name] for name in names} for entry in entries]


def _run_recipe(arm: Arm, folder: Path) -> Measured:
    started = time.monotonic()
    epochs = tune_as_documented(arm, folder)
    return Measured(time.monotonic() - started, epochs, "")


def tune_as_documented(arm: Arm, folder: Path) -> list[dict[str, Any]]:
    """Search as documented; returns number, epoch, seconds and val_top1 of every epoch of every trial."""
    from ray import tune

    from carray.core.ray.connect import start_ray
    from carray.manifest.manifest_file import read_manifest

    manifest = read_manifest(arm.manifest)
    index = {name: i for i, name in enumerate(manifest.classes)}
    files = {
        split: [(row["uri"], index[row["label"]]) for row in manifest.of_split(split).to_dict("records")]
        for split in ("train", "val")
    }
    search = arm.settings["search"]
    cpus = search["cpus_per_trial"]
    shared = {
        "files": files,
        "class_count": len(index),
        "epochs": search["epochs"],
        "loaders": arm.loaders,
        "threads": cpus,
    }
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    with start_ray():
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(train_photographs, shared=shared), {"cpu": cpus}),
            param_space={"trial": tune.grid_search(list(enumerate(arm.configurations)))},
            tune_config=tune.TuneConfig(metric="val_top1", mode="max", num_samples=1, scheduler=_scheduler(search)),
            run_config=tune.RunConfig(name="recipe", storage_path=str(folder / "tune"), verbose=0),
        )
        results = tuner.fit()
    rows = []
    for i in range(len(results)):
        result = results[i]
        if result.error is not None:
            raise result.error
        frame = result.metrics_dataframe
        assert frame is not None
        rows += json.loads(frame[["number", "epoch", "seconds", "val_top1"]].to_json(orient="records"))
    return rows


def _scheduler(search: dict[str, Any]) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if search.get("scheduler", "asha") == "none":
        return FIFOScheduler()
    return ASHAScheduler(max_t=search["epochs"], grace_period=1, reduction_factor=search.get("reduction_factor", 3))


def train_photographs(config: dict[str, Any], shared: dict[str, Any]) -> None:
    """Train one configuration, and report each epoch with a checkpoint; Tune calls it in the trial's process."""
    import torch
    from ray import tune

    from carray.search.train.hyperparameters import read_hyper
    from carray.search.train.nets import build_net, freeze, train_mode

    number, values = config["trial"]
    hyper = read_hyper(values)
    torch.manual_seed(number)
    torch.set_num_threads(shared["threads"])
    net = build_net(hyper, class_count=shared["class_count"])
    freeze(net, hyper)
    train_loader, val_loader = _loaders(shared, hyper, net)
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=hyper.label_smoothing)
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=hyper.learning_rate, weight_decay=hyper.weight_decay)
    for epoch in range(1, shared["epochs"] + 1):
        started = time.monotonic()
        train_mode(net)
        for images_BCHW, labels_B in train_loader:
            optimizer.zero_grad()
            loss = criterion(net.score(net.trunk(images_BCHW))[0], labels_B)
            loss.backward()
            optimizer.step()
        figures = _validate(net, val_loader)
        with tempfile.TemporaryDirectory() as folder:
            torch.save((net.state_dict(), optimizer.state_dict()), Path(folder, "checkpoint.pt"))
            report = {"number": number, "epoch": epoch, "seconds": time.monotonic() - started, **figures}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _validate(net: Any, loader: Any) -> dict[str, float]:
    import torch

    net.eval()
    right = images = 0
    loss = 0.0
    with torch.no_grad():
        for images_BCHW, labels_B in loader:
            logits_BK = net.score(net.trunk(images_BCHW))[0]
            loss += float(torch.nn.functional.cross_entropy(logits_BK, labels_B, reduction="sum"))
            right += int((logits_BK.argmax(dim=1) == labels_B).sum())
            images += len(labels_B)
    return {"val_loss": loss / images, "val_top1": right / images}


def _loaders(shared: dict[str, Any], hyper: Any, net: Any) -> tuple[Any, Any]:
    """Make the trial's loaders; the views are torchvision's counterparts of carray's."""
    from torch.utils.data import DataLoader
    from torchvision import transforms

    finish = [
        transforms.ToTensor(),
        transforms.Normalize((net.mean.flatten() / 255).tolist(), (net.std.flatten() / 255).tolist()),
    ]
    crop = transforms.RandomResizedCrop(
        hyper.input_size, scale=(hyper.crop_scale**2, 1.0), ratio=(1 / hyper.crop_stretch, hyper.crop_stretch)
    )
    random_view = transforms.Compose([crop, transforms.RandomHorizontalFlip(), *finish])
    plain_view = transforms.Compose([transforms.Resize((hyper.input_size, hyper.input_size)), *finish])
    batches = {"batch_size": hyper.batch_images, "num_workers": shared["loaders"]}
    train: Any = _Photographs(shared["files"]["train"], random_view)
    val: Any = _Photographs(shared["files"]["val"], plain_view)
    return DataLoader(train, shuffle=True, **batches), DataLoader(val, shuffle=False, **batches)


class _Photographs:
    """A torchvision-style dataset: opens a file, as ImageFolder does, and returns its view and its class."""

    def __init__(self, files: list[tuple[str, int]], view: Any) -> None:
        self._files, self._view = files, view

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self._files[index]
        with Image.open(path) as image:
            return self._view(image.convert("RGB")), label


def main(folder: Path) -> None:
    """Run the arm that a folder describes, and write there what was measured."""
    arm = Arm(**json.loads((folder / "arm.json").read_text()))
    measured = {"carray": _run_carray, "recipe": _run_recipe}[arm.kind](arm, folder)
    (folder / "measured.json").write_text(json.dumps(asdict(measured)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Is the search that Ray's documentation teaches ('How to use Tune with PyTorch', ray.tune.examples.cifar10_pytorch).

As there: a function trainable in a Tuner with Tune's defaults, ASHA, a DataLoader over the image files in each trial,
float tensors normalised by torchvision, a report an epoch with a `torch.save` of network and optimiser. Other than
there, so that only the way of running differs from carray's arm: the network, images, batch, epochs, optimiser (AdamW),
loss and ASHA's factor; one CPU a trial, not two, so that both cores work; and `loaders` processes a trial (the
documentation says 8, which two cores cannot feed).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.bench.arms import Arm

__all__ = ["tune_as_documented"]


def tune_as_documented(arm: Arm, folder: Path) -> list[dict[str, Any]]:
    """Search as documented; gives number, epoch, seconds and val_top1 of every epoch of every trial."""
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
    """Train one configuration, reporting each epoch with a checkpoint; Tune calls it in the trial's process."""
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
        with tempfile.TemporaryDirectory() as place:
            torch.save((net.state_dict(), optimizer.state_dict()), Path(place, "checkpoint.pt"))
            report = {"number": number, "epoch": epoch, "seconds": time.monotonic() - started, **figures}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(place))


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
    """Make the trial's loaders; the views are torchvision's counterparts of what carray's arm is told."""
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
    """Is a torchvision-style dataset: opens a file, as ImageFolder does, and gives its view and its class."""

    def __init__(self, files: list[tuple[str, int]], view: Any) -> None:
        self._files, self._view = files, view

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        path, label = self._files[index]
        with Image.open(path) as image:
            return self._view(image.convert("RGB")), label

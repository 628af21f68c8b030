"""Builds a trial's network: a CNN from scratch, or a timm backbone with trained weights.

Normalisation is part of the network, so what is trained is what is exported. Importing timm takes 7 to 15 s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from carray.core.errors import SettingsError
from carray.images.pixels import PixelSettings
from carray.search.train.hyperparameters import CnnHyper, TransferHyper
from carray.search.train.weights import build_trunk, takes_one_size
from carray.tensors.batches import view_batches
from carray.tensors.block import Block

__all__ = [
    "Net",
    "as_images",
    "build_net",
    "check_stages",
    "freeze",
    "layer_groups",
    "learning_text",
    "predict_logits",
    "split_trunk",
    "stages",
    "train_mode",
]

_LEAST_SHARE, _LEAST_REST, _MOST_STAGES, _SHARE_OF_MANY = 0.03, 0.005, 8, 1 / 6
"""Of `stages`: least share of the parameters, least share at the stem, most stages, and their share beyond that."""

# Channel means and deviations of networks without trained weights.
_CNN_MEAN, _CNN_STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Net(nn.Module):
    """A trunk (pixels to embedding_BD), dropout and a linear head; its input is float images_BCHW in 0..255."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        *,
        embedding_size: int,
        class_count: int,
        dropout: float,
        mean: Any,
        std: Any,
        flip_average: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1) * 255)
        self.trunk = trunk
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(embedding_size, class_count)
        self.embedding_size = embedding_size
        self.flip_average = flip_average
        self.weights_from = "none (random)"
        """Where the trunk's first weights came from."""

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits_BK and embedding_BD, float32; with flip_average, in evaluation, averaged with the mirror's."""
        logits_BK, embedding_BD = self.score(self.embed(images_BCHW))
        if self.flip_average and not self.training:
            mirrored_BK, mirrored_BD = self.score(self.embed(images_BCHW.flip(3)))
            return (logits_BK + mirrored_BK) / 2, (embedding_BD + mirrored_BD) / 2
        return logits_BK, embedding_BD

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """Compute embedding_BD of pixels of 0..255."""
        return torch.as_tensor(self.trunk(self.normalise(images_BCHW)))

    def normalise(self, images_BCHW: Tensor) -> Tensor:
        """Bring pixels of 0..255 to the trunk's range."""
        return (images_BCHW - self.mean) / self.std

    def score(self, embedding_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits_BK of an embedding, and give both, as float32."""
        return self.head(self.dropout(embedding_BD)).float(), embedding_BD.float()


class _Residual(nn.Module):
    """A residual block of two convolutions (He et al., 'Deep Residual Learning', 2015, figure 2)."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(channels, channels, kernel), nn.ReLU(inplace=True), *_convolution(channels, channels, kernel)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.relu(x_BCHW + self.body(x_BCHW))


def _convolution(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out)]


def build_net(hyper: CnnHyper | TransferHyper, *, class_count: int, load_weights: bool = True) -> Net:
    """Build a network, with trained weights where its hyper asks for them and `load_weights` is on.

    Raises:
        SettingsError: the backbone does not exist, or its weights cannot be found.
    """
    if isinstance(hyper, CnnHyper):
        trunk, embedding_size = _build_cnn(hyper)
        mean, std, weights_from = _CNN_MEAN, _CNN_STD, "none (random)"
    else:
        trunk, weights_from = _build_backbone(hyper, load_weights=load_weights)
        with torch.no_grad():
            embedding_size = trunk(torch.zeros(1, 3, hyper.input_size, hyper.input_size)).shape[1]
        mean, std = (trunk.pretrained_cfg[name] for name in ("mean", "std"))
    net = Net(
        trunk,
        embedding_size=embedding_size,
        class_count=class_count,
        dropout=hyper.dropout,
        mean=mean,
        std=std,
        flip_average=hyper.flip_average,
    )
    net.weights_from = weights_from
    return net


def _build_cnn(hyper: CnnHyper) -> tuple[nn.Module, int]:
    """Build a CNN without its head; gives it and the size of its embedding."""
    layers: list[nn.Module] = []
    channels_in = 3
    for stage in range(hyper.stages):
        channels = hyper.width * 2**stage
        layers += [*_convolution(channels_in, channels, hyper.kernel, stride=2), nn.ReLU(inplace=True)]
        layers += [_Residual(channels, hyper.kernel) for _ in range(hyper.blocks)]
        channels_in = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels_in


def _build_backbone(hyper: TransferHyper, *, load_weights: bool) -> tuple[Any, str]:
    """Build a timm backbone in evaluation mode; gives it and where its weights come from."""
    options: dict[str, Any] = {"drop_path_rate": hyper.drop_path} if hyper.drop_path else {}
    if takes_one_size(hyper.backbone):
        options["img_size"] = hyper.input_size
        if hyper.eval_size not in (None, hyper.input_size):
            raise SettingsError(
                f"eval_size is {hyper.eval_size} and input_size {hyper.input_size}, but {hyper.backbone} takes one "
                "size only; leave eval_size out."
            )
    trunk, weights_from = build_trunk(hyper.backbone, hyper.weights if load_weights else "none", **options)
    return trunk.eval(), weights_from if load_weights else "not loaded"


def freeze(net: Net, hyper: CnnHyper | TransferHyper, *, head_only: bool = False) -> None:
    """Freeze a network but for the part that its hyper says, or but for the head.

    Raises:
        SettingsError: last_stages is more than the backbone has.
    """
    if isinstance(hyper, CnnHyper):
        return
    net.trunk.requires_grad_(hyper.train == "all" and not head_only)
    if hyper.train == "last_stages" and not head_only:
        named, parts = dict(net.trunk.named_parameters()), stages(net.trunk)
        check_stages(hyper, len(parts))
        for names in parts[-hyper.last_stages :]:
            for name in names:
                named[name].requires_grad_(True)


def check_stages(hyper: TransferHyper, count: int) -> None:
    """Check that a backbone of `count` stages has as many as are to learn.

    Raises:
        SettingsError: last_stages is more than it has.
    """
    if hyper.train == "last_stages" and hyper.last_stages > count:
        raise SettingsError(
            f"last_stages is {hyper.last_stages}, but {hyper.backbone} has {count} stages; lower it or train: all."
        )


def stages(trunk: Any) -> list[list[str]]:
    """List the names of a trunk's parameters by stage, from the stem on: parts of it that compare with another's.

    From the head down, timm's groups of layers join until they hold at least 3 % of the parameters, so that a last
    normalisation is no stage of its own; what is left at the stem is one if it holds 0.5 %, else part of the next.
    Where that makes more than 8 stages, as the even blocks of a transformer do, they join to sixths instead. Most
    backbones have 4 or 5 stages. A CNN of ours is one stage.
    """
    groups = layer_groups(trunk)
    sizes = {name: parameter.numel() for name, parameter in trunk.named_parameters()}
    parts = _joined(groups, sizes, _LEAST_SHARE)
    return parts if len(parts) <= _MOST_STAGES else _joined(groups, sizes, _SHARE_OF_MANY)


def _joined(groups: list[list[str]], sizes: dict[str, int], share: float) -> list[list[str]]:
    total = sum(sizes.values())
    parts: list[list[str]] = []
    part: list[str] = []
    for group in reversed(groups):
        part = group + part
        if sum(sizes[name] for name in part) >= share * total:
            parts.insert(0, part)
            part = []
    if part and parts and sum(sizes[name] for name in part) < _LEAST_REST * total:
        parts[0] = part + parts[0]
    elif part:
        parts.insert(0, part)
    return parts


def layer_groups(trunk: Any) -> list[list[str]]:
    """List the names of a trunk's parameters by group of layers as timm has them, from the stem on.

    Where timm names no groups, they end where the feature maps that it names do; a CNN of ours is one group.
    """
    names = [name for name, _ in trunk.named_parameters()]
    if hasattr(trunk, "group_matcher"):
        from timm.models import group_parameters

        try:
            groups = group_parameters(trunk, trunk.group_matcher(coarse=True))
        except AssertionError:  # some have the finer ones only
            groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
        return [groups[key] for key in sorted(groups)]
    ends = [f"{feature['module']}." for feature in getattr(trunk, "feature_info", None) or []]
    parts: list[list[str]] = [[]]
    for name in names:
        if ends and not name.startswith(ends[0]) and any(earlier.startswith(ends[0]) for earlier in parts[-1]):
            ends.pop(0)
            parts.append([])
        parts[-1].append(name)
    return parts


def learning_text(net: Net, hyper: TransferHyper) -> str:
    """Say how much of a frozen network learns: 'trains the head and 3 of 5 stages, 92 % of 3.4 million parameters'."""
    parts = stages(net.trunk)
    learning = {"head": 0, "last_stages": hyper.last_stages, "all": len(parts)}[hyper.train]
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in net.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    what = f"the head and {learning} of {len(parts)} stages" if learning else "the head alone"
    return f"trains {what}, {100 * trained / total:.3g} % of {total / 1e6:.1f} million parameters"


def split_trunk(net: Net, *, input_size: int) -> tuple[nn.Module, nn.Module] | None:
    """Cut a trunk into its frozen lower part and the rest; None where nothing is frozen or it cannot be cut.

    A backbone can be cut where running its children one after another is what it computes: that is tried on a random
    image, not assumed. Both parts share their weights with the trunk.
    """
    if not any(parameter.requires_grad for parameter in net.trunk.parameters()):
        return net.trunk, nn.Identity()
    parts: list[nn.Module] = []
    for child in net.trunk.children():
        parts += list(child.children()) if isinstance(child, nn.Sequential) else [child]
    frozen = next((i for i, part in enumerate(parts) if any(p.requires_grad for p in part.parameters())), len(parts))
    if not any(True for part in parts[:frozen] for _ in part.parameters()):
        return None
    lower, upper = nn.Sequential(*parts[:frozen]), nn.Sequential(*parts[frozen:])
    probe_BCHW = torch.randn(1, 3, input_size, input_size, generator=torch.Generator().manual_seed(0))
    was_training = net.trunk.training
    net.trunk.eval()
    try:
        with torch.no_grad():
            probe_BCHW = probe_BCHW.to(net.mean.device)
            same = torch.allclose(upper(lower(probe_BCHW)), net.trunk(probe_BCHW), rtol=1e-3, atol=1e-4)
    except Exception:  # the children do not even fit; each family raises its own errors
        same = False
    net.trunk.train(was_training)
    return (lower, upper) if same else None


def train_mode(net: Net) -> None:
    """Put a network into training mode and its frozen layers into evaluation's, so that their statistics stay."""
    net.train()
    for module in net.trunk.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def predict_logits(
    net: nn.Module, block: Block, rows_N: npt.NDArray[np.int64], pixels: PixelSettings, *, batch_images: int = 64
) -> npt.NDArray[np.float32]:
    """Compute logits_NK, float32, of evaluation's views of some rows, in their order."""
    net.eval()
    device = next(net.parameters()).device
    batches = view_batches(block, rows_N, pixels, batch_images=batch_images)
    with torch.inference_mode():
        return torch.cat([net(as_images(pixels_BHWC, device))[0].float().cpu() for pixels_BHWC, _ in batches]).numpy()


def as_images(pixels_BHWC: npt.NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """Convert uint8 pixels to a network's input, float32 images_BCHW in 0..255, on a device."""
    return torch.from_numpy(pixels_BHWC).to(device).permute(0, 3, 1, 2).float()

"""Says what one trial is told: the network and how it is trained, typed and bounded.

From: a mapping, out of YAML or drawn. To: a `CnnHyper` or a `TransferHyper`.
Invariants: defaults are known-good values; every value bears on the training, and one that cannot is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from carray.core.settings import Settings, absolute_value

__all__ = ["HYPERS", "CnnHyper", "Hyper", "TrainHyper", "TransferHyper", "read_hyper"]


class TrainHyper(Settings):
    """Holds what every network's training is told."""

    input_size: int = Field(default=160, ge=8)
    """Side of the network's input in training, pixels; at most pixels.decode_size."""
    eval_size: int | None = Field(default=None, ge=8)
    """Side of the input in validation and in the bundle; None is input_size. A larger one mends the larger look that
    random crops give to things (Touvron et al., 'Fixing the train-test resolution discrepancy', 2019)."""
    flip_average: bool = False
    """Whether the network scores an image and its mirror image and averages the logits; doubles the cost."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov's momentum."""
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Peak for all weights but the head's."""
    head_learning_rate: float = Field(default=4e-3, gt=0, le=10)
    """Peak for the last linear layer, which starts from random weights."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's, with Nesterov's correction."""
    weight_decay: float = Field(default=0.02, ge=0, le=10)
    """Biases and normalisation are spared."""
    warmup_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Of all steps: the learning rates rise to their peaks, then fall along a cosine."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of all gradients together; 0 leaves them."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay a step of the running mean of the weights, which is what validation and the bundle use; 0 is none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target that is spread over all classes."""
    class_balance: Literal["none", "sampler", "weights"] = "none"
    """Whether rare classes are drawn more often, or weigh more in the loss."""

    batch_images: int = Field(default=32, ge=2, le=4096)
    """Images a step of the optimiser."""
    micro_batch_images: int | None = Field(default=None, ge=2, le=4096)
    """Images a pass through the network, whose gradients add up. None: batch_images, halved where memory ends."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where a GPU has it, and for CNNs where a CPU has it (AVX-512 BF16); else fp32."""
    compile: bool = False
    """Whether torch.compile takes a minute or so at the first epoch to make the others faster."""

    crop_scale: float = Field(default=0.7, gt=0, le=1)
    """Smallest side of a random crop, as a fraction of the decoded side; 1 takes the whole image."""
    crop_stretch: float = Field(default=1.1, ge=1, le=4)
    """Largest random change of a crop's aspect ratio, as a factor."""
    flip: bool = True
    """Whether images are mirrored at random."""
    colour_jitter: float = Field(default=0.1, ge=0, le=1)
    """Largest random change of brightness and contrast, as a fraction."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """TrivialAugment (Müller & Hutter, 2021) or RandAugment (Cubuk et al., 2019), after crop and flip."""
    erasing: float = Field(default=0.0, ge=0, le=1)
    """Probability that a random rectangle is erased (Zhong et al., 2017)."""
    mixup: float = Field(default=0.0, ge=0, le=10)
    """Alpha of mixup (Zhang et al., 2017); 0 is none."""
    cutmix: float = Field(default=0.0, ge=0, le=10)
    """Alpha of CutMix (Yun et al., 2019); 0 is none. With both, each batch takes one of them at random."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Before the head."""

    @model_validator(mode="after")
    def _check_micro_batch(self) -> TrainHyper:
        if self.micro_batch_images is not None and self.micro_batch_images > self.batch_images:
            raise ValueError(
                f"micro_batch_images is {self.micro_batch_images}, above batch_images {self.batch_images}; lower it"
            )
        return self


class CnnHyper(TrainHyper):
    """Describes a CNN trained from scratch."""

    family: Literal["cnn"] = "cnn"
    stages: int = Field(default=4, ge=1, le=8)
    """Each halves height and width and doubles the channels."""
    blocks: int = Field(default=1, ge=1, le=16)
    """Residual blocks a stage."""
    width: int = Field(default=32, ge=4, le=512)
    """Channels of the first stage."""
    kernel: Literal[3, 5, 7] = 3
    """Side of the convolutions, pixels."""


def _absolute_weights(weights: str) -> str:
    return weights if weights in ("auto", "none") else absolute_value(weights)


def _absolute_backbone(backbone: str) -> str:
    scheme, colon, folder = backbone.partition(":")
    return f"{scheme}:{absolute_value(folder)}" if colon and scheme == "local-dir" else backbone


class TransferHyper(TrainHyper):
    """Describes a timm backbone that starts from trained weights."""

    family: Literal["transfer"] = "transfer"
    backbone: Annotated[str, AfterValidator(_absolute_backbone)] = "tf_efficientnet_lite0"
    """Any timm model name, hf-hub:OWNER/NAME, or local-dir:FOLDER with a config.json as timm writes it."""
    weights: Annotated[str, AfterValidator(_absolute_weights)] = "auto"
    """auto: an installed weights package, else where the backbone's name says, a hub or a folder; a path: a
    .safetensors file or their folder; none: random."""
    train: Literal["head", "last_stages", "all"] = "last_stages"
    """Which part learns; the rest keeps its weights and its normalisation statistics."""
    last_stages: int = Field(default=3, ge=1, le=32)
    """How many of the backbone's last stages learn when train is last_stages; most have 4 or 5 (search.train.nets)."""
    head_only_epochs: int = Field(default=0, ge=0)
    """For so many epochs only the head learns, then what `train` says."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Each of timm's groups of layers further from the head learns at so much of the next one's rate (Howard & Ruder,
    2018)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a residual block is skipped in training (stochastic depth)."""
    cached_views: int = Field(default=8, ge=0, le=1000)
    """How many random views of each image go through the frozen part once, to be kept on disk for every trial that
    has the same frozen part; epoch e trains on view e modulo this. 0 computes the frozen part anew each epoch."""


Hyper = Annotated[CnnHyper | TransferHyper, Field(discriminator="family")]
_HYPER: TypeAdapter[CnnHyper | TransferHyper] = TypeAdapter(Hyper)
HYPERS: dict[str, type[CnnHyper] | type[TransferHyper]] = {"cnn": CnnHyper, "transfer": TransferHyper}


def read_hyper(values: Mapping[str, Any]) -> CnnHyper | TransferHyper:
    """Check one configuration's values, `family` among them.

    Raises:
        ValidationError: pydantic's, naming each value that no network takes.
    """
    return _HYPER.validate_python(dict(values))

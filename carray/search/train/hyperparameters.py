"""Defines the hyperparameters of one trial: type, bounds and a known-good default of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from carray.core.settings import Settings, absolute_value

__all__ = ["HYPERS", "CnnHyper", "Hyper", "TrainHyper", "TransferHyper", "read_hyper"]


class TrainHyper(Settings):
    """Hyperparameters of every network's training."""

    input_size: int = Field(default=160, ge=8)
    """Side of the network's input in training, pixels; at most pixels.decode_size."""
    eval_size: int | None = Field(default=None, ge=8)
    """Side of the input in validation and in the bundle; None is input_size. A larger one makes up for random crops,
    which enlarge objects (Touvron et al., 'Fixing the train-test resolution discrepancy', 2019)."""
    flip_average: bool = False
    """Whether the logits of an image and its mirror image are averaged; doubles the cost."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum."""
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Peak learning rate of all weights but the head's."""
    head_learning_rate: float = Field(default=4e-3, gt=0, le=10)
    """Peak learning rate of the last linear layer, which starts from random weights."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD's Nesterov momentum."""
    weight_decay: float = Field(default=0.02, ge=0, le=10)
    """Weight decay; biases and normalisation have none."""
    warmup_fraction: float = Field(default=0.25, ge=0, lt=1)
    """Fraction of all steps in which the learning rates rise to their peaks, before they fall along a cosine."""
    clip_norm: float = Field(default=0.0, ge=0)
    """Largest norm of all gradients together; 0 does not clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of the running mean of the weights, which validation and the bundle use; 0 is none."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """Share of the target spread over all classes."""
    class_balance: Literal["none", "sampler", "weights"] = "none"
    """Whether rare classes are sampled more often, or weigh more in the loss."""

    batch_images: int = Field(default=32, ge=2, le=4096)
    """Images per optimiser step."""
    micro_batch_images: int | None = Field(default=None, ge=2, le=4096)
    """Images per pass through the network; gradients accumulate. None: batch_images, halved where memory runs out."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where a GPU has it, and for CNNs where a CPU has it (AVX-512 BF16); otherwise fp32."""
    compile: bool = False
    """Whether to use torch.compile, which costs about a minute in the first epoch."""

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
    """A CNN trained from scratch."""

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
    """A timm backbone with trained weights."""

    family: Literal["transfer"] = "transfer"
    backbone: Annotated[str, AfterValidator(_absolute_backbone)] = "tf_efficientnet_lite0"
    """Any timm model name, hf-hub:OWNER/NAME, or local-dir:FOLDER with a config.json as timm writes it."""
    weights: Annotated[str, AfterValidator(_absolute_weights)] = "auto"
    """auto: an installed weights package, else where the backbone's name says, a hub or a folder; a path: a
    .safetensors file or their folder; none: random."""
    train: Literal["head", "last_stages", "all"] = "last_stages"
    """The part that learns; the rest keeps its weights and its normalisation statistics."""
    last_stages: int = Field(default=3, ge=1, le=32)
    """Number of the backbone's last stages that learn with train: last_stages; most have 4 or 5 (search.train.nets)."""
    head_only_epochs: int = Field(default=0, ge=0)
    """First epochs in which only the head learns."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from each of timm's groups of layers to the one before it (Howard & Ruder, 2018)."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Probability that a residual block is skipped in training (stochastic depth)."""
    cached_views: int = Field(default=8, ge=0, le=1000)
    """Random views of each image whose features of the frozen part are cached on disk, for every trial with the same
    frozen part; epoch e trains on view e modulo this. 0 runs the frozen part in each epoch."""


Hyper = Annotated[CnnHyper | TransferHyper, Field(discriminator="family")]
_HYPER: TypeAdapter[CnnHyper | TransferHyper] = TypeAdapter(Hyper)
HYPERS: dict[str, type[CnnHyper] | type[TransferHyper]] = {"cnn": CnnHyper, "transfer": TransferHyper}


def read_hyper(values: Mapping[str, Any]) -> CnnHyper | TransferHyper:
    """Check one configuration's values, `family` among them.

    Raises:
        ValidationError: pydantic's, naming each value that no network takes.
    """
    return _HYPER.validate_python(dict(values))

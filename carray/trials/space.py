"""Says what is searched: typed settings from YAML, and configuration i as a function of (seed, i).

Invariants: every configuration is drawn and checked before anything is launched; the first trial of each family is its
known-good default; drawing more trials leaves the earlier ones as they were.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from carray.core.errors import SettingsError
from carray.core.settings import Settings
from carray.pixels import PixelSettings

__all__ = ["CnnHyper", "FamilySettings", "Hyper", "SearchSettings", "TransferHyper", "TuneSettings", "draw_trials"]


class _TrainHyper(Settings):
    """Holds what every network's training is told."""

    input_size: int = Field(default=160, ge=8)
    """Side of the network's input, pixels; at most pixels.decode_size."""
    learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Peak of the one-cycle schedule for all weights but the head's."""
    head_learning_rate: float = Field(default=4e-3, gt=0, le=10)
    """Peak for the last linear layer, which starts from random weights."""
    weight_decay: float = Field(default=0.02, ge=0, le=10)
    """AdamW's; biases and normalisation are spared."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    batch_images: int = Field(default=32, ge=2, le=4096)
    crop_scale: float = Field(default=0.7, gt=0, le=1)
    """Smallest side of a random crop, as a fraction of the decoded side; 1 takes the whole image."""
    crop_stretch: float = Field(default=1.1, ge=1, le=4)
    """Largest random change of a crop's aspect ratio, as a factor."""
    flip: bool = True
    """Whether images are mirrored at random."""
    colour_jitter: float = Field(default=0.1, ge=0, le=1)
    """Largest random change of brightness and contrast, as a fraction."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Before the head."""


class CnnHyper(_TrainHyper):
    """Describes a CNN trained from scratch."""

    family: Literal["cnn"] = "cnn"
    stages: int = Field(default=4, ge=1, le=8)
    """Each halves height and width and doubles the channels."""
    blocks: int = Field(default=1, ge=1, le=16)
    """Residual blocks a stage."""
    width: int = Field(default=32, ge=4, le=512)
    """Channels of the first stage."""
    kernel: Literal[3, 5, 7] = 3


class TransferHyper(_TrainHyper):
    """Describes a timm backbone that starts from trained weights."""

    family: Literal["transfer"] = "transfer"
    backbone: str = "tf_efficientnet_lite0"
    """Any timm model name."""
    weights: str = "auto"
    """auto: an installed weights package, else the hub; a path: a .safetensors file or their folder; none: random."""
    train: Literal["head", "last_stages", "all"] = "last_stages"
    """Which part learns; the rest keeps its weights and its normalisation statistics."""
    last_stages: int = Field(default=3, ge=1, le=32)
    """How many of the backbone's last stages learn when train is last_stages."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)


Hyper = Annotated[CnnHyper | TransferHyper, Field(discriminator="family")]
_HYPER: TypeAdapter[CnnHyper | TransferHyper] = TypeAdapter(Hyper)
_MODELS: dict[str, type[CnnHyper] | type[TransferHyper]] = {"cnn": CnnHyper, "transfer": TransferHyper}


class FamilySettings(Settings):
    """Says how much of a search a family gets, where it starts, and what varies."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Of the trials, relative to the other families' shares."""
    default: dict[str, Any] = Field(default_factory=dict)
    """Values of the first trial, over the hyper's own defaults."""
    space: dict[str, Any] = Field(default_factory=dict)
    """For each varied value: a list (choice), {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}."""


class SearchSettings(Settings):
    """Says how long and how widely to search."""

    trials: int = Field(default=8, ge=1, le=100_000)
    epochs: int = Field(default=6, ge=1, le=10_000)
    """Of a trial that nobody stops; the schedule of learning rates spans them."""
    seed: int = Field(default=0, ge=0)
    grace_epochs: int = Field(default=1, ge=1)
    """ASHA stops no trial before this epoch."""
    reduction_factor: float = Field(default=3, gt=1)
    """Of the trials at a rung, one in this many goes on."""
    time_budget_minutes: float | None = Field(default=None, gt=0)
    """After this long no epoch is awaited any more, and the best so far is packed."""
    cpus_per_trial: float = Field(default=1, gt=0)
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """None: one whole GPU where the cluster has any, else none."""

    @model_validator(mode="after")
    def _check_epochs(self) -> SearchSettings:
        if self.grace_epochs > self.epochs:
            raise ValueError(f"grace_epochs is {self.grace_epochs}, above epochs {self.epochs}; lower it")
        return self


_FAMILIES: dict[Literal["cnn", "transfer"], FamilySettings] = {
    "transfer": FamilySettings(
        share=0.6,
        space={
            "train": ["head", "last_stages"],
            "learning_rate": {"log_uniform": [3e-4, 3e-3]},
            "label_smoothing": {"uniform": [0.0, 0.2]},
        },
    ),
    "cnn": FamilySettings(
        share=0.4,
        default={"input_size": 96},
        space={
            "input_size": [64, 96],
            "width": [16, 32],
            "blocks": {"integers": [1, 2]},
            "kernel": [3, 5],
            "learning_rate": {"log_uniform": [5e-4, 5e-3]},
            "dropout": {"uniform": [0.0, 0.4]},
        },
    ),
}


class TuneSettings(Settings):
    """Is everything `carray tune` can be told."""

    search: SearchSettings = SearchSettings()
    pixels: PixelSettings = PixelSettings()
    """Of every trial; a trial's own input_size stands in for pixels.input_size."""
    families: dict[Literal["cnn", "transfer"], FamilySettings] = Field(default_factory=lambda: dict(_FAMILIES))

    @model_validator(mode="after")
    def _check_families(self) -> TuneSettings:
        if not self.families:
            raise ValueError("families is empty; name cnn, transfer or both")
        for name, family in self.families.items():
            known = set(_MODELS[name].model_fields) - {"family"}
            for where in ("default", "space"):
                unknown = sorted(set(getattr(family, where)) - known)
                if unknown:
                    raise ValueError(
                        f"families.{name}.{where} has {', '.join(unknown)}; allowed are {', '.join(sorted(known))}"
                    )
        return self

    def trial_pixels(self, hyper: CnnHyper | TransferHyper) -> PixelSettings:
        """Give one trial's pixel settings: the search's, at the trial's input size."""
        return self.pixels.model_copy(update={"input_size": hyper.input_size})


def draw_trials(settings: TuneSettings) -> list[CnnHyper | TransferHyper]:
    """Draw every configuration of a search; number i depends on the seed, i and the families alone.

    Raises:
        SettingsError: a range that cannot be drawn from, or a drawn value that no network takes.
    """
    problems: dict[str, None] = {}
    trials: list[CnnHyper | TransferHyper] = []
    seen: set[str] = set()
    for number in range(settings.search.trials):
        name = _family_of(number, settings)
        values = dict(settings.families[name].default)
        if name in seen:
            values |= _draw(name, settings.families[name].space, np.random.default_rng([settings.search.seed, number]))
        seen.add(name)
        try:
            hyper = _HYPER.validate_python({"family": name, **values})
            _check_size(hyper, settings)
            trials.append(hyper)
        except ValidationError as err:
            for problem in err.errors():
                where = ".".join(str(part) for part in problem["loc"][1:])
                problems[f"families.{name}: {where} is {problem['input']!r}: {problem['msg'].lower()}."] = None
        except SettingsError as err:
            problems |= dict.fromkeys(err.problems)
    if problems:
        raise SettingsError(list(problems))
    return trials


def _check_size(hyper: CnnHyper | TransferHyper, settings: TuneSettings) -> None:
    if hyper.input_size > settings.pixels.decode_size:
        raise SettingsError(
            f"families.{hyper.family}: input_size is {hyper.input_size}, above pixels.decode_size "
            f"{settings.pixels.decode_size}; lower it or raise pixels.decode_size."
        )


def _family_of(number: int, settings: TuneSettings) -> Literal["cnn", "transfer"]:
    """Deal numbers to families in proportion to their shares, the largest first (Bresenham's rule)."""
    names = sorted(settings.families, key=lambda name: (-settings.families[name].share, name))
    total = sum(family.share for family in settings.families.values())
    given = dict.fromkeys(names, 0)
    for i in range(number + 1):
        # A family that has had none goes first, so that even a short search tries each default.
        name = max(names, key=lambda n: (given[n] == 0, settings.families[n].share / total * (i + 1) - given[n]))
        given[name] += 1
    return name


def _draw(family: str, space: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    # Sorted, so that the order of keys in a file does not change what is drawn.
    return {key: _draw_value(f"families.{family}.space.{key}", space[key], rng) for key in sorted(space)}


def _draw_value(where: str, spec: Any, rng: np.random.Generator) -> Any:
    allowed = "a list, {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}"
    if isinstance(spec, list):
        if not spec:
            raise SettingsError(f"{where} is an empty list; give at least one choice.")
        return spec[int(rng.integers(len(spec)))]
    if not isinstance(spec, dict):
        return spec
    kind, bounds = next(iter(spec.items())) if len(spec) == 1 else ("", None)
    if kind not in ("uniform", "log_uniform", "integers"):
        raise SettingsError(f"{where} is {spec!r}; allowed is {allowed}.")
    try:
        low, high = (float(bound) for bound in bounds or ())
    except (TypeError, ValueError):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed are two numbers [a, b].") from None
    if not low <= high or (kind == "log_uniform" and low <= 0):
        raise SettingsError(f"{where}.{kind} is {bounds!r}; allowed is a <= b, and a > 0 for log_uniform.")
    if kind == "integers":
        return int(rng.integers(int(low), int(high) + 1))
    if kind == "log_uniform":
        return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}")
    return float(f"{rng.uniform(low, high):.4g}")

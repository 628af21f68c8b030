"""Defines the settings of `carray tune`: the search, its families and their spaces; unknown names are errors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from carray.core.settings import Seed, Settings
from carray.images.pixels import PixelSettings
from carray.search.train.hyperparameters import HYPERS, CnnHyper, TransferHyper

__all__ = ["FamilySettings", "SearchSettings", "TuneSettings"]


class FamilySettings(Settings):
    """A family of networks: its share of the trials, its first configuration, and its search space."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the trials, relative to the other families' shares."""
    default: dict[str, Any] = Field(default_factory=dict)
    """Values of the first trial, over the hyperparameters' own defaults."""
    space: dict[str, Any] = Field(default_factory=dict)
    """For each varied value: a list (choice), {uniform: [a, b]}, {log_uniform: [a, b]} or {integers: [a, b]}."""


class SearchSettings(Settings):
    """Length, method, budgets and resources of a search."""

    trials: int = Field(default=8, ge=1, le=100_000)
    """Largest number of configurations."""
    epochs: int = Field(default=6, ge=1, le=10_000)
    """Epochs of a trial that is not stopped early; the learning rate schedule spans them."""
    seed: Seed = 0
    """Seed of all random numbers; configuration i is a function of (seed, i)."""
    searcher: Literal["random", "tpe", "grid"] = "random"
    """Source of configurations: random draws, Optuna's TPE, or every combination of the listed choices."""
    scheduler: Literal["asha", "median", "none"] = "asha"
    """Early stopping: ASHA, the median rule, or none."""
    grace_epochs: int = Field(default=1, ge=1)
    """First epoch after which a trial may be stopped."""
    reduction_factor: float = Field(default=3, gt=1)
    """At each rung of ASHA, one trial in this many continues."""
    rung0: Literal["auto", "on", "off"] = "auto"
    """Whether transfer trials are ordered by a linear head on each backbone's frozen features; auto: with two or more
    candidates."""
    rung0_margin: float = Field(default=0.2, ge=0, le=1)
    """Trials whose candidate is more than this below the best candidate's accuracy are not run; 1 drops none."""
    time_budget_minutes: float | None = Field(default=None, gt=0)
    """The search ends after this long, summed over all starts, and packs the best trial so far."""
    device_hours_budget: float | None = Field(default=None, gt=0)
    """The same in device hours: of a trial's GPUs, or of its CPUs where it has none."""
    money_budget: float | None = Field(default=None, gt=0)
    """The same in money, at price_per_device_hour."""
    price_per_device_hour: float | None = Field(default=None, gt=0)
    """Price of one GPU, or of one CPU where a trial has no GPU."""
    cpus_per_trial: float | None = Field(default=None, gt=0)
    """None: one, or each trial's share of the CPUs beside its GPUs."""
    gpus_per_trial: float | None = Field(default=None, ge=0)
    """None: one GPU where the cluster has any, else none; 0.5 lets two trials share one."""
    loggers: list[Literal["tensorboard", "mlflow"]] = Field(default_factory=list)
    """Loggers besides the run's own log: TensorBoard files under RUN/tensorboard, an MLflow server at
    MLFLOW_TRACKING_URI."""
    refit: bool = False
    """Whether the winner is trained once more, on train and val, and packed from that training."""
    refit_epochs: int | None = Field(default=None, ge=1, le=10_000)
    """Epochs of the refit; None is epochs."""
    target_precision: float | None = Field(default=0.95, gt=0, lt=1)
    """Share of accepted labels that should be right: the bundle's threshold is chosen for it on validation images,
    where that can be shown; None chooses no threshold."""

    @field_validator("rung0", mode="before")
    @classmethod
    def _take_yaml_switch(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check_epochs(self) -> SearchSettings:
        if self.grace_epochs > self.epochs:
            raise ValueError(f"grace_epochs is {self.grace_epochs}, above epochs {self.epochs}; lower it")
        if self.money_budget is not None and self.price_per_device_hour is None:
            raise ValueError(f"money_budget is {self.money_budget:g} without price_per_device_hour; give that price")
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
    """All settings of `carray tune`."""

    search: SearchSettings = SearchSettings()
    pixels: PixelSettings = PixelSettings()
    """Pixel settings; a trial's own eval_size or input_size replaces pixels.input_size."""
    families: dict[Literal["cnn", "transfer"], FamilySettings] = Field(default_factory=lambda: dict(_FAMILIES))

    @model_validator(mode="after")
    def _check_families(self) -> TuneSettings:
        if not self.families:
            raise ValueError("families is empty; name cnn, transfer or both")
        for name, family in self.families.items():
            known = set(HYPERS[name].model_fields) - {"family"}
            for where in ("default", "space"):
                unknown = sorted(set(getattr(family, where)) - known)
                if unknown:
                    raise ValueError(
                        f"families.{name}.{where} has {', '.join(unknown)}; allowed are {', '.join(sorted(known))}"
                    )
        return self

    def trial_pixels(self, hyper: CnnHyper | TransferHyper) -> PixelSettings:
        """Give a trial's pixel settings: the search's, at the trial's own size."""
        return self.pixels.model_copy(update={"input_size": hyper.eval_size or hyper.input_size})

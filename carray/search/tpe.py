"""Proposes configurations near the good ones and away from the bad ones, by Optuna's TPE.

A proposal is a function of the seed, the trial's number and the observations alone, so a resumed search proposes the
same; it is checked as a drawn one is.
Source: Bergstra et al., 'Algorithms for Hyper-Parameter Optimization', 2011.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from carray.core.errors import SettingsError
from carray.search.proposals import Domain, deal_families, draw_values, read_values, shorten, spaces
from carray.search.space import TuneSettings
from carray.search.train.hyperparameters import CnnHyper, TransferHyper

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["FIRST_DRAWN", "Observation", "propose"]

FIRST_DRAWN = 5
"""Trials with a score that a family needs before TPE proposes; until then its configurations are drawn at random."""

_ATTEMPTS = 20
"""Proposals with incompatible values that are asked for again, before a drawn configuration is taken."""


@dataclass(frozen=True)
class Observation:
    """How one trial ended."""

    number: int
    hyper: Mapping[str, Any]
    """Its configuration, including `family`."""
    epochs: int
    score: float | None
    """Its best validation top-1, a fraction; None for a trial that failed or diverged."""


def propose(settings: TuneSettings, number: int, observations: Iterable[Observation]) -> CnnHyper | TransferHyper:
    """Propose the configuration of trial `number`; the first of each family is its default.

    Raises:
        SettingsError: the default, or a drawn value, is none that a network takes; `draw_trials` says so beforehand.
    """
    families = list(deal_families(settings))
    family = families[number]
    if families.index(family) == number:
        return read_values(settings, family, settings.families[family].default)
    axes = spaces(settings)[family]
    told = sorted((o for o in observations if o.hyper["family"] == family), key=lambda o: o.number)
    if axes and sum(o.score is not None for o in told) >= FIRST_DRAWN:
        for attempt in range(_ATTEMPTS):
            asked = _ask(settings, axes, told, [settings.search.seed, number, attempt])
            try:
                return read_values(settings, family, {**settings.families[family].default, **asked})
            except SettingsError:
                continue
    return read_values(settings, family, draw_values(settings, family, axes, number))


def _ask(
    settings: TuneSettings, axes: Mapping[str, Domain], told: Iterable[Observation], seed: list[int]
) -> dict[str, Any]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: _distribution(possible) for key, possible in axes.items()}
    with warnings.catch_warnings():
        # Optuna 4 warns that multivariate sampling is experimental.
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
            n_startup_trials=FIRST_DRAWN,
            multivariate=True,
            constant_liar=False,  # which trials are running is not reproducible
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials([_as_trial(settings, distributions, observation) for observation in told])
    asked = study.ask(distributions).params
    return {key: _within(axes[key], value) for key, value in asked.items()}


def _as_trial(
    settings: TuneSettings, distributions: Mapping[str, BaseDistribution], observation: Observation
) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    # A value of the default may lie outside its domain and is then left out.
    held = {
        key: distribution
        for key, distribution in distributions.items()
        if _holds(distribution, observation.hyper.get(key))
    }
    params = {key: observation.hyper[key] for key in held}
    if observation.score is None:
        return create_trial(state=TrialState.FAIL, params=params, distributions=held)
    # Optuna ranks a stopped trial below every finished one, and by its last epoch.
    finished = observation.epochs >= settings.search.epochs
    return create_trial(
        state=TrialState.COMPLETE if finished else TrialState.PRUNED,
        params=params,
        distributions=held,
        value=observation.score,
        intermediate_values={observation.epochs: observation.score},
    )


def _distribution(possible: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if possible.choices:
        return CategoricalDistribution(possible.values or ())
    if possible.kind == "integers":
        return IntDistribution(int(possible.low), int(possible.high))
    return FloatDistribution(possible.low, possible.high, log=possible.kind == "log_uniform")


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (TypeError, ValueError):
        return False


def _within(possible: Domain, value: Any) -> Any:
    """Round a proposed number as a drawn one, within its domain."""
    if not isinstance(value, float) or possible.choices:
        return value
    return min(max(shorten(value), possible.low), possible.high)

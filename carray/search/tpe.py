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
from carray.search.space import Domain, TuneSettings, deal_families, draw_values, read_values, shorten, spaces
from carray.search.train.hyperparameters import CnnHyper, TransferHyper

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

__all__ = ["FIRST_DRAWN", "Observation", "propose"]

FIRST_DRAWN = 5
"""Trials with a score that a family needs before TPE proposes; until then its configurations are drawn at random."""

_ATTEMPTS = 20
"""How often TPE is asked again after incompatible values, before the configuration is drawn at random."""


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
    study.add_trials([_as_trial(distributions, one, epochs=settings.search.epochs) for one in told])
    asked = study.ask(distributions).params
    ranges = {key: possible for key, possible in axes.items() if not possible.choices}
    # Rounded as a drawn number, within its range.
    return asked | {key: min(max(shorten(asked[key]), one.low), one.high) for key, one in ranges.items()}


def _distribution(possible: Domain) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if possible.kind == "choice":
        return CategoricalDistribution(list(dict.fromkeys(possible.choices)))
    low, high = possible.extremes
    if possible.kind == "integers":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=possible.kind == "log_uniform")


def _as_trial(distributions: Mapping[str, BaseDistribution], observation: Observation, *, epochs: int) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    # A value of the default may lie outside its domain and is then left out.
    held = {key: one for key, one in distributions.items() if _holds(one, observation.hyper.get(key))}
    params = {key: observation.hyper[key] for key in held}
    if observation.score is None:
        return create_trial(state=TrialState.FAIL, params=params, distributions=held)
    # Optuna ranks a stopped trial below every finished one, and by its last epoch.
    return create_trial(
        state=TrialState.COMPLETE if observation.epochs >= epochs else TrialState.PRUNED,
        params=params,
        distributions=held,
        value=observation.score,
        intermediate_values={observation.epochs: observation.score},
    )


def _holds(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except (TypeError, ValueError):
        return False

"""Computes how much of the difference between trials each varied hyperparameter explains, by Optuna's functional ANOVA.

Where trials are too few, or all came out alike, a row has no number.
Source: Hutter et al., 'An Efficient Approach for Assessing Hyperparameter Importance', 2014.
Cost: importing Optuna takes 5 s; half a second a family of 40 trials.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

__all__ = ["FEWEST_TRIALS", "importance", "varied_values"]

FEWEST_TRIALS = 6
"""With fewer trials a forest explains their noise; twice the number of varied values is needed, too."""


def importance(trials: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of variance in validation top-1 that each varied hyperparameter explains, by family.

    Only trials with a result count, including stopped ones.

    Returns:
        Columns family, hyper, importance (0..1, sums to 1 in a family; nan where it cannot be told) and trials (how
        many counted); families by name, the most important value first.
    """
    rows: list[dict[str, Any]] = []
    counted = trials[trials["val_top1"].notna() & trials["family"].notna()]
    for family, own in counted.groupby("family"):
        values = varied_values(own)
        results = own["val_top1"].tolist()
        enough = len(own) >= max(FEWEST_TRIALS, 2 * len(values)) and own["val_top1"].nunique() > 1
        shares = _shares(values, results) if enough and values else {}
        ordered = sorted(values, key=lambda name: (-shares.get(name, 0.0), name))
        rows += [
            {"family": family, "hyper": name, "importance": shares.get(name, math.nan), "trials": len(own)}
            for name in ordered
        ]
    return pd.DataFrame(rows, columns=["family", "hyper", "importance", "trials"])


def varied_values(trials: pd.DataFrame) -> dict[str, list[Any]]:
    """Give the values that differ between the trials of one family, in the trials' order."""
    hypers = [json.loads(hyper) for hyper in trials["hyper"]]
    names = list(dict.fromkeys(name for hyper in hypers for name in hyper))
    columns = {name: [hyper.get(name) for hyper in hypers] for name in names}
    return {name: column for name, column in columns.items() if len({json.dumps(value) for value in column}) > 1}


def _shares(values: dict[str, list[Any]], results: list[float]) -> dict[str, float]:
    import optuna

    spoken = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces the study
    try:
        study = optuna.create_study(direction="maximize")
        distributions = {name: _distribution(column) for name, column in values.items()}
        for i, result in enumerate(results):
            params = {name: column[i] for name, column in values.items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=result))
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except RuntimeError:  # no tree of the forest found any variance to explain
        return {}
    finally:
        optuna.logging.set_verbosity(spoken)
    return {name: float(share) for name, share in shares.items()}


def _distribution(column: list[Any]) -> Any:
    from optuna import distributions

    numbers = [value for value in column if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(column):
        return distributions.CategoricalDistribution(list(dict.fromkeys(column)))
    low, high = min(numbers), max(numbers)
    if all(isinstance(value, int) for value in numbers):
        return distributions.IntDistribution(int(low), int(high))
    # Values that span a decade count by their logarithm.
    return distributions.FloatDistribution(low, high, log=low > 0 and high / low >= 10)

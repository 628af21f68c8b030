"""Derives from a run's tables the leaderboard as text, the trials stopped at each rung, and what decided the results.

What the tables do not answer has no row, or a row without a number. Text from elsewhere (a reason, a backbone's name)
is shown, never interpreted.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from carray.core.text import readable

__all__ = [
    "FEWEST_TRIALS",
    "TROUBLED",
    "configurations",
    "importance",
    "leaderboard_text",
    "pareto_front",
    "probe_outcomes",
    "rank_correlation",
    "rung_epochs",
    "rung_table",
]

TROUBLED = ("failed", "non_finite", "dropped")
"""Statuses whose reason is shown trial by trial."""
_UNENDED = ("out_of_time", "unfinished", "not_started")
"""Statuses whose reason is the same for all trials."""
_NO_LIMIT = 1_000_000
_INDENT = " " * 13
_ALWAYS = ("backbone", "train", "input_size")
"""Shown in every configuration that has them, whether they vary or not."""
FEWEST_TRIALS = 6
"""Trials with a result that importance needs, besides two for each varied value: with fewer it is noise."""


def leaderboard_text(
    trials: pd.DataFrame, *, speeds: Mapping[str, float] | None = None, width: int | None = None
) -> str:
    """Write one line a trial, best first: its figures, how it ended and its configuration, below where it is long.

    Args:
        trials: Rows as in trials.parquet, best first.
        speeds: Measured end-to-end images a second by trial_id (search.throughput), for one more column.
        width: Columns to fill; None: those of the terminal, or no limit if the output is a file.
    """
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NO_LIMIT
    shown = configurations(trials)
    speed_head = f" {'images/s':>8}" if speeds else ""
    lines = [
        f"{'#':>3}  {'trial':<7} {'top-1':>6} {'top-5':>6} {'epoch':>7} {'minutes':>8}{speed_head}  {'status':<11} "
        "configuration"
    ]
    for rank, row in enumerate(trials.to_dict("records"), start=1):
        best = "" if pd.isna(row["best_epoch"]) else f"{int(row['best_epoch'])}/{row['epochs']}"
        speed = ""
        if speeds:
            speed = f" {speeds[row['trial_id']]:>8.0f}" if row["trial_id"] in speeds else " " * 9
        figures = (
            f"{rank:>3}  {row['trial_id']:<7} {_percent(row['val_top1']):>6} {_percent(row['val_top5']):>6} {best:>7} "
            f"{row['seconds'] / 60:>8.1f}{speed}  {row['status']:<11} "
        )
        lines += _with_configuration(figures, shown[row["trial_id"]], width)
        if row["status"] in TROUBLED and pd.notna(row["reason"]):
            lines += _wrapped(row["reason"], width)
        if pd.notna(row["note"]):
            lines += _wrapped(f"note: {row['note']}", width)
    unended = trials[trials["status"].isin(_UNENDED)]
    for (status, reason), own in unended.groupby(["status", "reason"]):
        lines += _wrapped(f"{len(own)} {str(status).replace('_', ' ')}: {reason}", width, indent="")
    return "\n".join(lines)


def configurations(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Give for each trial_id the hyperparameters that differ within its family, and the few that are always shown.

    The whole configuration is in trials.parquet. A trial for which the searcher has proposed nothing yet has none.
    """
    shown: dict[str, dict[str, Any]] = {trial: {} for trial in trials["trial_id"]}
    for family, own in trials[trials["family"].notna()].groupby("family"):
        varied = _varied_values(own)
        for row in own.to_dict("records"):
            hyper = json.loads(str(row["hyper"]))
            names = [
                name
                for name in dict.fromkeys([*_ALWAYS, *hyper])
                if name in hyper and (name in varied or name in _ALWAYS)
            ]
            shown[row["trial_id"]] = {"family": family} | {name: hyper[name] for name in names}
    return shown


def _with_configuration(figures: str, values: Mapping[str, Any], width: int) -> list[str]:
    words = [readable(value if name in ("family", "backbone") else f"{name}={value}") for name, value in values.items()]
    text = " ".join(words)
    if len(figures) + len(text) > width:
        return [figures.rstrip(), *_wrapped(text, width)]
    return [(figures + text).rstrip()]


def _wrapped(text: Any, width: int, *, indent: str = _INDENT) -> list[str]:
    return textwrap.wrap(readable(text), max(width, 40), initial_indent=indent, subsequent_indent=indent)


def _percent(fraction: float | None) -> str:
    return "" if fraction is None or pd.isna(fraction) else f"{fraction:.1%}"


def rung_epochs(search: Mapping[str, Any]) -> list[int]:
    """Give the epochs of ASHA's rungs, by the settings in search.json; none for another scheduler."""
    if search["scheduler"] != "asha":
        return []
    epochs, rung = [], float(search["grace_epochs"])
    while math.ceil(rung) < search["epochs"]:
        epochs.append(math.ceil(rung))
        rung *= search["reduction_factor"]
    return list(dict.fromkeys(epochs))


def rung_table(epochs: pd.DataFrame, search: Mapping[str, Any]) -> pd.DataFrame:
    """Count, for each family and rung, the trials that reached it and those stopped there.

    Returns:
        Columns family, epoch, reached, stopped, best (highest top-1 so far of the trials that reached it, fraction)
        and lowest_on (the lowest of those that continued; null if none did). Without rungs, one row for each epoch
        after which a trial was stopped.
    """
    finite = epochs[epochs["decision"] != "non_finite"].sort_values(["number", "epoch"])
    stopped = finite["decision"] == "stop"
    best = finite.groupby("number")["val_top1"].cummax()  # which schedulers compare
    judged = finite.assign(stopped=stopped, best=best, lowest_on=best.mask(stopped))
    figures = {"reached": ("number", "size"), "stopped": ("stopped", "sum")}
    figures |= {"best": ("best", "max"), "lowest_on": ("lowest_on", "min")}
    table = judged.groupby(["family", "epoch"], as_index=False).agg(**figures)
    return table[table["epoch"].isin(rung_epochs(search)) | (table["stopped"] > 0)]


def pareto_front(speeds: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Say for each point whether no other is at least as fast and as accurate, and better in one of the two."""
    points = list(zip(speeds, accuracies, strict=True))
    return [not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points) for p in points]


def probe_outcomes(probes: Sequence[Mapping[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Add to each candidate of rung 0 the best result of its trials.

    Returns:
        The probes' columns backbone, weights, input_size, val_top1 and seconds, and trials (how many ran), dropped,
        and best (their best top-1, fraction; null if none has a result), best probe first.
    """
    hypers = [json.loads(hyper) or {} for hyper in trials["hyper"]]
    rows: list[dict[str, Any]] = []
    for probe in sorted(probes, key=lambda probe: -(probe["val_top1"] or 0.0)):
        own = trials[
            [all(h.get(name) == probe[name] for name in ("backbone", "weights", "input_size")) for h in hypers]
        ]
        row = {name: probe[name] for name in ("backbone", "weights", "input_size", "val_top1", "seconds")}
        ran = own[own["epochs"] > 0]
        row |= {"trials": len(ran), "dropped": int((own["status"] == "dropped").sum())}
        rows.append(row | {"best": ran["val_top1"].max() if ran["val_top1"].notna().any() else None})
    names = ["backbone", "weights", "input_size", "val_top1", "seconds", "trials", "dropped", "best"]
    return pd.DataFrame(rows, columns=names)


def rank_correlation(outcomes: pd.DataFrame) -> float | None:
    """Compute Spearman's correlation between a candidate's figure in rung 0 and its best trial's result, in -1..1.

    None where fewer than three candidates have a result, or one side is constant. `outcomes` is of `probe_outcomes`.
    """
    both = outcomes.loc[outcomes["best"].notna(), ["val_top1", "best"]].astype(float)
    if len(both) < 3 or both.nunique().min() < 2:
        return None
    return float(both["val_top1"].corr(both["best"], method="spearman"))


def importance(trials: pd.DataFrame) -> pd.DataFrame:
    """Compute the share of variance in validation top-1 that each varied value explains, family by family.

    By functional ANOVA (Hutter et al., 'An Efficient Approach for Assessing Hyperparameter Importance', 2014), which
    Optuna computes; its import takes 5 s. Only trials with a result count, stopped ones with what they had reached.

    Returns:
        Columns family, hyper, importance (0..1, sums to 1 in a family; NaN if there are too few trials, or all have
        one result) and trials (how many counted); families by name, the most important value first.
    """
    rows: list[dict[str, Any]] = []
    counted = trials[trials["val_top1"].notna() & trials["family"].notna()]
    for family, own in counted.groupby("family"):
        values = _varied_values(own)
        results = own["val_top1"].tolist()
        enough = len(own) >= max(FEWEST_TRIALS, 2 * len(values)) and own["val_top1"].nunique() > 1
        shares = _shares(values, results) if enough and values else {}
        ordered = sorted(values, key=lambda name: (-shares.get(name, 0.0), name))
        rows += [
            {"family": family, "hyper": name, "importance": shares.get(name, math.nan), "trials": len(own)}
            for name in ordered
        ]
    return pd.DataFrame(rows, columns=["family", "hyper", "importance", "trials"])


def _varied_values(trials: pd.DataFrame) -> dict[str, list[Any]]:
    """Give the values that differ between the trials of one family, in the trials' order."""
    hypers = [json.loads(hyper) for hyper in trials["hyper"]]
    names = list(dict.fromkeys(name for hyper in hypers for name in hyper))
    columns = {name: [hyper.get(name) for hyper in hypers] for name in names}
    return {name: column for name, column in columns.items() if len({json.dumps(value) for value in column}) > 1}


def _shares(values: dict[str, list[Any]], results: list[float]) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it logs the study's creation
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
    return {name: float(share) for name, share in shares.items()}


def _distribution(column: list[Any]) -> Any:
    from optuna import distributions

    numbers = [value for value in column if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(column):
        return distributions.CategoricalDistribution(list(dict.fromkeys(column)))
    low, high = min(numbers), max(numbers)
    if all(isinstance(value, int) for value in numbers):
        return distributions.IntDistribution(int(low), int(high))
    # A range of a decade or more was sampled on a logarithmic scale, or should have been.
    return distributions.FloatDistribution(low, high, log=low > 0 and high / low >= 10)

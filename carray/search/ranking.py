"""Summarises a search's tables: the leader's interval, the trials stopped at each rung, and rung 0's candidates.

A question that the tables cannot answer has no row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

__all__ = ["best_so_far", "interval", "pareto_front", "probe_outcomes", "rung_epochs", "rung_table"]


def interval(fraction: float, images: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of an accuracy that was measured on so many images."""
    from scipy.stats import binomtest

    found = binomtest(round(fraction * images), images).proportion_ci(confidence_level=0.95, method="wilson")
    return float(found.low), float(found.high)


def rung_epochs(search: Mapping[str, Any]) -> list[int]:
    """Give the epochs at which ASHA judges, by search.json's settings; none for another scheduler."""
    if search["scheduler"] != "asha":
        return []
    epochs, rung = [], float(search["grace_epochs"])
    while math.ceil(rung) < search["epochs"]:
        epochs.append(math.ceil(rung))
        rung *= search["reduction_factor"]
    return list(dict.fromkeys(epochs))


def rung_table(epochs: pd.DataFrame, search: Mapping[str, Any]) -> pd.DataFrame:
    """Count, for each family and epoch at which trials were judged, who came there and who was stopped.

    Returns:
        Columns family, epoch, reached, stopped, best (best top-1 so far of those who reached it, fraction) and
        lowest_on (the lowest such of those that continued, or null). Where there are no rungs, one row for
        each epoch after which somebody was stopped.
    """
    judged = best_so_far(epochs)
    stops = set(judged.loc[judged["decision"] == "stop", "epoch"])
    rows: list[dict[str, Any]] = []
    for family, own in judged.groupby("family"):
        for epoch in sorted({*rung_epochs(search), *stops}):
            here = own[(own["epoch"] == epoch) & (own["decision"] != "non_finite")]
            stopped = here["decision"] == "stop"
            if here.empty or (epoch not in rung_epochs(search) and not stopped.any()):
                continue
            on = here.loc[~stopped, "best_top1"]
            rows.append(
                {
                    "family": family,
                    "epoch": epoch,
                    "reached": len(here),
                    "stopped": int(stopped.sum()),
                    "best": here["best_top1"].max(),
                    "lowest_on": on.min() if len(on) else None,
                }
            )
    return pd.DataFrame(rows, columns=["family", "epoch", "reached", "stopped", "best", "lowest_on"])


def best_so_far(epochs: pd.DataFrame) -> pd.DataFrame:
    """Add to each epoch its trial's best top-1 so far, as `best_top1`, which is what schedulers compare."""
    ordered = epochs.sort_values(["number", "epoch"])
    finite = ordered["val_top1"].where(ordered["decision"] != "non_finite")
    return ordered.assign(best_top1=finite.groupby(ordered["number"]).cummax())


def pareto_front(speeds: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Say of each point whether no other is at least as fast and as accurate, and better in one of the two."""
    points = list(zip(speeds, accuracies, strict=True))
    return [not any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points) for p in points]


def probe_outcomes(probes: Sequence[Mapping[str, Any]], trials: pd.DataFrame) -> pd.DataFrame:
    """Put beside each of rung 0's candidates what the best of its trials came to.

    Returns:
        The probes' columns, backbone, weights, input_size, val_top1 and seconds, and trials (how many ran), dropped,
        and best (their best top-1, fraction; null where none has a result), best probe first.
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

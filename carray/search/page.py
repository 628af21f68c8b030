"""Writes a run's leaderboard as one page that opens from disk, with no network and nothing beside it.

From: a run's tables, search.json, and done.json, probes.json and throughput.json where they are there.
To: RUN/leaderboard.html.
Invariants: reasons, names and notes are text, never markup, and the page may run no script but its own sorter; every
picture has its figures in a table or a sentence, too; a question that the run cannot answer says so.
Cost: importing matplotlib and Optuna takes 6 s, drawing 2 s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pandas as pd

from carray.core.errors import CarrayError
from carray.core.page import render_page
from carray.core.store.files import absolute, exists, join, read_json, write_bytes
from carray.manifest.manifest_file import read_manifest
from carray.search import figures, ranking, run_folder
from carray.search.importance import FEWEST_TRIALS, importance
from carray.search.leaderboard import configurations
from carray.search.rung0 import rank_correlation, read_probes
from carray.search.throughput import read_throughput, trial_speeds

__all__ = ["PAGE", "write_page"]

PAGE = "leaderboard.html"
_MOST_CURVES = 150
"""Trials drawn a family, the best first: more would hide each other, and the page must stay small."""
_MOST_ROWS = 1000
"""Trials in the table; the others stand in trials.parquet."""
_TROUBLED = ("failed", "non_finite", "dropped")


def write_page(run: str) -> str:
    """Write RUN/leaderboard.html and give its URI.

    Raises:
        SettingsError: no search was ever started there.
        StorageError: a table cannot be read, or the page not be written.
    """
    run = absolute(run)
    search, trials, epochs = run_folder.read_search(run), run_folder.read_trials(run), run_folder.read_epochs(run)
    place = join(run, PAGE)
    write_bytes(place, render_page("search/page.html.j2", _context(run, search, trials, epochs)).encode())
    return place


def _context(run: str, search: Mapping[str, Any], trials: pd.DataFrame, epochs: pd.DataFrame) -> dict[str, Any]:
    settings = search["settings"]["search"]
    best = trials.iloc[0].to_dict() if trials["val_top1"].notna().any() else None
    speeds = trial_speeds(run, trials)
    rows = _rows(trials.head(_MOST_ROWS), speeds)
    return {
        "run": run,
        "name": run.rstrip("/").rsplit("/", 1)[-1],
        "created_at": search.get("created_at", "")[:16].replace("T", " "),
        "settings": settings,
        "best": best,
        "best_row": rows[0] if best else None,
        "headline": _headline(run, search, trials, epochs, best),
        "rows": rows,
        "left_out": len(trials) - len(rows),
        "same_in_all": _same_in_all(trials),
        "families": _families(trials, epochs, settings, best),
        "progress": figures.progress_svg(epochs, title="The best so far, by the search's clock") if len(epochs) else "",
        "rungs": ranking.rung_table(epochs, settings).to_dict("records"),
        "importance": _importance(trials),
        "fewest": FEWEST_TRIALS,
        "speed": _speed(run, trials, speeds),
        "rung0": _rung0(run, trials),
        "troubled": _rows(trials[trials["status"].isin(_TROUBLED)].head(200), {}),
    }


def _headline(
    run: str, search: Mapping[str, Any], trials: pd.DataFrame, epochs: pd.DataFrame, best: Mapping[Any, Any] | None
) -> dict[str, Any]:
    ended = exists(join(run, run_folder.TRIALS)) and exists(join(run, run_folder.DONE))
    done = read_json(join(run, run_folder.DONE)) if ended else {}
    images = _validation_images(search)
    interval = ranking.interval(best["val_top1"], images) if best and images else None
    within = 0 if interval is None else int((trials["val_top1"] >= interval[0]).sum()) - 1
    whole = int((trials["epochs"] > 0).sum()) * search["settings"]["search"]["epochs"]
    clock = epochs["clock_seconds"].max() / 60 if len(epochs) else 0.0
    return {
        "images": images,
        "interval": interval,
        "within": within,
        "by_status": trials["status"].value_counts().to_dict(),
        "finished": bool(done),
        "ended_by": done.get("ended_by"),
        "minutes": done.get("spent", {}).get("minutes", clock),
        "device_hours": float(trials["device_hours"].sum()),
        "money": done.get("spent", {}).get("money"),
        "devices": sorted({f"{devices:g}" for devices in trials["devices"].dropna()}),
        "epochs": len(epochs),
        "whole": whole,
    }


def _validation_images(search: Mapping[str, Any]) -> int | None:
    """Count the images that top-1 was measured on; None where the manifest is away or is another one by now."""
    try:
        manifest = read_manifest(search["manifest"])
        return len(manifest.of_split("val")) if manifest.fingerprint == search["manifest_fingerprint"] else None
    except CarrayError:
        return None


def _rows(trials: pd.DataFrame, speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    told_apart = configurations(trials)
    rows = []
    for place, row in enumerate(trials.to_dict("records"), start=1):
        values = told_apart[row["trial_id"]]
        row = {str(key): None if pd.isna(value) else value for key, value in row.items()}
        row |= {"place": place, "minutes": row["seconds"] / 60, "speed": speeds.get(row["trial_id"])}
        row["best_epoch"] = None if row["best_epoch"] is None else int(row["best_epoch"])  # pandas holds a float
        rows.append(row | {"values": {name: value for name, value in values.items() if name != "family"}})
    return rows


def _same_in_all(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Give for each family what all its trials were told alike."""
    told_apart, same = configurations(trials), {}
    for family, own in trials[trials["family"].notna()].groupby("family"):
        first = own.iloc[0]
        shown = told_apart[first["trial_id"]]
        same[str(family)] = {name: value for name, value in json.loads(first["hyper"]).items() if name not in shown}
    return same


def _families(
    trials: pd.DataFrame, epochs: pd.DataFrame, settings: Mapping[str, Any], best: Mapping[Any, Any] | None
) -> list[dict[str, Any]]:
    """Draw each family's curves; the family of the best comes first."""
    tips = {row["trial_id"]: _tip(row) for row in trials.to_dict("records")}
    drawn = []
    for family in dict.fromkeys(trials["family"].dropna()):
        own = trials[(trials["family"] == family) & (trials["epochs"] > 0)]
        if own.empty:
            continue
        chosen = epochs[epochs["trial_id"].isin(own["trial_id"].head(_MOST_CURVES))]
        svg = figures.curves_svg(
            chosen,
            family=family,
            best=str(best["trial_id"]) if best else "",
            tips=tips,
            rungs=ranking.rung_epochs(settings),
            title=f"Learning curves of {family}",
        )
        drawn.append({"family": family, "svg": svg, "trials": len(own), "drawn": min(len(own), _MOST_CURVES)})
    return drawn


def _tip(row: Mapping[Any, Any]) -> str:
    reached = "no result" if pd.isna(row["val_top1"]) else f"{row['val_top1']:.1%}"
    return f"{row['trial_id']} ({row['family']}): {reached}, {row['status']} after {row['epochs']} epochs"


def _importance(trials: pd.DataFrame) -> list[dict[str, Any]]:
    shares, drawn = importance(trials), []
    for family, own in shares.groupby("family"):
        told = own["importance"].notna().all()
        title = f"What mattered in {family}"
        svg = figures.importance_svg(own, family=str(family), title=title) if told else ""
        drawn.append(
            {"family": family, "svg": svg, "trials": int(own["trials"].iloc[0]), "values": own.to_dict("records")}
        )
    return drawn


def _speed(run: str, trials: pd.DataFrame, speeds: Mapping[str, float]) -> dict[str, Any] | None:
    measured = trials[trials["trial_id"].isin(speeds)]
    if measured.empty:
        return None
    points = measured[["trial_id", "family", "val_top1"]].assign(
        speed=[speeds[trial] for trial in measured["trial_id"]]
    )
    points["on_front"] = ranking.pareto_front(points["speed"].tolist(), points["val_top1"].tolist())
    points["tip"] = [
        f"{row['trial_id']} ({row['family']}): {row['val_top1']:.1%} at {row['speed']:.0f} images a second"
        for row in points.to_dict("records")
    ]
    found = read_throughput(run)
    return {
        "svg": figures.speed_svg(points.head(_MOST_ROWS), title="Accuracy against speed"),
        "front": points[points["on_front"]].sort_values("speed").to_dict("records"),
        "machine": found["machine"],
        "measured_at": found["measured_at"],
        "images": found["images"],
        "runtimes": sorted({network["runtime"] for network in found["networks"].values()}),
    }


def _rung0(run: str, trials: pd.DataFrame) -> dict[str, Any] | None:
    probes = read_probes(run)
    if not probes:
        return None
    outcomes = ranking.probe_outcomes([asdict(probe) for probe in probes], trials)
    both = int(outcomes["best"].notna().sum())
    return {
        "candidates": outcomes.to_dict("records"),
        "svg": figures.probes_svg(outcomes, title="What rung 0 foretold") if both > 2 else "",
        "rank_correlation": rank_correlation(probes, _records(trials)),
        "both": both,
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]

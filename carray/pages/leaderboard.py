"""Writes a run's leaderboard page and the PNG of its learning curves.

From: a run's tables and search.json, with done.json, probes.json and throughput.json where they exist.
To: RUN/leaderboard.html and RUN/curves.png. Importing matplotlib and Optuna takes 6 s, drawing 2 s.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from carray.core.errors import CarrayError
from carray.core.store.files import absolute, exists, join, read_json, write_bytes
from carray.evaluation.metrics import wilson_interval
from carray.manifest.manifest_file import read_manifest
from carray.pages.charts import PAGE_COLOURS, bar_rows, chart, percent_axis, plain_log_axis, whole_numbers
from carray.pages.templates import percent_text, records, render_page
from carray.search import leaderboard, run_folder
from carray.search.rung0 import read_probes
from carray.search.throughput import read_throughput, trial_speeds

__all__ = ["CURVES", "PAGE", "write_curves", "write_page"]

PAGE, CURVES = "leaderboard.html", "curves.png"
_MOST_CURVES = 150
"""Trials drawn a family, the best first: more would hide each other and make the page large."""
_MOST_ROWS = 1000
"""Trials in the table; all are in trials.parquet."""

_INK, _SOFT, _FIRST, _SECOND = (PAGE_COLOURS[name] for name in ("ink", "soft", "first", "second"))
_ON_PAGE = {"transfer": _FIRST, "cnn": _SECOND, "other": _INK, "bad": PAGE_COLOURS["bad"]}
_ON_PNG = {"transfer": "#1864ab", "cnn": "#b3530c", "other": "#5a6068", "bad": "#b3261e"}
"""Colours by family, and of what went wrong."""


def write_page(run: str) -> str:
    """Write RUN/leaderboard.html and return its URI.

    Raises:
        SettingsError: no search was ever started in `run`.
        StorageError: a table cannot be read, or the page cannot be written.
    """
    run = absolute(run)
    search, trials, epochs = run_folder.read_search(run), run_folder.read_trials(run), run_folder.read_epochs(run)
    uri = join(run, PAGE)
    write_bytes(uri, render_page("leaderboard.html.j2", _context(run, search, trials, epochs)).encode())
    return uri


def write_curves(run: str) -> str:
    """Write RUN/curves.png, validation top-1 and training loss of every trial by epoch, and return its URI.

    Raises:
        StorageError: the log cannot be read, or the picture cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    epochs = run_folder.read_epochs(run)
    finite = epochs[epochs["decision"] != "non_finite"]
    best = str(finite.nlargest(1, "val_top1")["trial_id"].iloc[0]) if finite["val_top1"].notna().any() else ""
    figure = Figure(figsize=(10, 4), layout="constrained")
    accuracy, loss = figure.subplots(1, 2)
    _draw_top1(accuracy, epochs, best, _ON_PNG)
    _draw_lines(loss, epochs, "train_loss", best, _ON_PNG)
    loss.set(ylabel="training loss (nats)")
    families = [str(family) for family in dict.fromkeys(epochs["family"])]
    handles = [Line2D([], [], color=_ON_PNG.get(family, _ON_PNG["other"]), label=family) for family in families]
    loss.legend(handles=handles, frameon=False)
    for axes in (accuracy, loss):
        axes.grid(alpha=0.25)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    uri = join(run, CURVES)
    write_bytes(uri, picture.getvalue())
    return uri


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
        "progress": _progress_svg(epochs) if len(epochs) else "",
        "rungs": leaderboard.rung_table(epochs, settings).to_dict("records"),
        "importance": _importance(trials),
        "fewest": leaderboard.FEWEST_TRIALS,
        "speed": _speed(run, trials, speeds),
        "rung0": _rung0(run, trials),
        "troubled": _rows(trials[trials["status"].isin(leaderboard.TROUBLED)].head(200), {}),
    }


def _headline(
    run: str, search: Mapping[str, Any], trials: pd.DataFrame, epochs: pd.DataFrame, best: Mapping[Any, Any] | None
) -> dict[str, Any]:
    ended = exists(join(run, run_folder.TRIALS)) and exists(join(run, run_folder.DONE))
    done = read_json(join(run, run_folder.DONE)) if ended else {}
    images = _validation_images(search)
    interval = wilson_interval(round(best["val_top1"] * images), images) if best and images else None
    return {
        "images": images,
        "interval": interval,
        "within": 0 if interval is None else int((trials["val_top1"] >= interval[0]).sum()) - 1,
        "by_status": trials["status"].value_counts().to_dict(),
        "finished": bool(done),
        "ended_by": done.get("ended_by"),
        "minutes": done.get("spent", {}).get("minutes", epochs["clock_seconds"].max() / 60 if len(epochs) else 0.0),
        "device_hours": float(trials["device_hours"].sum()),
        "money": done.get("spent", {}).get("money"),
        "devices": sorted({f"{devices:g}" for devices in trials["devices"].dropna()}),
        "epochs": len(epochs),
        "whole": int((trials["epochs"] > 0).sum()) * search["settings"]["search"]["epochs"],
    }


def _validation_images(search: Mapping[str, Any]) -> int | None:
    """Count the images that top-1 was measured on; None if the manifest is missing or has changed."""
    try:
        manifest = read_manifest(search["manifest"])
        return len(manifest.of_split("val")) if manifest.fingerprint == search["manifest_fingerprint"] else None
    except CarrayError:
        return None


def _rows(trials: pd.DataFrame, speeds: Mapping[str, float]) -> list[dict[str, Any]]:
    configurations = leaderboard.configurations(trials)
    rows = []
    for rank, row in enumerate(records(trials), start=1):
        values = {name: value for name, value in configurations[row["trial_id"]].items() if name != "family"}
        rows.append(row | {"rank": rank, "speed": speeds.get(row["trial_id"]), "values": values})
    return rows


def _same_in_all(trials: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Return the hyperparameters that all trials of a family share, by family."""
    configurations, same = leaderboard.configurations(trials), {}
    for family, own in trials[trials["family"].notna()].groupby("family"):
        first = own.iloc[0]
        shown = configurations[first["trial_id"]]
        same[str(family)] = {name: value for name, value in json.loads(first["hyper"]).items() if name not in shown}
    return same


def _families(
    trials: pd.DataFrame, epochs: pd.DataFrame, settings: Mapping[str, Any], best: Mapping[Any, Any] | None
) -> list[dict[str, Any]]:
    """Draw each family's curves; the family of the best trial comes first."""
    tips = {
        row["trial_id"]: f"{row['trial_id']} ({row['family']}): {percent_text(row['val_top1']) or 'no result'}, "
        f"{row['status']} after {row['epochs']} epochs"
        for row in records(trials)
    }
    rungs, drawn = leaderboard.rung_epochs(settings), []
    for family in dict.fromkeys(trials["family"].dropna()):
        own = trials[(trials["family"] == family) & (trials["epochs"] > 0)]
        if len(own):
            chosen = epochs[epochs["trial_id"].isin(own["trial_id"].head(_MOST_CURVES))]
            svg = _curves_svg(chosen, family, str(best["trial_id"]) if best else "", tips, rungs)
            drawn.append({"family": family, "svg": svg, "trials": len(own), "drawn": min(len(own), _MOST_CURVES)})
    return drawn


def _importance(trials: pd.DataFrame) -> list[dict[str, Any]]:
    drawn = []
    for family, own in leaderboard.importance(trials).groupby("family"):
        svg = _importance_svg(own, str(family)) if own["importance"].notna().all() else ""
        values = own.to_dict("records")
        drawn.append({"family": family, "svg": svg, "trials": int(own["trials"].iloc[0]), "values": values})
    return drawn


def _speed(run: str, trials: pd.DataFrame, speeds: Mapping[str, float]) -> dict[str, Any] | None:
    measured = trials[trials["trial_id"].isin(speeds)]
    if measured.empty:
        return None
    points = measured[["trial_id", "family", "val_top1"]].assign(
        speed=[speeds[trial] for trial in measured["trial_id"]]
    )
    points["on_front"] = leaderboard.pareto_front(points["speed"].tolist(), points["val_top1"].tolist())
    found = read_throughput(run)
    return {
        "svg": _speed_svg(points.head(_MOST_ROWS)),
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
    outcomes = leaderboard.probe_outcomes([asdict(probe) for probe in probes], trials)
    both = int(outcomes["best"].notna().sum())
    return {
        "candidates": outcomes.to_dict("records"),
        "svg": _probes_svg(outcomes) if both > 2 else "",
        "rank_correlation": leaderboard.rank_correlation(outcomes),
        "both": both,
    }


def _draw_lines(axes: Any, epochs: pd.DataFrame, column: str, best: str, colours: Mapping[str, str]) -> None:
    """Draw one line a trial, `column` by epoch, the best one thick and with a point at each epoch."""
    for (trial, family), own in epochs.groupby(["trial_id", "family"]):
        leads = trial == best
        axes.plot(
            own["epoch"],
            own[column],
            color=colours.get(str(family), colours["other"]),
            linewidth=2.8 if leads else 1.1,
            alpha=1.0 if leads else 0.55,
            zorder=4 if leads else 2,
            marker="o" if leads or len(own) == 1 else None,
            markersize=3.5 if leads else 2,
            gid=f"tip-{trial}",
        )
    axes.set(xlabel="epoch")
    axes.set_xlim(0.7, max(2, epochs["epoch"].max()) + 0.3)
    whole_numbers(axes.xaxis)


def _draw_top1(axes: Any, epochs: pd.DataFrame, best: str, colours: Mapping[str, str]) -> None:
    """Draw validation top-1 by epoch, a cross where a trial was stopped, and a ring at a loss that is not finite."""
    epochs = _finite_so_far(epochs)
    _draw_lines(axes, epochs, "val_top1", best, colours)
    for decision, marker in (("stop", "x"), ("non_finite", "o")):
        ended = epochs[epochs["decision"] == decision]
        style = {"color": colours["bad"], "markersize": 4.5, "fillstyle": "none", "zorder": 3}
        axes.plot(ended["epoch"], ended["val_top1"], marker, **style)
    own = epochs[epochs["trial_id"] == best]
    if own["val_top1"].notna().any():
        top = own.nlargest(1, "val_top1").iloc[0]
        label, point = f"{top['trial_id']}  {top['val_top1']:.1%}", (top["epoch"], top["val_top1"])
        axes.annotate(label, point, xytext=(-4, 7), textcoords="offset points", ha="right", weight="bold", zorder=5)
    percent_axis(axes.yaxis)
    axes.set(ylabel="validation top-1")
    axes.set_ylim(0, max(0.05, epochs["val_top1"].max() * 1.12))


def _finite_so_far(epochs: pd.DataFrame) -> pd.DataFrame:
    """Replace top-1 of an epoch whose loss is not finite by the trial's last one before, or 0."""
    ordered = epochs.sort_values(["trial_id", "epoch"])
    non_finite = ordered["decision"] == "non_finite"
    finite = ordered["val_top1"].where(~non_finite).groupby(ordered["trial_id"]).ffill()
    return ordered.assign(val_top1=finite.mask(non_finite & finite.isna(), 0.0))


def _curves_svg(epochs: pd.DataFrame, family: str, best: str, tips: Mapping[str, str], rungs: Sequence[int]) -> str:
    """Draw one family's rows of epochs.parquet, and a dotted line at each rung."""
    description = "Each line is a trial; a cross marks where it was stopped, a ring a loss not finite."
    with chart(f"Learning curves of {family}", description, tips) as (axes, svg):
        for rung in rungs:
            axes.axvline(rung, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1, zorder=1)
        _draw_top1(axes, epochs, best, _ON_PAGE)
    return svg()


def _progress_svg(epochs: pd.DataFrame) -> str:
    """Draw the best top-1 so far of each family by the search's clock."""
    from matplotlib.lines import Line2D

    with chart("The best result so far by search time", "A step up is a new best trial of its family.") as (axes, svg):
        end, handles = epochs["clock_seconds"].max() / 60, []
        for family, own in epochs.sort_values("sequence").groupby("family"):
            minutes = own["clock_seconds"] / 60
            best = own["val_top1"].where(own["decision"] != "non_finite").cummax().ffill().fillna(0.0)
            colour = _ON_PAGE.get(str(family), _INK)
            axes.step([0, *minutes, end], [0, *best, best.max()], where="post", color=colour, linewidth=1.8)
            handles.append(Line2D([], [], color=colour, label=family))
        axes.legend(handles=handles, loc="lower right")
        percent_axis(axes.yaxis)
        axes.set(xlabel="minutes of search", ylabel="best validation top-1 so far")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return svg()


def _importance_svg(shares: pd.DataFrame, family: str) -> str:
    """Draw one family's shares of variance (search.leaderboard.importance) as bars, the largest on top."""
    shown = shares.head(12)
    title, height = f"What mattered in {family}", 0.9 + 0.28 * len(shown)
    description = "Share of the differences in top-1 that each value explains."
    with chart(title, description, height=height) as (axes, svg):
        texts = [f"{share:.0%}" for share in shown["importance"]]
        bar_rows(axes, shown["hyper"].tolist(), shown["importance"].tolist(), texts, colour=_ON_PAGE.get(family, _INK))
        percent_axis(axes.xaxis)
        axes.set_xlim(0, min(1.0, shown["importance"].max() * 1.15 + 0.02))
        axes.set_xlabel("share of variance explained")
    return svg()


def _speed_svg(points: pd.DataFrame) -> str:
    """Draw top-1 by measured images a second; the Pareto front is ringed and joined, and at most 8 of it are named."""
    rows = points.to_dict("records")
    tips = {
        row[
            "trial_id"
        ]: f"{row['trial_id']} ({row['family']}): {row['val_top1']:.1%} at {row['speed']:.0f} images a second"
        for row in rows
    }
    title, description = "Accuracy against speed", "Further up is more accurate, further right faster."
    with chart(title, description, tips) as (axes, svg):
        front = points[points["on_front"]].sort_values("speed")
        axes.plot(front["speed"], front["val_top1"], color=_INK, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        for row in rows:
            style = {"markeredgecolor": _INK, "markeredgewidth": 1.6} if row["on_front"] else {"markeredgewidth": 0}
            style |= {"color": _ON_PAGE.get(row["family"], _SOFT), "markersize": 7, "gid": f"tip-{row['trial_id']}"}
            axes.plot(row["speed"], row["val_top1"], "o", **style)
        different = front.drop_duplicates(["speed", "val_top1"])
        for row in different.iloc[:: max(1, -(-len(different) // 8))].to_dict("records"):
            point, offset = (row["speed"], row["val_top1"]), {"xytext": (6, 5), "textcoords": "offset points"}
            axes.annotate(row["trial_id"], point, fontsize=8.5, **offset)
        if points["speed"].max() > 5 * points["speed"].min():
            axes.set_xscale("log")
            plain_log_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        axes.margins(x=0.12, y=0.14)
        axes.set(xlabel="images a second, decode included", ylabel="validation top-1")
    return svg()


def _probes_svg(outcomes: pd.DataFrame) -> str:
    """Draw the best result of each candidate's trials by its top-1 in rung 0 (search.leaderboard.probe_outcomes)."""
    with chart("Rung 0 and final results", "Each point is a candidate backbone.") as (axes, svg):
        for rank, row in enumerate(outcomes.to_dict("records"), start=1):
            point = (row["val_top1"], row["best"])
            if pd.notna(row["best"]):
                axes.plot(*point, "o", color=_FIRST, markersize=7)
                axes.annotate(str(rank), point, xytext=(0, 7), textcoords="offset points", ha="center")
        percent_axis(axes.xaxis, axes.yaxis)
        axes.margins(0.14)
        axes.set(xlabel="rung 0: top-1 of a linear head", ylabel="best trial's top-1")
    return svg()

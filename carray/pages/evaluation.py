"""Writes an evaluation's page OUT/report.html and its confusion matrix OUT/confusion.png.

The page is made of SECTIONS, each a template in templates/evaluation/ and a function that gives its context, or None if
there is nothing to show, such as before `carray stress`. Takes 2 s for 196 classes and 8,000 images, most of it to
import matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.certificates import AGREEMENT, AGREEMENT_CONFIDENT, DROP_POINTS
from carray.core.store.files import exists, join, read_json, write_bytes
from carray.core.tables import read_table
from carray.evaluation.corruptions import REENCODED, ROBUSTNESS_SCHEMA
from carray.evaluation.evaluation_folder import (
    CONFUSION_PNG,
    OUTSIDE_JSON,
    REPORT_HTML,
    ROBUSTNESS_JSON,
    TABLES,
    table_kind,
)
from carray.evaluation.metrics import confusion_counts
from carray.images.vehicles import parse_vehicle
from carray.pages.charts import PAGE_COLOURS, bar_rows, chart, interval_rows, percent_axis, whole_numbers
from carray.pages.confusion import confusion_png, confusion_svg
from carray.pages.templates import records, render_page

__all__ = ["SECTIONS", "Evaluation", "write_page"]

_MOST_PAIRS, _MOST_UNREADABLE = 100, 200
"""Rows on the page; the tables have all."""
_MOST_POINTS = 400
"""Of a curve; more points make the page larger, not finer."""
_INK, _SOFT, _GRID, _FIRST, _SECOND = (PAGE_COLOURS[name] for name in ("ink", "soft", "grid", "first", "second"))
_LEVELS = {
    "make": "make",
    "make_model": "make and model",
    "body": "body",
    "year": "year",
    "exact": "exact class",
}
_KINDS = {
    "make": "wrong make",
    "model": "right make, wrong model",
    "body": "right model, wrong body",
    "year": "right body, wrong year",
    "variant": "another variant",
    "unnamed": "no vehicle's name",
}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation's folder and the content of its metrics.json."""

    out: str
    metrics: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """Read one of the folder's tables."""
        uri = join(self.out, f"{name}.parquet")
        return read_table(uri, kind=table_kind(name), required=TABLES[name].names).to_pandas()

    @cached_property
    def classes(self) -> list[str]:
        """The bundle's class names, in order."""
        return list(self.table("per_class")["label"])

    @cached_property
    def counts_KK(self) -> npt.NDArray[np.int64]:
        """Images by true class (rows) and predicted class (columns)."""
        predictions, index = self.table("predictions"), pd.Index(self.classes)
        scored = predictions[predictions["status"] == "ok"]
        truth_N, predicted_N = (index.get_indexer(pd.Index(scored[name])) for name in ("truth", "label"))
        return confusion_counts(truth_N, predicted_N, len(index))


def write_page(out: str, metrics: Mapping[str, Any]) -> str:
    """Write OUT/report.html and OUT/confusion.png from the tables in `out`, and return the page's URI.

    Raises:
        StorageError: a table cannot be read, or the page cannot be written.
        SchemaError: a table is not a table of an evaluation.
    """
    evaluation = Evaluation(out, metrics)
    found = ((id, title, context(evaluation)) for id, (title, context) in SECTIONS.items())
    sections = [{"id": id, "title": title, "own": own} for id, title, own in found if own is not None]
    write_bytes(join(out, CONFUSION_PNG), confusion_png(evaluation.counts_KK, evaluation.classes))
    uri = join(out, REPORT_HTML)
    write_bytes(uri, render_page("evaluation.html.j2", {"metrics": metrics, "sections": sections}).encode())
    return uri


def _levels(evaluation: Evaluation) -> dict[str, Any]:
    rows = [{"name": _LEVELS[level], **found} for level, found in evaluation.metrics["levels"].items()]
    return {"rows": rows, "svg": _levels_svg([row for row in rows if row["images"]])}


def _levels_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw each level's accuracy as a point with its interval, the first on top."""
    height, description = 0.95 + 0.36 * len(rows), "Points are measured, lines their 95 % intervals."
    tips = {
        f"{y}": f"{row['name']}: {row['accuracy']:.1%} ({row['low']:.1%} to {row['high']:.1%})"
        for y, row in enumerate(rows)
    }
    with chart("Accuracy by level", description, tips, height=height) as (axes, svg):
        points = [(row["accuracy"], row["low"], row["high"]) for row in rows]
        interval_rows(axes, [row["name"] for row in rows], points, [_FIRST] * len(rows))
        for y, row in enumerate(rows):
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(f"{row['accuracy']:.1%}", (row["accuracy"], y), **place)
        low = min(row["low"] for row in rows)
        axes.set(xlim=(max(0, low - 0.04), 1.005), ylim=(len(rows) - 0.5, -0.65), xlabel="right")
    return svg()


def _kinds(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.metrics["confusion_kinds"]
    # `unnamed` needs a line only where such mistakes exist.
    kinds = [kind for kind, values in found.items() if kind != "unnamed" or values["images"]]
    rows = [{"name": _KINDS[kind], **found[kind]} for kind in kinds]
    mistakes = sum(row["images"] for row in rows)
    # Where no class is a vehicle's name there is one kind only, and nothing to draw.
    drawn = mistakes > found["unnamed"]["images"]
    return {"rows": rows, "mistakes": mistakes, "svg": _kinds_svg(rows) if drawn else ""}


def _kinds_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw counts of images as bars, the first on top, each with its number."""
    names, images = ([row[name] for row in rows] for name in ("name", "images"))
    height = 0.95 + 0.34 * len(rows)
    with chart("Kinds of mistakes", "Bars are counts of images.", height=height) as (axes, svg):
        bar_rows(axes, names, images, [f"{count:,}" for count in images], colour=_SECOND)
        axes.set_xlim(0, max(1, *images) * 1.12)
        axes.set_xlabel("images")
        whole_numbers(axes.xaxis)
    return svg()


def _pairs(evaluation: Evaluation) -> dict[str, Any]:
    pairs, examples = evaluation.table("confused_pairs"), evaluation.table("examples")
    pictured = [
        {"truth": truth, "label": label, "examples": own.to_dict("records")}
        for (truth, label), own in examples.groupby(["truth", "label"], sort=False)
    ]
    counts = pairs.set_index(["truth", "label"])[["images", "fraction"]].to_dict("index")
    return {
        "pictured": [pair | counts[pair["truth"], pair["label"]] for pair in pictured],
        "rows": pairs.head(_MOST_PAIRS).to_dict("records"),
        "count": len(pairs),
        "mistakes": int(pairs["images"].sum()),
    }


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    bins = evaluation.table("calibration")
    stages = {stage: bins[bins["stage"] == stage] for stage in ("before", "after")}
    return {
        "before": _reliability_svg(stages["before"], "Scores before calibration", _SECOND),
        "after": _reliability_svg(stages["after"], "Scores after calibration", _FIRST),
        "rows": [
            {"stage": stage, **row}
            for stage, own in stages.items()
            for row in own[own["images"] > 0].to_dict("records")
        ],
    }


def _reliability_svg(bins: pd.DataFrame, title: str, colour: str) -> str:
    """Draw accuracy by score from one stage's rows of calibration.parquet, the diagonal, and the images per score."""
    seen = bins[bins["images"] > 0]
    tips = {
        f"bin{i}": f"{row['images']:,} images of score {row['mean_score']:.1%} on average: {row['accuracy']:.1%} right"
        for i, row in enumerate(seen.to_dict("records"))
    }
    description = "On the dotted line scores equal accuracy; below it they are too high."
    with chart(title, description, tips) as (axes, svg):
        axes.plot([0, 1], [0, 1], color=_SOFT, linestyle=(0, (2, 3)), linewidth=1.2)
        shares = bins["images"] / bins["images"].sum()
        middles, width = (bins["score_low"] + bins["score_high"]) / 2, bins["score_high"] - bins["score_low"]
        axes.bar(middles, shares, width=0.85 * width, color=_SOFT, alpha=0.3, linewidth=0, label="share of images")
        axes.vlines(seen["mean_score"], seen["low"], seen["high"], color=colour, linewidth=1.1)
        for i, row in enumerate(seen.to_dict("records")):
            axes.plot(row["mean_score"], row["accuracy"], "o", color=colour, markersize=5.5, gid=f"tip-bin{i}")
        axes.legend(loc="upper left")
        percent_axis(axes.xaxis, axes.yaxis)
        axes.set(xlim=(0, 1.01), ylim=(0, 1.02), xlabel="score", ylabel="right")
    return svg()


def _coverage(evaluation: Evaluation) -> dict[str, Any]:
    coverage, found = evaluation.table("coverage"), evaluation.metrics["acceptance"]
    indices = [int(np.searchsorted(coverage["coverage"], share)) for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    chosen = dict.fromkeys(min(index, len(coverage) - 1) for index in indices)
    svg = _coverage_svg(coverage, threshold=found["threshold"], target=found["target_precision"])
    return {"svg": svg, "rows": coverage.iloc[list(chosen)].to_dict("records"), "found": found}


def _coverage_svg(coverage: pd.DataFrame, *, threshold: float | None, target: float | None) -> str:
    """Draw the accuracy of accepted images by their share, and mark the bundle's threshold and target precision."""
    step = max(1, -(-len(coverage) // _MOST_POINTS))
    shown = pd.concat([coverage.iloc[::step], coverage.iloc[-1:]])
    description = "Further right more is accepted; the band is the 95 % interval of each point."
    with chart("Accuracy of what is accepted", description) as (axes, svg):
        axes.fill_between(shown["coverage"], shown["low"], shown["high"], color=_FIRST, alpha=0.2, linewidth=0)
        axes.plot(shown["coverage"], shown["accuracy"], color=_FIRST, linewidth=1.8)
        lowest = shown.loc[shown["coverage"] >= 0.05, "low"].min()
        style: dict[str, Any] = {"textcoords": "offset points", "ha": "right"}
        if target is not None:
            axes.axhline(target, color=_SECOND, linestyle=(0, (4, 3)), linewidth=1.2)
            axes.annotate(f"target {100 * target:.4g}%", (1, target), xytext=(0, 4), color=_SECOND, **style)
            lowest = min(lowest, target - 0.03)
        accepted = coverage[coverage["threshold"] >= threshold] if threshold is not None else coverage.iloc[:0]
        if len(accepted):
            point = (accepted["coverage"].iloc[-1], accepted["accuracy"].iloc[-1])
            axes.plot(*point, "o", color=_SECOND, markersize=8, zorder=5)
            axes.annotate(f"score {threshold:.3f}", point, xytext=(-7, -15), weight="bold", **style)
        percent_axis(axes.xaxis, axes.yaxis)
        axes.set(xlim=(0, 1.01), ylim=(max(0.0, lowest - 0.02), 1.01))
        axes.set(xlabel="accepted", ylabel="right, of the accepted")
    return svg()


def _certificate(evaluation: Evaluation) -> dict[str, Any] | None:
    """Compare a runtime's certificate with its loss on these images; None where there is neither."""
    found, certificates = evaluation.metrics.get("certificate"), evaluation.metrics.get("certificates", {})
    if not (found or certificates):
        return None
    runtime = found["runtime"] if found else next(iter(certificates))
    limits = {"drop_points": DROP_POINTS, "agreement": AGREEMENT, "agreement_confident": AGREEMENT_CONFIDENT}
    return {"found": found, "runtime": runtime, "promised": certificates.get(runtime), "limits": limits}


def _stress_results(evaluation: Evaluation, name: str) -> dict[str, Any] | None:
    """Read a JSON file of `carray stress`, if it is of the same bundle and images."""
    uri = join(evaluation.out, name)
    about = read_json(uri) if exists(uri) else {}
    same = ("bundle_id", "manifest_fingerprint", "split")
    return about if all(about.get(key) == evaluation.metrics[key] for key in same) else None


def _robustness(evaluation: Evaluation) -> dict[str, Any] | None:
    about = _stress_results(evaluation, ROBUSTNESS_JSON)
    if about is None:
        return None
    columns = ROBUSTNESS_SCHEMA.names
    uri = join(evaluation.out, "robustness.parquet")
    table = read_table(uri, kind="evaluation robustness", required=columns, columns=columns).to_pylist()
    plain, *rows = [row | {"words": row["corruption"].replace("_", " ")} for row in table]
    corrupted = [row for row in rows if row["corruption"] != REENCODED]
    return {
        "plain": plain,
        "rows": rows,
        "worst": max(corrupted, key=lambda row: row["drop_points"]),
        "costly": sum(row["drop_low_points"] > 0 for row in corrupted),
        "corrupted": len(corrupted),
        "control": next(row for row in rows if row["corruption"] == REENCODED),
        "svg": _robustness_svg(plain, rows),
        "about": about,
    }


def _robustness_svg(plain: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw top-1 with its interval for each corruption and severity; a line and a band show the plain images' top-1."""
    tips = {
        f"{y}": f"{row['words']}, {row['severity']}: {row['top1']:.1%} "
        f"({row['top1_low']:.1%} to {row['top1_high']:.1%}), {row['drop_points']:.1f} points lost"
        for y, row in enumerate(rows)
    }
    title, height = "Top-1 of corrupted pictures", 0.8 + 0.235 * len(rows)
    description = "Each dot is a corruption at one severity, its bar a 95 % interval; the line is of plain pictures."
    with chart(title, description, tips, height=height) as (axes, svg):
        axes.axvspan(plain["top1_low"], plain["top1_high"], color=_GRID, linewidth=0, zorder=0)
        axes.axvline(plain["top1"], color=_SOFT, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1)
        names = [f"{row['words']}, {row['severity']}" for row in rows]
        points = [(row["top1"], row["top1_low"], row["top1_high"]) for row in rows]
        interval_rows(axes, names, points, [_SOFT if row["corruption"] == REENCODED else _FIRST for row in rows])
        for y in range(1, len(rows)):
            if rows[y - 1]["corruption"] != rows[y]["corruption"]:
                axes.axhline(y - 0.5, color=_GRID, linewidth=0.8, zorder=0)
        axes.set_xlim(0, 1)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("top-1; the dashed line is that of plain pictures")
    return svg()


def _outside(evaluation: Evaluation) -> dict[str, Any] | None:
    about = _stress_results(evaluation, OUTSIDE_JSON)
    if about is None:
        return None
    rows = [{"kind": kind, **found} for kind, found in about["kinds"].items()]
    return {
        "rows": rows,
        "weakest": min((row for row in rows if row["auroc"] is not None), key=lambda row: row["auroc"]),
        "unreadable": about["inside_unreadable"] + sum(row["images"] - row["scored"] for row in rows),
        "about": about,
    }


def _classes(evaluation: Evaluation) -> dict[str, Any]:
    classes, pairs = evaluation.table("per_class"), evaluation.table("confused_pairs")
    most = pairs.drop_duplicates("truth").set_index("truth")[["label", "images"]].to_dict("index")
    # Worst first; classes without images last.
    rows = records(classes.sort_values(["recall", "f1", "label"], na_position="last"))
    return {"rows": [row | {"most": most.get(row["label"])} for row in rows]}


def _matrix(evaluation: Evaluation) -> dict[str, Any]:
    classes = evaluation.classes
    by_make = None not in {parse_vehicle(name).make for name in classes}
    svg = confusion_svg(evaluation.counts_KK, classes, title="Confusion matrix")
    return {"svg": svg, "classes": len(classes), "by_make": by_make}


def _unreadable(evaluation: Evaluation) -> dict[str, Any] | None:
    if not evaluation.metrics["unreadable"]:
        return None
    predictions = evaluation.table("predictions")
    rows = predictions[predictions["status"] != "ok"]
    return {"rows": rows.head(_MOST_UNREADABLE).to_dict("records"), "count": len(rows)}


SECTIONS: Mapping[str, tuple[str, Callable[[Evaluation], dict[str, Any] | None]]] = {
    "levels": ("Accuracy by level", _levels),
    "kinds": ("Kinds of mistakes", _kinds),
    "pairs": ("Confused pairs", _pairs),
    "scores": ("Calibration of scores", _scores),
    "coverage": ("Accepted labels", _coverage),
    "certificate": ("Faster runtimes", _certificate),
    "robustness": ("Corrupted pictures", _robustness),
    "outside": ("Images from outside", _outside),
    "classes": ("Results by class", _classes),
    "matrix": ("Confusion matrix", _matrix),
    "unreadable": ("Not readable", _unreadable),
}
"""Title and context of each section, in the page's order: ID.html.j2 knows the context as `own`."""

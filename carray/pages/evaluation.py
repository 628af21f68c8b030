"""Writes an evaluation's page OUT/report.html and its confusion matrix OUT/confusion.png.

The page is made of SECTIONS, each a template in templates/evaluation/ and a function that gives its context, or None if
there is nothing to show, such as before `carray stress`. Takes 2 s for 196 classes and 8,000 images, most of it to
import matplotlib.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.certificates import AGREEMENT, AGREEMENT_CONFIDENT, DROP_POINTS
from carray.core.store.files import exists, join, read_json, write_bytes
from carray.core.tables import read_table
from carray.evaluation.corruptions import NONE, REENCODED, ROBUSTNESS_SCHEMA
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
from carray.pages.charts import PAGE_COLOURS, chart, percent_axis, whole_numbers
from carray.pages.confusion import confusion_png, confusion_svg
from carray.pages.templates import render_page

__all__ = ["SECTIONS", "Evaluation", "Section", "write_page"]

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
        """Read one of the folder's tables.

        Raises:
            StorageError: it does not exist or cannot be read.
            SchemaError: it is not a table of an evaluation.
        """
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


@dataclass(frozen=True)
class Section:
    """A part of the page: `context` gives what templates/evaluation/ID.html.j2 knows as `own`."""

    id: str
    title: str
    context: Callable[[Evaluation], dict[str, Any] | None]


def write_page(out: str, metrics: Mapping[str, Any]) -> str:
    """Write OUT/report.html and OUT/confusion.png from the tables in `out`, and return the page's URI.

    Raises:
        StorageError: a table cannot be read, or the page cannot be written.
        SchemaError: a table is not a table of an evaluation.
    """
    evaluation, sections = Evaluation(out, metrics), []
    for section in SECTIONS:
        context = section.context(evaluation)
        if context is not None:
            sections.append({"id": section.id, "title": section.title, "own": context})
    write_bytes(join(out, CONFUSION_PNG), confusion_png(evaluation.counts_KK, evaluation.classes))
    uri = join(out, REPORT_HTML)
    write_bytes(uri, render_page("evaluation.html.j2", {"metrics": metrics, "sections": sections}).encode())
    return uri


def _levels(evaluation: Evaluation) -> dict[str, Any]:
    rows = [{"name": _LEVELS[level], **found} for level, found in evaluation.metrics["levels"].items()]
    return {"rows": rows, "svg": _levels_svg([row for row in rows if row["images"]])}


def _levels_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw each level's accuracy as a point with its interval, the first on top."""
    height = 0.95 + 0.36 * len(rows)
    with chart("Accuracy by level", "Points are measured, lines their 95 % intervals.", height=height) as (axes, svg):
        heights = np.arange(len(rows))[::-1]
        for y, row in zip(heights, rows, strict=True):
            axes.plot([row["low"], row["high"]], [y, y], color=_FIRST, linewidth=2.2, solid_capstyle="round")
            axes.plot(row["accuracy"], y, "o", color=_FIRST, markersize=7)
            point, offset = (row["accuracy"], y), {"xytext": (0, 7), "textcoords": "offset points"}
            axes.annotate(f"{row['accuracy']:.1%}", point, ha="center", **offset)
        axes.set_yticks(heights, [row["name"] for row in rows])
        percent_axis(axes.xaxis)
        low = min(row["low"] for row in rows)
        axes.set(xlim=(max(0, low - 0.04), 1.005), ylim=(-0.5, len(rows) - 0.35), xlabel="right")
        axes.grid(visible=False, axis="y")
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
    names, images = ([row[name] for row in reversed(rows)] for name in ("name", "images"))
    height = 0.95 + 0.34 * len(rows)
    with chart("Kinds of mistakes", "Bars are counts of images.", height=height) as (axes, svg):
        bars = axes.barh(names, images, color=_SECOND, height=0.62)
        axes.bar_label(bars, [f"{count:,}" for count in images], padding=3, color=_INK)
        axes.set_xlim(0, max(1, *images) * 1.12)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("images")
        whole_numbers(axes.xaxis)
    return svg()


def _pairs(evaluation: Evaluation) -> dict[str, Any]:
    pairs, examples = evaluation.table("confused_pairs"), evaluation.table("examples")
    pictured = []
    for (truth, label), own in examples.groupby(["truth", "label"], sort=False):
        pair = pairs[(pairs["truth"] == truth) & (pairs["label"] == label)].iloc[0].to_dict()
        pictured.append({**pair, "examples": [_example(row) for row in own.to_dict("records")]})
    return {
        "pictured": pictured,
        "rows": pairs.head(_MOST_PAIRS).to_dict("records"),
        "count": len(pairs),
        "mistakes": int(pairs["images"].sum()),
    }


def _example(row: Mapping[Any, Any]) -> dict[str, Any]:
    jpeg = row["jpeg"]
    return {
        "name": str(row["uri"]).rstrip("/").rsplit("/", 1)[-1],
        "score": row["score"],
        "reason": row["reason"],
        "source": f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" if jpeg else "",
        "width": int(row["width"]) if jpeg else 0,
        "height": int(row["height"]) if jpeg else 0,
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
    metrics = evaluation.metrics
    found, certificates = metrics.get("certificate"), metrics.get("certificates", {})
    if not (found or certificates):
        return None
    runtime = found["runtime"] if found else next(iter(certificates))
    promised = certificates.get(runtime)
    return {
        "found": found,
        "runtime": runtime,
        "promised": promised,
        "measured": promised and promised["top1"] is not None,
        "same_images": bool(promised and promised["split"] == metrics["split"] and metrics.get("own_manifest")),
        "limits": {"drop_points": DROP_POINTS, "agreement": AGREEMENT, "agreement_confident": AGREEMENT_CONFIDENT},
    }


def _measured(evaluation: Evaluation, context: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the context of what `carray stress` measured, if it was on the same bundle and images."""
    found = context(evaluation.out)
    same = ("bundle_id", "manifest_fingerprint", "split")
    return found if found and all(found["about"][name] == evaluation.metrics[name] for name in same) else None


def _robustness(out: str) -> dict[str, Any] | None:
    if not exists(join(out, ROBUSTNESS_JSON)):
        return None
    columns = ROBUSTNESS_SCHEMA.names
    uri = join(out, "robustness.parquet")
    table = read_table(uri, kind="evaluation robustness", required=columns, columns=columns).to_pylist()
    rows = [row | {"words": row["corruption"].replace("_", " ")} for row in table]
    corrupted = [row for row in rows if row["corruption"] not in (NONE, REENCODED)]
    return {
        "plain": rows[0],
        "rows": rows[1:],
        "worst": max(corrupted, key=lambda row: row["drop_points"]),
        "costly": sum(row["drop_low_points"] > 0 for row in corrupted),
        "corrupted": len(corrupted),
        "control": next(row for row in rows if row["corruption"] == REENCODED),
        "svg": _robustness_svg(rows[0], rows[1:]),
        "about": read_json(join(out, ROBUSTNESS_JSON)),
    }


def _robustness_svg(plain: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw top-1 with its interval for each corruption and severity; a line and a band show the plain images' top-1."""
    tips = {f"{y}": _robustness_tip(row) for y, row in enumerate(rows)}
    title, height = "Top-1 of corrupted pictures", 0.8 + 0.235 * len(rows)
    description = "Each dot is a corruption at one severity, its bar a 95 % interval; the line is of plain pictures."
    with chart(title, description, tips, height=height) as (axes, svg):
        axes.axvspan(plain["top1_low"], plain["top1_high"], color=_GRID, linewidth=0, zorder=0)
        axes.axvline(plain["top1"], color=_SOFT, linestyle=(0, (4, 2)), linewidth=1.2, zorder=1)
        for y, row in enumerate(rows):
            colour = _SOFT if row["corruption"] == REENCODED else _FIRST
            bar = {"color": colour, "linewidth": 1.6, "solid_capstyle": "butt", "zorder": 2}
            axes.plot([row["top1_low"], row["top1_high"]], [y, y], **bar)
            axes.plot(row["top1"], y, "o", color=colour, markersize=6, zorder=3, gid=f"tip-{y}")
            if y and rows[y - 1]["corruption"] != row["corruption"]:
                axes.axhline(y - 0.5, color=_GRID, linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(rows)), [f"{row['words']}, {row['severity']}" for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        percent_axis(axes.xaxis)
        axes.set_xlabel("top-1; the dashed line is that of plain pictures")
    return svg()


def _robustness_tip(row: Mapping[str, Any]) -> str:
    interval = f"{row['top1_low']:.1%} to {row['top1_high']:.1%}"
    return f"{row['words']}, {row['severity']}: {row['top1']:.1%} ({interval}), {row['drop_points']:.1f} points lost"


def _outside(out: str) -> dict[str, Any] | None:
    if not exists(join(out, OUTSIDE_JSON)):
        return None
    about = read_json(join(out, OUTSIDE_JSON))
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
    ordered = classes.sort_values(["recall", "f1", "label"], na_position="last")
    rows = [
        {str(name): None if value != value else value for name, value in row.items()} | {"most": most.get(row["label"])}
        for row in ordered.to_dict("records")
    ]
    return {"rows": rows, "untested": int((classes["support"] == 0).sum())}


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


SECTIONS = (
    Section("levels", "Accuracy by level", _levels),
    Section("kinds", "Kinds of mistakes", _kinds),
    Section("pairs", "What is taken for what", _pairs),
    Section("scores", "Whether scores are true", _scores),
    Section("coverage", "What can be accepted", _coverage),
    Section("certificate", "Faster runtimes", _certificate),
    Section("robustness", "Corrupted pictures", partial(_measured, context=_robustness)),
    Section("outside", "Images from outside", partial(_measured, context=_outside)),
    Section("classes", "Class by class", _classes),
    Section("matrix", "Confusion matrix", _matrix),
    Section("unreadable", "Not readable", _unreadable),
)
"""In the page's order."""

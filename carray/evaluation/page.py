"""Writes an evaluation as one page that opens from disk, with no network and nothing beside it.

From: an evaluation's tables and metrics. To: OUT/report.html.
Invariants: class names and uris are text, never markup; every picture has its figures in a table or a sentence, too; a
question that the evaluation cannot answer says so. The page is made of `SECTIONS`, each a template and a function that
gives what it shows; a section whose function gives None is left out, so one of a later measurement may stand here
before that is made, and `write_page` be called again after it.
Cost: 2 s for 196 classes and 8,000 images, most of it importing matplotlib.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from carray.bundle.certificates import AGREEMENT, AGREEMENT_CONFIDENT, DROP_POINTS
from carray.core.page import render_page
from carray.core.store.files import exists, join, read_json, write_bytes
from carray.core.tables import read_table
from carray.evaluation import figures
from carray.evaluation.corruptions import NONE, REENCODED, ROBUSTNESS_SCHEMA
from carray.evaluation.evaluation_folder import OUTSIDE_JSON, REPORT_HTML, ROBUSTNESS_JSON, TABLES, table_kind
from carray.evaluation.figures import confusion_svg
from carray.evaluation.metrics import confusion_counts
from carray.images.vehicles import parse_vehicle

__all__ = ["SECTIONS", "Evaluation", "Section", "outside_context", "robustness_context", "write_page"]

_MOST_PAIRS, _MOST_UNREADABLE = 100, 200
"""Rows shown; all of them stand in the tables."""
LEVEL_NAMES = {
    "make": "make",
    "make_model": "make and model",
    "body": "body",
    "year": "year",
    "exact": "exact class",
}
KIND_NAMES = {
    "make": "wrong make",
    "model": "right make, wrong model",
    "body": "right model, wrong body",
    "year": "right body, wrong year",
    "variant": "another variant",
    "unnamed": "no vehicle's name",
}


@dataclass(frozen=True)
class Evaluation:
    """Is what a section is made from."""

    out: str
    metrics: Mapping[str, Any]

    def table(self, name: str) -> pd.DataFrame:
        """Read one of the folder's tables.

        Raises:
            StorageError: it is not there.
        """
        place = join(self.out, f"{name}.parquet")
        return read_table(place, kind=table_kind(name), required=TABLES[name].names).to_pandas()


@dataclass(frozen=True)
class Section:
    """Is one part of the page: `own` is what its template knows as `own`, besides `metrics`."""

    id: str
    title: str
    template: str
    own: Callable[[Evaluation], dict[str, Any] | None]


def write_page(out: str, metrics: Mapping[str, Any]) -> str:
    """Write OUT/report.html from the tables that stand in `out`, and give its URI.

    Raises:
        StorageError: a table cannot be read, or the page not be written.
        SchemaError: a table is none of an evaluation.
    """
    evaluation = Evaluation(out, metrics)
    shown = []
    for section in SECTIONS:
        own = section.own(evaluation)
        if own is not None:
            shown.append({"id": section.id, "title": section.title, "template": section.template, "own": own})
    place = join(out, REPORT_HTML)
    write_bytes(place, render_page("evaluation/page.html.j2", {"metrics": metrics, "sections": shown}).encode())
    return place


def _levels(evaluation: Evaluation) -> dict[str, Any]:
    rows = [{"name": LEVEL_NAMES[level], **found} for level, found in evaluation.metrics["levels"].items()]
    told = [row for row in rows if row["images"]]
    return {"rows": rows, "svg": figures.intervals_svg(told, title="Accuracy by level", label="right")}


def _kinds(evaluation: Evaluation) -> dict[str, Any]:
    found = evaluation.metrics["confusion_kinds"]
    # Where no mistake is among names that tell nothing, that kind needs no line.
    kinds = [kind for kind, values in found.items() if kind != "unnamed" or values["images"]]
    rows = [{"name": KIND_NAMES[kind], **found[kind]} for kind in kinds]
    mistakes = sum(row["images"] for row in rows)
    # Where no class is a vehicle's name, there is one kind only, and nothing to draw.
    told = mistakes > found["unnamed"]["images"]
    svg = figures.bars_svg(
        [row["name"] for row in rows], [row["images"] for row in rows], title="Kinds of mistakes", label="images"
    )
    return {"rows": rows, "mistakes": mistakes, "svg": svg if told else ""}


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
    before, after = (bins[bins["stage"] == stage] for stage in ("before", "after"))
    return {
        "before": figures.reliability_svg(before, title="Scores before calibration", colour="second"),
        "after": figures.reliability_svg(after, title="Scores after calibration", colour="first"),
        "rows": [
            {"stage": stage, **row}
            for stage, own in (("before", before), ("after", after))
            for row in own[own["images"] > 0].to_dict("records")
        ],
    }


def _coverage(evaluation: Evaluation) -> dict[str, Any]:
    coverage, found = evaluation.table("coverage"), evaluation.metrics["acceptance"]
    svg = figures.coverage_svg(
        coverage,
        title="Accuracy of what is accepted",
        threshold=found["threshold"],
        target=found["target_precision"],
    )
    places = [int(np.searchsorted(coverage["coverage"], share)) for share in (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    chosen = dict.fromkeys(min(place, len(coverage) - 1) for place in places)
    return {"svg": svg, "rows": coverage.iloc[list(chosen)].to_dict("records"), "found": found}


def _certificate(evaluation: Evaluation) -> dict[str, Any] | None:
    """Set the certificate of a runtime beside what it loses on these images; None where there is neither."""
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
    classes = evaluation.table("per_class")["label"].tolist()
    counts_KK = _counts(evaluation.table("predictions"), classes)
    makes = {parse_vehicle(name).make for name in classes}
    svg = confusion_svg(counts_KK, classes, title="Confusion matrix")
    return {"svg": svg, "classes": len(classes), "by_make": None not in makes}


def _counts(predictions: pd.DataFrame, classes: list[str]) -> npt.NDArray[np.int64]:
    scored = predictions[predictions["status"] == "ok"]
    index = pd.Index(classes)
    truth_N, predicted_N = (index.get_indexer(pd.Index(scored[name])) for name in ("truth", "label"))
    return confusion_counts(truth_N, predicted_N, len(classes))


def _measured(evaluation: Evaluation, context: Callable[[str], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Give what `stress` left in the folder, if it is of the same bundle and images."""
    found = context(evaluation.out)
    same = ("bundle_id", "manifest_fingerprint", "split")
    return found if found and all(found["about"][name] == evaluation.metrics[name] for name in same) else None


def robustness_context(out: str) -> dict[str, Any] | None:
    """Read what sections/robustness.html.j2 shows from the folder of `stress`; None where it was not measured.

    Raises:
        SchemaError: the table is not what it should be.
        StorageError: it cannot be read.
    """
    if not exists(join(out, ROBUSTNESS_JSON)):
        return None
    columns = ROBUSTNESS_SCHEMA.names
    place = join(out, "robustness.parquet")
    table = read_table(place, kind="evaluation robustness", required=columns, columns=columns).to_pylist()
    rows = [row | {"words": row["corruption"].replace("_", " ")} for row in table]
    corrupted = [row for row in rows if row["corruption"] not in (NONE, REENCODED)]
    return {
        "plain": rows[0],
        "rows": rows[1:],
        "worst": max(corrupted, key=lambda row: row["drop_points"]),
        "costly": sum(row["drop_low_points"] > 0 for row in corrupted),
        "corrupted": len(corrupted),
        "control": next(row for row in rows if row["corruption"] == REENCODED),
        "svg": figures.robustness_svg(rows, title="Top-1 of corrupted pictures"),
        "about": read_json(join(out, ROBUSTNESS_JSON)),
    }


def outside_context(out: str) -> dict[str, Any] | None:
    """Read what sections/outside.html.j2 shows from the folder of `stress`; None where it was not measured.

    Raises:
        StorageError: it cannot be read.
    """
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


def _unreadable(evaluation: Evaluation) -> dict[str, Any] | None:
    if not evaluation.metrics["unreadable"]:
        return None
    predictions = evaluation.table("predictions")
    rows = predictions[predictions["status"] != "ok"]
    return {"rows": rows.head(_MOST_UNREADABLE).to_dict("records"), "count": len(rows)}


SECTIONS = (
    Section("levels", "Accuracy by level", "evaluation/sections/levels.html.j2", _levels),
    Section("kinds", "Kinds of mistakes", "evaluation/sections/kinds.html.j2", _kinds),
    Section("pairs", "What is taken for what", "evaluation/sections/pairs.html.j2", _pairs),
    Section("scores", "Whether scores are true", "evaluation/sections/scores.html.j2", _scores),
    Section("coverage", "What can be accepted", "evaluation/sections/coverage.html.j2", _coverage),
    Section("certificate", "Faster runtimes", "evaluation/sections/certificate.html.j2", _certificate),
    Section(
        "robustness",
        "Corrupted pictures",
        "evaluation/sections/robustness.html.j2",
        partial(_measured, context=robustness_context),
    ),
    Section(
        "outside",
        "Images from outside",
        "evaluation/sections/outside.html.j2",
        partial(_measured, context=outside_context),
    ),
    Section("classes", "Class by class", "evaluation/sections/classes.html.j2", _classes),
    Section("matrix", "Confusion matrix", "evaluation/sections/matrix.html.j2", _matrix),
    Section("unreadable", "Not readable", "evaluation/sections/unreadable.html.j2", _unreadable),
)
"""In the page's order."""

"""Evaluates a bundle on one split of a manifest, by the same code as classification.

The results are a folder (evaluation.evaluation_folder), local or S3. An unreadable image is a row with its reason and
is counted in `unreadable`, but in no other figure. metrics.json is written last, so unfinished results are redone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.bundle.bundle_folder import INT8_MODEL, BundleInfo
from carray.bundle.scorer import Scorer
from carray.bundle.threshold import top_scores
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import BundleError
from carray.core.progress import say
from carray.core.store.files import absolute, delete, join, write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation import metrics as measure
from carray.evaluation.evaluation_folder import METRICS_JSON, TABLES, VERSION, read_finished, table_kind
from carray.evaluation.score import ScoredSplit, score_split
from carray.images.pictures import picture_settings, small_jpeg
from carray.images.read import read_all
from carray.manifest.manifest_file import read_manifest, read_row, row_box

__all__ = ["WritePage", "evaluate", "summary_text", "take_examples", "write_evaluation"]

WritePage = Callable[[str, Mapping[str, Any]], object]
"""Writes the page of an evaluation from its folder and metrics."""

PAIRS, IMAGES_A_PAIR = 12, 3
LONG_SIDE, SHORT_SIDE_LEAST, QUALITY = 240, 24, 78
"""Sides of example pictures, in pixels; all of them together are about half a megabyte."""

_VERDICTS = {
    "kept": "kept",
    "within chance": "missed by no more than chance explains",
    "broken": "broken on these images; --runtime fp32 does without",
}


def evaluate(
    bundle: str,
    manifest: str,
    *,
    split: str = "test",
    out: str,
    runtime: str = "fp32",
    write_page: WritePage | None = None,
) -> dict[str, Any]:
    """Score one split with a bundle, write tables and metrics into `out`, and return the metrics.

    `write_page`, such as pages.evaluation.write_page, is called before the metrics are written. A finished evaluation
    in `out` is read instead of repeated.

    Raises:
        BundleError: the bundle is unfinished, damaged, or computes other logits on this machine.
        SchemaError: the split is empty, or holds labels that the bundle does not know.
        SettingsError: the bundle lacks that runtime, or `out` holds another evaluation.
        BudgetError: no image of the split can be read, so there is nothing to measure.
    """
    out, table, scorer = absolute(out), read_manifest(manifest), Scorer(bundle, runtime=runtime)
    info, marker = scorer.info, join(out, METRICS_JSON)
    origin = {
        "version": VERSION,
        "bundle_id": info.bundle_id,
        "accept_threshold": info.accept_threshold,
        "manifest_fingerprint": table.fingerprint,
        "split": split,
        "runtime": scorer.runtime,
    }
    if (finished := read_finished(marker, origin, what="evaluation")) is not None:
        if finished.get("certificates", {}) == _certificates(info):
            say(f"{out} holds this evaluation already; delete its {METRICS_JSON} to measure again.")
            return finished
        say(f"{out} holds this evaluation with other certificates of the bundle's runtimes; it is measured again.")
        delete(marker)
    seen_N = mask_trained_on(scorer.uri, info, table, table.of_split(split))
    trained_on = 0 if seen_N is None else int(seen_N.sum())
    own_manifest = info.search.get("manifest_fingerprint") == table.fingerprint
    origin |= {
        "bundle": scorer.uri,
        "manifest": table.uri,
        # Trial, epoch and temperature were chosen on val. Null also if it is not known how the images were used.
        "seen_before": "training" if trained_on else "selection" if own_manifest and split == "val" else None,
        "images_trained_on": trained_on,
    }
    scored = score_split(table, split, scorer, other=_other_runtime(scorer))
    return write_evaluation(out, origin, info, scored, write_page=write_page)


def _certificates(info: BundleInfo) -> dict[str, Any]:
    return {name: found.model_dump(mode="json") for name, found in info.certificates.items()}


def _other_runtime(scorer: Scorer) -> Scorer | None:
    """Open the runtime to compare with: fp32, or for fp32 the bundle's int8, if any."""
    if scorer.runtime == "fp32" and INT8_MODEL not in scorer.info.files:
        return None
    name = "int8" if scorer.runtime == "fp32" else "fp32"
    try:
        return Scorer(scorer.uri, runtime=name)
    except BundleError as err:
        say(f"warning: {name} is not compared with {scorer.runtime} ({err})")
        return None


def write_evaluation(
    out: str, origin: dict[str, Any], info: BundleInfo, scored: ScoredSplit, *, write_page: WritePage | None = None
) -> dict[str, Any]:
    """Write the tables and metrics of a scored split into `out`, and return the metrics, which include `origin`."""
    truth_N, predicted_N, right_N, classes = scored.truth_N, scored.predicted_N, scored.right_N, info.classes
    counts_KK = measure.confusion_counts(truth_N, predicted_N, len(classes))
    pairs = measure.confused_pairs(counts_KK, classes)
    scores = {
        "before": top_scores(scored.logits_NK, temperature=1.0),
        "after": top_scores(scored.logits_NK, temperature=info.temperature),
    }
    bins = [measure.reliability(score_N, right_N).assign(stage=stage) for stage, score_N in scores.items()]
    tables: dict[str, pd.DataFrame] = {
        "per_class": measure.class_table(counts_KK, classes),
        "confused_pairs": pairs,
        "levels": measure.accuracy_by_level(truth_N, predicted_N, classes),
        "confusion_kinds": measure.confusion_kinds(truth_N, predicted_N, classes),
        "calibration": pd.concat(bins, ignore_index=True),
        "coverage": measure.coverage_table(scores["after"], right_N),
    }
    written = {name: pa.Table.from_pandas(rows, TABLES[name], preserve_index=False) for name, rows in tables.items()}
    for name, records in (("predictions", scored.predictions), ("examples", take_examples(scored, pairs, info))):
        written[name] = table_from_rows(records, TABLES[name])
    for name, table in written.items():
        write_table(table, join(out, f"{name}.parquet"), kind=table_kind(name), version=VERSION, provenance=origin)
    metrics = _metrics(origin, info, scored, scores)
    for name, key in (("levels", "level"), ("confusion_kinds", "kind")):
        metrics[name] = {row.pop(key): row for row in written[name].to_pylist()}
    if write_page is not None:
        write_page(out, metrics)
    write_json(join(out, METRICS_JSON), metrics)
    return metrics


def take_examples(scored: ScoredSplit, pairs: pd.DataFrame, info: BundleInfo) -> list[dict[str, Any]]:
    """Make up to three small pictures for each of the first 12 pairs, the most confident mistakes first.

    Returns:
        Rows of truth, label, uri, score, jpeg, width, height and reason, in the order of the pairs.
    """
    by_pair: dict[tuple[str, str], list[int]] = {pair: [] for pair in zip(pairs["truth"], pairs["label"], strict=True)}
    for index, row in enumerate(scored.predictions):
        if row["status"] == "ok" and row["label"] != row["truth"]:
            by_pair.setdefault((row["truth"], row["label"]), []).append(index)
    chosen = [
        index
        for indices in list(by_pair.values())[:PAIRS]
        for index in sorted(indices, key=lambda index: -scored.predictions[index]["score"])[:IMAGES_A_PAIR]
    ]
    rows = [scored.rows[index] for index in chosen]
    pictures = read_all(rows, partial(_picture, boxes=info.uses_boxes), what="reading examples")
    names = ("uri", "truth", "label", "score")
    return [
        {name: scored.predictions[index][name] for name in names} | picture
        for index, picture in zip(chosen, pictures, strict=True)
    ]


def _picture(row: Mapping[Any, Any], *, boxes: bool) -> dict[str, Any]:
    """Return jpeg, width and height of a small picture, or the reason why there is none."""
    read = read_row(row, picture_settings(LONG_SIDE), crop_boxes=boxes)
    if read.pixels_HWC is None:
        return {"reason": read.error}
    box = row_box(row) if boxes else None
    jpeg, width, height = small_jpeg(read, quality=QUALITY, box=box, shortest=SHORT_SIDE_LEAST, enlarge=True)
    return {"jpeg": jpeg, "width": width, "height": height}


def _metrics(
    origin: Mapping[str, Any], info: BundleInfo, scored: ScoredSplit, scores: Mapping[str, measure.Doubles]
) -> dict[str, Any]:
    codes = Counter(row["error_code"] for row in scored.predictions if row["status"] != "ok")
    before_N, score_N, right_N = scores["before"], scores["after"], scored.right_N
    # Sorted, so that the resamples do not depend on the order of rows.
    order = np.lexsort((before_N, right_N, score_N))
    before_N, score_N, right_N = before_N[order], score_N[order], right_N[order]
    aurc_low, aurc_high = measure.bootstrap_interval(measure.area_under_risk, score_N, right_N, highest=1.0)
    certificate = None
    if scored.other_NK is not None:
        is_fp32 = origin["runtime"] == "fp32"
        pair = (scored.logits_NK, scored.other_NK) if is_fp32 else (scored.other_NK, scored.logits_NK)
        certificate = measure.check_certificate(info, "int8" if is_fp32 else origin["runtime"], *pair, scored.truth_N)
    return {
        **origin,
        "images": len(scored.predictions),
        "scored": len(scored.truth_N),
        "classes": len(info.classes),
        "classes_with_images": len(np.unique(scored.truth_N)),
        "unreadable": codes.total(),
        "unreadable_codes": dict(codes.most_common()),
        **measure.headline(scored.logits_NK, scored.truth_N, temperature=info.temperature),
        "temperature": info.temperature,
        "ece": measure.calibration_error(score_N, right_N),
        "ece_before": measure.calibration_error(before_N, right_N),
        "ece_by_chance": measure.chance_error(score_N),
        "aurc": measure.area_under_risk(score_N, right_N),
        "aurc_low": aurc_low,
        "aurc_high": aurc_high,
        "acceptance": measure.check_acceptance(info, score_N, right_N),
        "certificates": _certificates(info),
        "certificate": certificate,
        "own_manifest": info.search.get("manifest_fingerprint") == origin["manifest_fingerprint"],
    }


def summary_text(metrics: Mapping[str, Any]) -> str:
    """Format the metrics for a terminal."""
    what = f"images of split {metrics['split']}, bundle {metrics['bundle_id']}, runtime {metrics['runtime']}"
    lines = [f"{metrics['scored']:,} {what}"]
    for name, title in (("top1", "top-1"), ("top5", "top-5")):
        low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
        lines.append(f"  {title:<10} {metrics[name]:.1%}  (95 % interval {low:.1%} to {high:.1%})")
    for level, title in (("make", "make"), ("make_model", "with model")):
        found = metrics["levels"][level]
        if found["images"]:
            some = f"  (of the {found['images']:,} whose class tells it)" if found["images"] < metrics["scored"] else ""
            lines.append(f"  {title:<10} {found['accuracy']:.1%}{some}")
    lines += [f"  {'macro F1':<10} {metrics['macro_f1']:.3f}", f"  {'loss':<10} {metrics['loss']:.3f} nats"]
    lines.append(f"  {'ECE':<10} {metrics['ece']:.1%}  (before calibration {metrics['ece_before']:.1%})")
    lines.append(f"  {'accepted':<10} {_acceptance_text(metrics['acceptance'])}")
    if found := metrics.get("certificate"):
        lines.append(f"  {found['runtime']:<10} {_certificate_text(found)}")
    if metrics["unreadable"]:
        kinds = ", ".join(f"{count} {code}" for code, count in metrics["unreadable_codes"].items())
        lines.append(f"  {metrics['unreadable']:,} images could not be read ({kinds}); they are in no figure above")
    return "\n".join(lines)


def _acceptance_text(found: Mapping[str, Any]) -> str:
    if found["threshold"] is None:
        return f"none: {found['reason']}"
    if not found["accepted"]:
        return f"none: no score reaches {found['threshold']:.3f}"
    return (
        f"{found['coverage']:.1%} with scores from {found['threshold']:.3f} up, of which {found['precision']:.1%} are "
        f"right  (95 % interval {found['precision_low']:.1%} to {found['precision_high']:.1%})"
    )


def _certificate_text(found: Mapping[str, Any]) -> str:
    promised = found["promised"]
    said = (
        f"its certificate says {promised['agreement']:.1%} and {promised['drop_points']:.1f}"
        if promised and promised["agreement"] is not None
        else "it has no certificate"
    )
    return (
        f"the label of fp32 for {found['agreement']:.1%}, top-1 {found['drop_points']:.1f} points below it  ({said}"
        f"{f': {text}' if (text := _VERDICTS.get(found['verdict'])) else ''})"
    )

"""Evaluates a bundle on one split of a manifest, by the same code as classification.

The results are a folder (evaluation.evaluation_folder), local or S3. An unreadable image is a row with its reason and
is counted in `unreadable`, but in no other figure. metrics.json is written last, so unfinished results are redone.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.bundle.bundle_folder import INT8_MODEL, BundleInfo
from carray.bundle.scorer import Scorer
from carray.bundle.threshold import top_scores
from carray.core.errors import BundleError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, delete, exists, join, read_json, write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation import metrics as measure
from carray.evaluation.evaluation_folder import METRICS_JSON, TABLES, VERSION, table_kind
from carray.evaluation.score import ScoredSplit, score_split, seen_before
from carray.images.pixels import Box, PixelSettings
from carray.manifest.manifest_file import read_manifest, read_row, row_box

__all__ = ["WritePage", "evaluate", "summary_text", "take_examples", "write_evaluation"]

WritePage = Callable[[str, Mapping[str, Any]], object]
"""Writes the page of an evaluation from its folder and metrics."""

PAIRS, IMAGES_A_PAIR = 12, 3
LONG_SIDE, SHORT_SIDE_LEAST = 240, 24
"""Sides of example pictures, in pixels; all of them together are about half a megabyte."""
QUALITY = 78


def take_examples(scored: ScoredSplit, pairs: pd.DataFrame, info: BundleInfo) -> list[dict[str, Any]]:
    """Make up to three small pictures for each of the first 12 pairs, the most confident mistakes first.

    Returns:
        Rows of truth, label, uri, score, jpeg, width, height and reason, in the order of the pairs.
    """
    mistaken = pd.DataFrame(
        [
            (index, row["truth"], row["label"], row["score"])
            for index, row in enumerate(scored.predictions)
            if row["status"] == "ok" and row["label"] != row["truth"]
        ],
        columns=["index", "truth", "label", "score"],
    ).sort_values(["score", "index"], ascending=[False, True])
    chosen = [
        int(index)
        for pair in pairs.head(PAIRS).to_dict("records")
        for index in mistaken.loc[
            (mistaken["truth"] == pair["truth"]) & (mistaken["label"] == pair["label"]), "index"
        ].head(IMAGES_A_PAIR)
    ]
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        pictures = list(pool.map(lambda index: _picture(scored.rows[index], boxes=info.uses_boxes), chosen))
    names = ("uri", "truth", "label", "score")
    return [
        {name: scored.predictions[index][name] for name in names} | picture
        for index, picture in zip(chosen, pictures, strict=True)
    ]


def _picture(row: Mapping[Any, Any], *, boxes: bool) -> dict[str, Any]:
    """Return jpeg, width and height of a small picture, or the reason why there is none."""
    from PIL import Image

    # Decoded to a square and stretched back: this handles boxes, EXIF and every format.
    settings = PixelSettings(decode_size=LONG_SIDE, input_size=LONG_SIDE, aspect="squash")
    read = read_row(row, settings, crop_boxes=boxes)
    if read.pixels_HWC is None or read.width is None or read.height is None:
        return {"reason": read.error}
    width, height = _size(read.width, read.height, row_box(row) if boxes else None)
    buffer = io.BytesIO()
    Image.fromarray(read.pixels_HWC).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=QUALITY, optimize=True
    )
    return {"jpeg": buffer.getvalue(), "width": width, "height": height}


def _size(width: int, height: int, box: Box | None) -> tuple[int, int]:
    """Compute the picture's sides, the longer one LONG_SIDE, from those of the image or of its box."""
    if box is not None:
        width, height = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
    scale = LONG_SIDE / max(width, height)
    return max(SHORT_SIDE_LEAST, round(width * scale)), max(SHORT_SIDE_LEAST, round(height * scale))


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
        StorageError: storage refused to read the manifest or to write the results.
    """
    out, table = absolute(out), read_manifest(manifest)
    scorer = Scorer(bundle, runtime=runtime)
    identity = {
        "version": VERSION,
        "bundle_id": scorer.info.bundle_id,
        "accept_threshold": scorer.info.accept_threshold,
        "manifest_fingerprint": table.fingerprint,
        "split": split,
        "runtime": scorer.runtime,
    }
    if (finished := _finished(out, identity, scorer.info)) is not None:
        return finished
    seen, trained_on = seen_before(scorer, table, split)
    scored = score_split(table, split, scorer, other=_other_runtime(scorer))
    origin = identity | {
        "bundle": scorer.uri,
        "manifest": table.uri,
        "seen_before": seen,
        "images_trained_on": trained_on,
    }
    return write_evaluation(out, origin, scorer.info, scored, write_page=write_page)


def _other_runtime(scorer: Scorer) -> Scorer | None:
    """Open the runtime to compare with: fp32, or for fp32 the bundle's int8, if any."""
    has_int8 = INT8_MODEL in scorer.info.files
    name = "fp32" if scorer.runtime != "fp32" else "int8" if has_int8 else None
    try:
        return None if name is None else Scorer(scorer.uri, runtime=name)
    except BundleError as err:
        say(f"warning: {name} is not compared with {scorer.runtime} ({err})")
        return None


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


def _finished(out: str, identity: Mapping[str, Any], info: BundleInfo) -> dict[str, Any] | None:
    if not exists(join(out, METRICS_JSON)):
        return None
    found: dict[str, Any] = read_json(join(out, METRICS_JSON))
    if any(found.get(name) != value for name, value in identity.items()):
        seen = ", ".join(f"{name} {found.get(name)}" for name in identity)
        raise SettingsError(f"{out} holds another evaluation ({seen}); choose another folder with --out.")
    if found.get("certificates", {}) != _certificates(info):
        say(f"{out} holds this evaluation with other certificates of the bundle's runtimes; it is measured again.")
        delete(join(out, METRICS_JSON))
        return None
    say(f"{out} holds this evaluation already; delete its {METRICS_JSON} to measure again.")
    return found


def _certificates(info: BundleInfo) -> dict[str, Any]:
    return {name: found.model_dump(mode="json") for name, found in info.certificates.items()}


def write_evaluation(
    out: str, origin: dict[str, Any], info: BundleInfo, scored: ScoredSplit, *, write_page: WritePage | None = None
) -> dict[str, Any]:
    """Write the tables and metrics of a scored split into `out`, and return the metrics, which include `origin`.

    Raises:
        StorageError: storage refused to write.
    """
    predicted_N = scored.logits_NK.argmax(axis=1)
    counts_KK = measure.confusion_counts(scored.truth_N, predicted_N, len(info.classes))
    pairs = measure.confused_pairs(counts_KK, info.classes)
    tables: dict[str, Any] = {
        "predictions": scored.predictions,
        "per_class": measure.class_table(scored.truth_N, predicted_N, info.classes),
        "confused_pairs": pairs,
        "examples": take_examples(scored, pairs, info),
        "levels": measure.accuracy_by_level(scored.truth_N, predicted_N, info.classes),
        "confusion_kinds": measure.confusion_kinds(scored.truth_N, predicted_N, info.classes),
        **_score_tables(scored, info),
    }
    for name, rows in tables.items():
        table = _table(rows, TABLES[name])
        write_table(table, join(out, f"{name}.parquet"), kind=table_kind(name), version=VERSION, provenance=origin)
    metrics = _metrics(origin, info, scored, tables)
    if write_page is not None:
        write_page(out, metrics)
    write_json(join(out, METRICS_JSON), metrics)
    return metrics


def _score_tables(scored: ScoredSplit, info: BundleInfo) -> dict[str, pd.DataFrame]:
    right_N = scored.logits_NK.argmax(axis=1) == scored.truth_N
    stages = {"before": 1.0, "after": info.temperature}
    bins = [
        measure.reliability(top_scores(scored.logits_NK, temperature=temperature), right_N).assign(stage=stage)
        for stage, temperature in stages.items()
    ]
    after_N = top_scores(scored.logits_NK, temperature=info.temperature)
    return {
        "calibration": pd.concat(bins, ignore_index=True),
        "coverage": measure.coverage_table(after_N, right_N),
    }


def _metrics(
    origin: dict[str, Any], info: BundleInfo, scored: ScoredSplit, tables: Mapping[str, Any]
) -> dict[str, Any]:
    codes = Counter(row["error_code"] for row in scored.predictions if row["status"] != "ok")
    right_N = scored.logits_NK.argmax(axis=1) == scored.truth_N
    before_N = top_scores(scored.logits_NK, temperature=1.0)
    score_N = top_scores(scored.logits_NK, temperature=info.temperature)
    # Sorted, so that the resamples do not depend on the order of rows.
    order = np.lexsort((before_N, right_N, score_N))
    before_N, score_N, right_N = before_N[order], score_N[order], right_N[order]
    aurc_low, aurc_high = measure.bootstrap_interval(measure.area_under_risk, score_N, right_N, highest=1.0)
    found = {
        **origin,
        "images": len(scored.predictions),
        "scored": len(scored.truth_N),
        "classes": len(info.classes),
        "classes_with_images": len(np.unique(scored.truth_N)),
        "unreadable": codes.total(),
        "unreadable_codes": dict(codes.most_common()),
        **measure.headline(scored.logits_NK, scored.truth_N, temperature=info.temperature),
        "levels": {row.pop("level"): row for row in _plain(tables["levels"])},
        "confusion_kinds": {row.pop("kind"): row for row in _plain(tables["confusion_kinds"])},
        "temperature": info.temperature,
        "ece": measure.calibration_error(score_N, right_N),
        "ece_before": measure.calibration_error(before_N, right_N),
        "ece_by_chance": measure.chance_error(score_N),
        "aurc": measure.area_under_risk(score_N, right_N),
        "aurc_low": aurc_low,
        "aurc_high": aurc_high,
        "acceptance": measure.check_acceptance(info, score_N, right_N),
        "certificates": _certificates(info),
        "certificate": _check_certificate(origin["runtime"], info, scored),
        "own_manifest": info.search.get("manifest_fingerprint") == origin["manifest_fingerprint"],
    }
    return found


def _check_certificate(runtime: str, info: BundleInfo, scored: ScoredSplit) -> dict[str, Any] | None:
    """Compare the faster of two runtimes with fp32; None if only one scored the split."""
    if scored.other_NK is None:
        return None
    if runtime == "fp32":
        return measure.check_certificate(info, "int8", scored.logits_NK, scored.other_NK, scored.truth_N)
    return measure.check_certificate(info, runtime, scored.other_NK, scored.logits_NK, scored.truth_N)


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Convert a table's rows for JSON: missing values are null."""
    records = table.astype(object).to_dict("records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in records]


def _table(rows: pd.DataFrame | Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    if isinstance(rows, pd.DataFrame):
        return pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
    return table_from_rows(rows, schema)

"""Evaluates a bundle on one split of a manifest, through the very path that classification takes.

From: a bundle and a manifest. To: a folder (evaluation.format), local or S3.
Invariants: an image that cannot be read is a row with its reason, is counted in `unreadable`, and is in no figure;
metrics.json is written last, so a folder that was left half-written is measured again.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from carray.bundle.acceptance import top_scores
from carray.bundle.format import BundleInfo
from carray.bundle.predict import Scorer
from carray.core.errors import DecodeError, FetchError, SettingsError
from carray.core.progress import say
from carray.core.storage import absolute, exists, join, read_json, write_bytes, write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation import metrics as measure
from carray.evaluation.figures import confusion_png
from carray.evaluation.format import CONFUSION_PNG, METRICS_JSON, TABLES, VERSION, table_kind
from carray.evaluation.page import write_page
from carray.evaluation.score import ScoredSplit, read_original, score_split, seen_before
from carray.manifest.format import read_manifest, row_box
from carray.pixels import Box, PixelSettings, decode

__all__ = ["evaluate", "summary_text", "take_examples", "write_evaluation"]

PAIRS, IMAGES_A_PAIR = 12, 3
LONG_SIDE, SHORT_SIDE_LEAST = 240, 24
"""Pixels: a dozen pairs of pictures of this size are half a megabyte, and a banner of 10,000 by 10 stays one."""
QUALITY = 78


def take_examples(scored: ScoredSplit, pairs: pd.DataFrame, info: BundleInfo) -> list[dict[str, Any]]:
    """Take up to three pictures of each of the first 12 pairs, the surest mistakes first.

    Returns:
        Rows of truth, label, uri, score, jpeg, width, height and reason, in the order of the pairs.
    """
    mistaken = pd.DataFrame(
        [
            (place, row["truth"], row["label"], row["score"])
            for place, row in enumerate(scored.predictions)
            if row["status"] == "ok" and row["label"] != row["truth"]
        ],
        columns=["place", "truth", "label", "score"],
    ).sort_values(["score", "place"], ascending=[False, True])
    chosen = [
        int(place)
        for pair in pairs.head(PAIRS).to_dict("records")
        for place in mistaken.loc[
            (mistaken["truth"] == pair["truth"]) & (mistaken["label"] == pair["label"]), "place"
        ].head(IMAGES_A_PAIR)
    ]
    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        pictures = list(pool.map(lambda place: _picture(scored.rows[place], boxes=info.uses_boxes), chosen))
    names = ("uri", "truth", "label", "score")
    return [
        {name: scored.predictions[place][name] for name in names} | picture
        for place, picture in zip(chosen, pictures, strict=True)
    ]


def _picture(row: Mapping[Any, Any], *, boxes: bool) -> dict[str, Any]:
    """Give jpeg, width and height of a small picture, or the reason why there is none."""
    from PIL import Image

    # Squashed to a square and stretched back: the one way of decoding that knows boxes, EXIF and every format.
    settings = PixelSettings(decode_size=LONG_SIDE, input_size=LONG_SIDE, aspect="squash")
    box = row_box(row) if boxes else None
    try:
        found = decode(read_original(row), settings, box=box)
    except (FetchError, DecodeError) as err:
        return {"reason": str(err)}
    width, height = _size(found.width, found.height, box)
    buffer = io.BytesIO()
    Image.fromarray(found.pixels_HWC).resize((width, height), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=QUALITY, optimize=True
    )
    return {"jpeg": buffer.getvalue(), "width": width, "height": height}


def _size(width: int, height: int, box: Box | None) -> tuple[int, int]:
    """Give the picture's sides, the longer one LONG_SIDE, from those of the image or of the part of its box inside."""
    if box is not None:
        width, height = min(box[2], width) - max(box[0], 0), min(box[3], height) - max(box[1], 0)
    scale = LONG_SIDE / max(width, height)
    return max(SHORT_SIDE_LEAST, round(width * scale)), max(SHORT_SIDE_LEAST, round(height * scale))


def evaluate(bundle: str, manifest: str, *, split: str = "test", out: str, runtime: str = "fp32") -> dict[str, Any]:
    """Score one split with a bundle, write tables, pictures, page and metrics into `out`, and give the metrics.

    The same evaluation again reads what stands in `out`.

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
    if (finished := _finished(out, identity)) is not None:
        return finished
    scored = score_split(table, split, scorer)
    origin = identity | {
        "bundle": scorer.uri,
        "manifest": table.uri,
        "seen_before": seen_before(scorer.info, table, split),
    }
    return write_evaluation(out, origin, scorer.info, scored)


def summary_text(metrics: Mapping[str, Any]) -> str:
    """Say the metrics in a few lines for a person."""
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


def _finished(out: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not exists(join(out, METRICS_JSON)):
        return None
    found: dict[str, Any] = read_json(join(out, METRICS_JSON))
    if any(found.get(name) != value for name, value in identity.items()):
        seen = ", ".join(f"{name} {found.get(name)}" for name in identity)
        raise SettingsError(f"{out} holds another evaluation ({seen}); choose another folder with --out.")
    say(f"{out} holds this evaluation already; delete its {METRICS_JSON} to measure again.")
    return found


def write_evaluation(out: str, origin: dict[str, Any], info: BundleInfo, scored: ScoredSplit) -> dict[str, Any]:
    """Write everything that a scored split tells into `out`, and give the metrics, which hold `origin`, too.

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
    write_bytes(join(out, CONFUSION_PNG), confusion_png(counts_KK, info.classes))
    metrics = _metrics(origin, info, scored, tables)
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
        "acceptance": measure.kept_promise(info, score_N, right_N),
    }
    return found


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Give a table's rows as JSON holds them: what is missing is null."""
    records = table.astype(object).to_dict("records")
    return [{str(name): None if pd.isna(value) else value for name, value in row.items()} for row in records]


def _table(rows: pd.DataFrame | Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    if isinstance(rows, pd.DataFrame):
        return pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
    return table_from_rows(rows, schema)

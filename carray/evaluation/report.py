"""Evaluates a bundle on one split of a manifest, through the very path that classification takes.

    metrics.json            the headline, and what it was measured on; the marker, written last
    predictions.parquet     one row an image of the split: truth beside label, score and top five, or the reason
    per_class.parquet       precision, recall, f1 and support of every class
    confused_pairs.parquet  truth, label, images, fraction of truth's images
    confusion.png           the same as a picture, rows add up to 1

From: a bundle and a manifest. To: a folder, local or S3.
Invariants: pixels, boxes and scores come from `pixels` and `bundle.predict`, as in classify; rows out = images of the
split; an image that cannot be read now, or whose bytes are no longer those of the manifest, is a row with its reason,
is counted in `unreadable`, and is in no accuracy.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from carray.bundle.format import BundleInfo
from carray.bundle.predict import Scorer, score_columns
from carray.core.errors import BudgetError, DecodeError, FetchError, SchemaError, SettingsError
from carray.core.images import fetch_image
from carray.core.progress import Progress, say
from carray.core.storage import absolute, exists, join, read_json, write_bytes, write_json
from carray.core.tables import table_from_rows, write_table
from carray.evaluation import metrics as measure
from carray.evaluation.confusion import confusion_png
from carray.manifest.format import Manifest, read_manifest, row_box
from carray.pixels import decode, view

__all__ = ["evaluate", "summary_text"]

METRICS_JSON = "metrics.json"
VERSION = 1
BATCH_IMAGES = 64

_PREDICTIONS = pa.schema(
    [
        ("uri", pa.string()),
        ("truth", pa.string()),
        ("status", pa.string()),
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("label", pa.string()),
        ("score", pa.float64()),
        ("margin", pa.float64()),
        ("entropy", pa.float64()),
        ("top5_labels", pa.list_(pa.string())),
        ("top5_scores", pa.list_(pa.float64())),
    ]
)
_PER_CLASS = pa.schema(
    [
        ("label", pa.string()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("f1", pa.float64()),
        ("support", pa.int64()),
    ]
)
_CONFUSED_PAIRS = pa.schema(
    [("truth", pa.string()), ("label", pa.string()), ("images", pa.int64()), ("fraction", pa.float64())]
)


def evaluate(bundle: str, manifest: str, *, split: str = "test", out: str, runtime: str = "fp32") -> dict[str, Any]:
    """Score one split with a bundle, write tables, picture and metrics into `out`, and give the metrics.

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
    rows = table.of_split(split)
    _check_labels(rows["label"], scorer.info, table.uri)
    identity = {
        "bundle_id": scorer.info.bundle_id,
        "manifest_fingerprint": table.fingerprint,
        "split": split,
        "runtime": scorer.runtime,
    }
    if (finished := _finished(out, identity)) is not None:
        return finished
    _warn_of_boxes(table, scorer.info)
    predictions, logits_NK = _score_rows(rows.to_dict("records"), scorer)
    truth_N = _indices([row["truth"] for row in predictions if row["status"] == "ok"], scorer.info.classes)
    if not len(truth_N):
        first = predictions[0]
        raise BudgetError(
            f"none of the {len(predictions)} images of split {split!r} can be read (the first, {first['uri']!r}: "
            f"{first['error']}); check that they still lie where {table.uri} says."
        )
    return _write_results(
        out, identity | {"bundle": scorer.uri, "manifest": table.uri}, scorer.info, predictions, truth_N, logits_NK
    )


def summary_text(metrics: Mapping[str, Any]) -> str:
    """Say the metrics in a few lines for a person."""
    what = f"images of split {metrics['split']}, bundle {metrics['bundle_id']}, runtime {metrics['runtime']}"
    lines = [f"{metrics['scored']:,} {what}"]
    for name, title in (("top1", "top-1"), ("top5", "top-5")):
        low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
        lines.append(f"  {title:<10} {metrics[name]:.1%}  (95 % interval {low:.1%} to {high:.1%})")
    for level, title in (("make", "make"), ("make_model", "with model")):
        if level in metrics["levels"]:
            lines.append(f"  {title:<10} {metrics['levels'][level]:.1%}")
    lines += [f"  {'macro F1':<10} {metrics['macro_f1']:.3f}", f"  {'loss':<10} {metrics['loss']:.3f} nats"]
    if metrics["unreadable"]:
        kinds = ", ".join(f"{count} {code}" for code, count in metrics["unreadable_codes"].items())
        lines.append(f"  {metrics['unreadable']:,} images could not be read ({kinds}); they are in no figure above")
    return "\n".join(lines)


def _finished(out: str, identity: Mapping[str, str]) -> dict[str, Any] | None:
    if not exists(join(out, METRICS_JSON)):
        return None
    found: dict[str, Any] = read_json(join(out, METRICS_JSON))
    if any(found.get(name) != value for name, value in identity.items()):
        seen = ", ".join(f"{name} {found.get(name)}" for name in identity)
        raise SettingsError(f"{out} holds another evaluation ({seen}); choose another folder with --out.")
    say(f"{out} holds this evaluation already; delete its {METRICS_JSON} to measure again.")
    return found


def _check_labels(labels: Any, info: BundleInfo, uri: str) -> None:
    unknown = sorted(set(labels) - set(info.classes))
    if unknown:
        raise SchemaError(
            f"{uri} has {len(unknown)} labels that bundle {info.bundle_id} does not know, the first is {unknown[0]!r} "
            f"(it knows {len(info.classes)}); evaluate with a manifest of the bundle's own classes."
        )


def _warn_of_boxes(table: Manifest, info: BundleInfo) -> None:
    if info.uses_boxes and table.rows["x1"].isna().all():
        say(
            f"warning: bundle {info.bundle_id} was trained on boxes, and {table.uri} has none; whole images are scored."
        )


def _score_rows(
    rows: Sequence[Mapping[Any, Any]], scorer: Scorer
) -> tuple[list[dict[str, Any]], npt.NDArray[np.float32]]:
    """Give one prediction a row, in order, and logits_NK of those with status ok."""
    predictions: list[dict[str, Any]] = []
    logits = [np.empty((0, len(scorer.info.classes)), dtype=np.float32)]
    threads = min(32, 2 * len(os.sched_getaffinity(0)))  # decoding leaves the GIL; twice the cores hides the fetching
    with Progress("evaluating", total=len(rows)) as progress, ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(rows), BATCH_IMAGES):
            batch = rows[start : start + BATCH_IMAGES]
            seen = list(pool.map(lambda row: _see(row, scorer.info), batch))
            pixels = [image for image in seen if isinstance(image, np.ndarray)]
            scored: list[dict[str, Any]] = []
            if pixels:
                logits_BK, _ = scorer.score(np.stack(pixels))
                logits.append(logits_BK)
                columns = score_columns(logits_BK, scorer.info)
                scored = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for row, image in zip(batch, seen, strict=True):
                outcome = {"status": "ok", **scored.pop(0)} if isinstance(image, np.ndarray) else image
                predictions.append({"uri": row["uri"], "truth": row["label"], **outcome})
            progress.advance(len(batch), errors=len(batch) - len(pixels))
    return predictions, np.concatenate(logits)


def _see(row: Mapping[Any, Any], info: BundleInfo) -> npt.NDArray[np.uint8] | dict[str, str]:
    """Give the network's input for one row, input_size x input_size x 3 uint8, or the reason why there is none."""
    try:
        data = fetch_image(row["uri"], escaped=bool(row["escaped"])).data
        if hashlib.sha256(data).hexdigest() != row["sha256"]:
            raise FetchError("changed", "the bytes are no longer those of the manifest; prepare it again")
        return view(decode(data, info.pixels, box=row_box(row) if info.uses_boxes else None).pixels_HWC, info.pixels)
    except (FetchError, DecodeError) as err:
        status = "fetch_error" if isinstance(err, FetchError) else "decode_error"
        return {"status": status, "error_code": err.code, "error": str(err)}


def _indices(labels: Sequence[str], classes: Sequence[str]) -> npt.NDArray[np.int64]:
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[label] for label in labels], dtype=np.int64)


def _write_results(
    out: str,
    origin: dict[str, str],
    info: BundleInfo,
    predictions: Sequence[Mapping[str, Any]],
    truth_N: npt.NDArray[np.int64],
    logits_NK: npt.NDArray[np.float32],
) -> dict[str, Any]:
    predicted_N = logits_NK.argmax(axis=1)
    counts_KK = measure.confusion_counts(truth_N, predicted_N, len(info.classes))
    codes = Counter(row["error_code"] for row in predictions if row["status"] != "ok")
    metrics = {
        **origin,
        "images": len(predictions),
        "scored": len(truth_N),
        "unreadable": codes.total(),
        "unreadable_codes": dict(codes.most_common()),
        **measure.headline(logits_NK, truth_N, temperature=info.temperature),
        "levels": measure.accuracy_by_level(truth_N, predicted_N, info.classes),
    }
    per_class = measure.class_table(truth_N, predicted_N, info.classes)
    pairs = measure.confused_pairs(counts_KK, info.classes)
    tables = {
        "predictions": table_from_rows(predictions, _PREDICTIONS),
        "per_class": pa.Table.from_pandas(per_class, schema=_PER_CLASS, preserve_index=False),
        "confused_pairs": pa.Table.from_pandas(pairs, schema=_CONFUSED_PAIRS, preserve_index=False),
    }
    for name, table in tables.items():
        write_table(table, join(out, f"{name}.parquet"), kind=f"evaluation {name}", version=VERSION, provenance=origin)
    write_bytes(join(out, "confusion.png"), confusion_png(counts_KK, info.classes))
    write_json(join(out, METRICS_JSON), metrics)
    return metrics

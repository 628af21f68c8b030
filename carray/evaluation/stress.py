"""Stresses a bundle: with corrupted pictures of a split, and with images that show something else.

    robustness.parquet       top-1 by corruption and severity (evaluation.corruptions)
    robustness.json          what it was measured on; the marker, written after it
    outside.json             the AUROC of `ood_score` for outside images, by kind (evaluation.outside)

The folder may be that of an evaluation of the same bundle and split: its page then shows these, too. Both parts use the
same images of the split. Finished parts are not measured again; results of another bundle or manifest are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd

from carray.bundle.scorer import Scorer
from carray.core.errors import BudgetError
from carray.core.progress import say
from carray.core.store.files import absolute, join, write_json
from carray.core.tables import table_from_rows, write_table
from carray.core.text import readable
from carray.evaluation.corruptions import NONE, REENCODED, ROBUSTNESS_SCHEMA, corrupted_hits, robustness_rows
from carray.evaluation.evaluate import WritePage
from carray.evaluation.evaluation_folder import METRICS_JSON, OUTSIDE_JSON, ROBUSTNESS_JSON, read_finished
from carray.evaluation.outside import list_outside, measure_outside, outside_fingerprint
from carray.evaluation.score import Row, check_labels
from carray.manifest.manifest_file import read_manifest

__all__ = ["stress", "summary_text"]

VERSION = 1


def stress(
    bundle: str,
    manifest: str,
    *,
    out: str,
    outside: str | None = None,
    split: str = "test",
    images: int | None = 500,
    seed: int = 0,
    runtime: str = "fp32",
    write_page: WritePage | None = None,
) -> dict[str, Any]:
    """Measure robustness and, with `outside`, how well `ood_score` separates those images from the split's.

    `images` of the split (None: all) are drawn by content. `outside` is a folder of images, or a table of them
    (evaluation.outside). Finished parts of the same measurement in `out` are read, and `write_page` writes the page of
    an evaluation there again. Returns the markers' contents by `robustness` and, with `outside`, by `outside`.

    Raises:
        BundleError: the bundle is unfinished, damaged, or computes other logits on this machine.
        SchemaError: the split is empty or has labels unknown to the bundle, or the outside is unusable.
        SettingsError: the bundle lacks that runtime, or `out` holds another measurement.
        BudgetError: no image can be read, so there is nothing to measure.
    """
    out, table, scorer = absolute(out), read_manifest(manifest), Scorer(bundle, runtime=runtime)
    rows = _draw_rows(table.of_split(split), images, seed=seed)
    outside_rows = None if outside is None else list_outside(outside)  # fails before the long work
    check_labels((row["label"] for row in rows), scorer.info, table.uri)
    evaluated = {
        "bundle_id": scorer.info.bundle_id,
        "manifest_fingerprint": table.fingerprint,
        "split": split,
    }
    # The page of another evaluation would show these tables.
    evaluation = read_finished(join(out, METRICS_JSON), evaluated, what="evaluation")
    identity: dict[str, Any] = {**evaluated, "runtime": scorer.runtime, "drawn": images, "seed": seed}
    origin = {"bundle": scorer.uri, "manifest": absolute(table.uri)}
    measure = partial(_measure_robustness, out, identity | origin, rows, scorer)
    results = {"robustness": _once(join(out, ROBUSTNESS_JSON), identity, origin, measure)}
    if outside_rows is not None:
        identity["outside_fingerprint"], origin["outside"] = outside_fingerprint(outside_rows), absolute(str(outside))
        measure = partial(measure_outside, rows, outside_rows, scorer, seed=seed)
        results["outside"] = _once(join(out, OUTSIDE_JSON), identity, origin, measure)
    if write_page is not None and evaluation is not None:
        write_page(out, evaluation)
    return results


def _once(
    marker: str, identity: Mapping[str, Any], origin: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Read a finished measurement, or measure and write its marker."""
    if (found := read_finished(marker, identity, what="measurement")) is not None:
        say(f"{marker} holds this measurement already; delete it to measure again.")
        return found
    found = {**identity, **origin, **measure()}
    write_json(marker, found)
    return found


def summary_text(results: Mapping[str, Any]) -> str:
    """Format the figures for a terminal."""
    found = results["robustness"]
    lines = [
        f"{found['images']:,} images of split {found['split']}, bundle {found['bundle_id']}, top-1 {found['top1']:.1%}"
    ]
    for name, row in found["worst"].items():
        interval = f"95 % interval {row['top1_low']:.1%} to {row['top1_high']:.1%}"
        lines.append(f"  {name.replace('_', ' '):<15} {row['top1']:6.1%}  ({row['severity']}; {interval})")
    for kind, own in results.get("outside", {}).get("kinds", {}).items():
        auroc = "none could be read" if own["auroc"] is None else f"AUROC of ood_score {own['auroc']:.3f}"
        lines.append(f"{own['scored']:,} outside images ({readable(kind)}, {own['sources']:,} sources): {auroc}")
    return "\n".join(lines)


def _draw_rows(rows: pd.DataFrame, images: int | None, *, seed: int) -> list[Row]:
    """Draw `images` rows of a manifest (None: all) by a hash of seed and content, so whatever the order of rows."""
    numbered = enumerate(rows["sha256"])
    by_hash = sorted((hashlib.sha256(f"{seed} {sha256}".encode()).hexdigest(), i) for i, sha256 in numbered)
    return list(rows.iloc[[i for _, i in by_hash[:images]]].to_dict("records"))


def _measure_robustness(out: str, origin: Mapping[str, Any], rows: Sequence[Row], scorer: Scorer) -> dict[str, Any]:
    hits_VN, unreadable = corrupted_hits(rows, scorer)
    if not hits_VN.shape[1]:
        codes = ", ".join(f"{count} {code}" for code, count in unreadable.items())
        raise BudgetError(f"none of the {len(rows)} images of split {origin['split']!r} can be read ({codes}).")
    measured = robustness_rows(hits_VN)
    table, place = table_from_rows(measured, ROBUSTNESS_SCHEMA), join(out, "robustness.parquet")
    write_table(table, place, kind="evaluation robustness", version=VERSION, provenance=origin)
    worst = {}
    for name in dict.fromkeys(row["corruption"] for row in measured if row["corruption"] not in (NONE, REENCODED)):
        row = min((row for row in measured if row["corruption"] == name), key=lambda row: row["top1"])
        worst[name] = {key: row[key] for key in ("severity", "top1", "top1_low", "top1_high")}
    return {
        "images": measured[0]["images"],
        "unreadable": unreadable.total(),
        "unreadable_codes": dict(unreadable.most_common()),
        "top1": measured[0]["top1"],
        "worst": worst,
    }

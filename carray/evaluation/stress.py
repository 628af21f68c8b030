"""Stresses a bundle: with corrupted pictures of a split, and with images that show something else.

    robustness.parquet       top-1 by corruption and severity (evaluation.corruptions)
    robustness.json          what it was measured on; the marker, written after it
    outside.json             the AUROC of `ood_score` for outside images, by kind (evaluation.outside)

The folder may be that of an evaluation of the same bundle and split: its page then shows these, too. Both parts use the
same images of the split. Finished parts are not measured again; results of another bundle or manifest are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from carray.bundle.scorer import Scorer
from carray.core.errors import BudgetError, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, join, read_json, write_json
from carray.core.tables import table_from_rows, write_table
from carray.core.text import readable
from carray.evaluation.corruptions import NONE, REENCODED, ROBUSTNESS_SCHEMA, corrupted_hits, robustness_rows
from carray.evaluation.evaluate import WritePage
from carray.evaluation.evaluation_folder import METRICS_JSON, OUTSIDE_JSON, ROBUSTNESS_JSON
from carray.evaluation.outside import list_outside, measure_outside, outside_fingerprint
from carray.evaluation.score import Row, check_labels, draw_rows
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

    Args:
        bundle: Folder of the bundle.
        manifest: A manifest of the bundle's own classes.
        out: Folder for the tables; finished parts of the same measurement in it are read.
        outside: Folder of images, or Parquet table of them (evaluation.outside).
        split: Which images are corrupted and are inside.
        images: So many of them, drawn by content; all when None.
        seed: Of the draw and the bootstrap.
        runtime: One of the bundle's.
        write_page: Writes the page of an evaluation in `out` again.

    Returns:
        The markers' contents by `robustness` and, with `outside`, by `outside`.

    Raises:
        BundleError: the bundle is unfinished, damaged, or computes other logits on this machine.
        SchemaError: the split is empty or has labels unknown to the bundle, or the outside is unusable.
        SettingsError: the bundle lacks that runtime, or `out` holds another measurement.
        BudgetError: no image can be read, so there is nothing to measure.
        StorageError: storage refused to read or to write.
    """
    out, table, scorer = absolute(out), read_manifest(manifest), Scorer(bundle, runtime=runtime)
    rows = draw_rows(table.of_split(split), images, seed=seed)
    outside_rows = None if outside is None else list_outside(outside)  # fails before the long work
    check_labels((row["label"] for row in rows), scorer.info, table.uri)
    identity: dict[str, Any] = {
        "bundle_id": scorer.info.bundle_id,
        "manifest_fingerprint": table.fingerprint,
        "split": split,
        "runtime": scorer.runtime,
        "drawn": images,
        "seed": seed,
    }
    _check_evaluation(out, identity)
    origin = {"bundle": scorer.uri, "manifest": absolute(table.uri)}
    found = _finished(join(out, ROBUSTNESS_JSON), identity)
    results = {"robustness": found or _write_robustness(out, identity | origin, rows, scorer)}
    if outside_rows is not None:
        identity |= {"outside_fingerprint": outside_fingerprint(outside_rows)}
        origin |= {"outside": absolute(str(outside))}
        found = _finished(join(out, OUTSIDE_JSON), identity)
        if found is None:
            found = identity | origin | measure_outside(rows, outside_rows, scorer, seed=seed)
            write_json(join(out, OUTSIDE_JSON), found)
        results["outside"] = found
    if write_page is not None and exists(join(out, METRICS_JSON)):
        write_page(out, read_json(join(out, METRICS_JSON)))
    return results


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


def _finished(marker: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not exists(marker):
        return None
    found: dict[str, Any] = read_json(marker)
    if any(found.get(name) != value for name, value in identity.items()):
        seen = ", ".join(f"{name} {found.get(name)}" for name in identity)
        raise SettingsError(f"{marker} is of another measurement ({seen}); choose another folder with --out.")
    say(f"{marker} holds this measurement already; delete it to measure again.")
    return found


def _check_evaluation(out: str, identity: Mapping[str, Any]) -> None:
    """Refuse a folder with the evaluation of another bundle, whose page would show these tables."""
    place = join(out, METRICS_JSON)
    if exists(place):
        found = read_json(place)
        for name in ("bundle_id", "manifest_fingerprint", "split"):
            if name in found and found[name] != identity[name]:
                raise SettingsError(
                    f"{place} is of an evaluation with {name} {found[name]}, not {identity[name]}; choose another "
                    "folder with --out."
                )


def _write_robustness(out: str, origin: Mapping[str, Any], rows: Sequence[Row], scorer: Scorer) -> dict[str, Any]:
    hits_VN, unreadable = corrupted_hits(rows, scorer)
    if not hits_VN.shape[1]:
        codes = ", ".join(f"{count} {code}" for code, count in unreadable.items())
        raise BudgetError(f"none of the {len(rows)} images of split {origin['split']!r} can be read ({codes}).")
    measured = robustness_rows(hits_VN)
    table, place = table_from_rows(measured, ROBUSTNESS_SCHEMA), join(out, "robustness.parquet")
    write_table(table, place, kind="evaluation robustness", version=VERSION, provenance=origin)
    worst: dict[str, dict[str, Any]] = {}
    for row in [row for row in measured if row["corruption"] not in (NONE, REENCODED)]:
        if row["corruption"] not in worst or row["top1"] < worst[row["corruption"]]["top1"]:
            worst[row["corruption"]] = {name: row[name] for name in ("severity", "top1", "top1_low", "top1_high")}
    marker = {
        **origin,
        "images": measured[0]["images"],
        "unreadable": unreadable.total(),
        "unreadable_codes": dict(unreadable.most_common()),
        "top1": measured[0]["top1"],
        "worst": worst,
    }
    write_json(join(out, ROBUSTNESS_JSON), marker)
    return marker

"""Chooses a new threshold for a finished bundle: for another precision, or on images of another manifest.

Scores are fp32's, of images that the network was not trained on. If the target cannot be shown, the bundle stays as it
is. `bundle_id` stays the same.
"""

from __future__ import annotations

from carray.bundle.bundle_folder import BundleInfo, write_info
from carray.bundle.scorer import Scorer
from carray.bundle.threshold import acceptance_text, choose_threshold, top_scores
from carray.bundle.trained_on import mask_trained_on
from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute
from carray.evaluation.score import score_split
from carray.manifest.manifest_file import read_manifest

__all__ = ["recalibrate"]


def recalibrate(bundle: str, manifest: str, *, target_precision: float, split: str = "val") -> BundleInfo:
    """Choose the threshold for a precision on a labelled split, and write it into the bundle; return its description.

    Raises:
        SettingsError: the target is no precision or cannot be shown on these images, or the bundle learned from them.
        BundleError: the bundle is unfinished, damaged, or computes other logits on this machine.
        SchemaError: the split is empty, or holds labels that the bundle does not know.
        BudgetError: no image of the split can be read.
    """
    if not 0 < target_precision < 1:
        raise SettingsError(
            f"target_precision is {target_precision:g}, but a precision that can be promised lies above 0 and below 1, "
            "such as 0.98."
        )
    table, scorer = read_manifest(absolute(manifest)), Scorer(bundle, runtime="fp32")
    info = scorer.info
    rows = table.of_split(split)
    seen_N = mask_trained_on(scorer.uri, info, table, rows)
    if seen_N is not None and seen_N.all():
        raise SettingsError(
            f"bundle {info.bundle_id} has learned from split {split!r} of {table.uri}, so its scores there promise "
            "nothing; give a split that it has not seen with --split, or other labelled images with --manifest."
        )
    if seen_N is None:
        say(
            f"warning: {table.uri} is not the manifest that bundle {info.bundle_id} was trained on; the promise holds "
            "only if the bundle has learned from none of its images"
        )
    elif seen_N.any():
        say(f"{int(seen_N.sum()):,} of {len(rows):,} images are left out: bundle {info.bundle_id} was trained on them")
        rows = rows[~seen_N]
    scored = score_split(table, split, scorer, rows=rows)
    score_N = top_scores(scored.logits_NK, temperature=info.temperature)
    threshold, found = choose_threshold(score_N, scored.right_N, target_precision=target_precision, split=split)
    if threshold is None:
        kept = "has no threshold" if info.accept_threshold is None else f"keeps its threshold {info.accept_threshold:g}"
        raise SettingsError(
            f"target_precision is {target_precision:g}, but {found.reason}; give a lower one or more labelled images "
            f"(the bundle {kept})."
        )
    if unreadable := len(scored.predictions) - len(scored.truth_N):
        say(f"warning: {unreadable:,} images could not be read, so nothing is known of images like them")
    found = found.model_copy(update={"manifest_fingerprint": table.fingerprint})
    info = info.model_copy(update={"accept_threshold": threshold, "acceptance": found})
    write_info(scorer.uri, info)
    say(f"{scorer.uri}: {acceptance_text(threshold, found)}")
    return info

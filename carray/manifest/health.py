"""Reports on a manifest: what is unreadable, rare, repeated or contradictory, and whether it can be tuned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from carray.core.text import readable
from carray.core.uri_tables import BOX
from carray.manifest.candidates import Candidates, counts, shown
from carray.manifest.labels import similar_labels, unsure_labels
from carray.manifest.manifest_file import SPLITS
from carray.manifest.splits import SET_ASIDE

__all__ = ["HealthReport", "report_health"]

EXAMPLES = 5
"""How many groups, classes and errors of each kind are shown."""

BOXES_USUAL = 0.01
"""Share of boxes that may reach beyond their image before it is a concern."""

_QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class HealthReport:
    """What `prepare` found."""

    candidates: Candidates
    """The source's images, before they were read."""
    out: str
    rows: int
    ok: int
    unlabelled: int
    """Readable images without a label: never trained on."""
    errors: dict[str, int]
    """Unreadable images by error code."""
    error_examples: list[str]
    classes: pd.DataFrame
    """A class a row: counts of its readable images, of those not set aside (used), and of those in train and val."""
    sizes: dict[str, dict[str, float]]
    """Quantiles of width, height (pixels), aspect (width / height) and size_bytes."""
    splits: dict[str, int]
    exact_groups: int
    """Groups of rows with equal bytes (and box, where images are cut to it)."""
    near_groups: int
    """Groups of different bytes that look like one picture."""
    crossing: list[dict[str, str]]
    """Groups of duplicates in more than one split, each as uri to split."""
    conflicting: list[dict[str, str]]
    """Groups of exact duplicates that carry different labels, each as uri to label."""
    boxes: dict[str, int] = field(default_factory=dict)
    """Counts of readable images cut to a box, and of boxes that were clamped, or are one pixel wide or high."""
    empty_boxes: int = 0
    """Boxes that cover nothing of their image; such rows are unreadable."""
    extended: str | None = None
    """The older manifest, whose splits stay."""
    changed_labels: list[str] = field(default_factory=list)
    """Images that the older manifest labels otherwise: `uri: old label -> new label`."""
    old_rows_absent: int = 0
    """Readable rows of that manifest whose image is not in this source."""
    balance: int | None = None
    """How many training images a class may have; None: any number."""
    set_aside: int = 0
    """Readable, labelled images above that limit: rows without a split."""

    @property
    def images_per_class(self) -> dict[str, float]:
        """The min, median and max over the classes with a readable image, without those set aside."""
        used = self.classes.loc[self.classes["used"] > 0, "used"]
        return {} if used.empty else {"min": int(used.min()), "median": float(used.median()), "max": int(used.max())}

    def _classes_without(self, what: str) -> list[str]:
        """List the classes without any such image; of those with a readable one, where that is not what is asked."""
        rows = self.classes if what == "images" else self.classes[self.classes["images"] > 0]
        return list(rows.index[rows[what] == 0])

    @property
    def unusable(self) -> str | None:
        """The reason why `tune` cannot use this manifest; None when it can."""
        if self.empty_boxes == self.rows:
            return self._empty_boxes_text()
        if not self.ok:
            return f"none of its {self.rows:,} images could be read"
        if self.unlabelled == self.ok:
            return "no readable image has a label; put images into class folders, or give a table with labels"
        if (self.classes["images"] > 0).sum() < 2:
            return "it has one class with readable images; two or more are needed"
        if not self.splits["train"]:
            return "split train has no image; give a source that holds training images, too"
        return None if self.splits["val"] else "split val has no image"

    @property
    def concerns(self) -> list[str]:
        """List what to look at before training, the worst first, a sentence each."""
        failed, classes = self.rows - self.ok, self.candidates.classes
        per_class, single = self.images_per_class, list(self.classes.index[self.classes["images"] == 1])
        no_image, no_train, no_val = (self._classes_without(what) for what in ("images", "train", "val"))
        alike, unsure = similar_labels(classes), unsure_labels(classes)
        folders = dict(list(self.candidates.unlabelled_in.items())[:EXAMPLES])
        found: list[tuple[object, str]] = [
            *((True, warning) for warning in self.candidates.warnings),
            (self.conflicting, f"copies carry different labels in {_count(self.conflicting, 'group')}"),
            (self.crossing, f"duplicates cross splits in {_count(self.crossing, 'group')}, so scores flatter"),
            (failed > 0.01 * self.rows, f"{failed / self.rows:.1%} of the images cannot be read"),
            (no_train, f"{_count(no_train, 'class')} without a train image ({shown(no_train)})"),
            (self.changed_labels, f"{_count(self.changed_labels, 'image')} labelled otherwise in {self.extended}"),
            (
                alike,
                f"{_count(alike, 'group')} of classes whose names look alike "
                f"({'; '.join(shown(group) for group in alike[:EXAMPLES])})",
            ),
            (unsure, f"classes that look like a missing label ({shown(unsure)})"),
            (self.empty_boxes, self._empty_boxes_text()),
            *self._box_concerns(),
            (no_image, f"{_count(no_image, 'class')} without a readable image ({shown(no_image)})"),
            (single, f"{_count(single, 'class')} with one image"),
            (no_val, f"{_count(no_val, 'class')} without a val image"),
            (
                per_class and per_class["max"] > 10 * per_class["median"],
                "the largest class has over 10 times the images of the median class",
            ),
            (not self.splits["test"], "no test split, so no final score can be given"),
            (
                self.unlabelled,
                f"{_count(self.unlabelled, 'readable image')} without a label, left out of every split"
                + (f" ({_pairs(folders)})" if folders else ""),
            ),
        ]
        return [text for present, text in found if present]

    @property
    def verdict(self) -> str:
        """Judge the manifest in one paragraph."""
        if self.unusable:
            warnings = f" Look at: {'; '.join(self.candidates.warnings)}." if self.candidates.warnings else ""
            return f"Not usable for tune: {self.unusable}.{warnings}"
        if self.concerns:
            return f"Usable, with {_count(self.concerns, 'thing')} to look at: {'; '.join(self.concerns)}."
        return "Healthy: ready for tune."

    def text(self) -> str:
        """Format the report, several lines."""
        source, classes = self.candidates, self.classes
        unreadable = f"; unreadable {_pairs(self.errors)}" if self.errors else ""
        lines = [
            ("readable", f"{self.ok:,}{unreadable}"),
            *(("", readable(example)) for example in self.error_examples),
            ("classes", f"{len(classes):,}; images a class {_pairs(self.images_per_class)}" if len(classes) else ""),
            ("labels", f"normalised: {_pairs(source.label_changes)}" if source.label_changes else ""),
            ("splits", _pairs(self.splits)),
            ("boxes", _pairs(self.boxes)),
            ("boxes", f"left out: {readable(source.boxes_left_out)}" if source.boxes_left_out else ""),
            (
                "set aside",
                f"{_count(self.set_aside, 'image')} over {self.balance:,} train images a class" if self.balance else "",
            ),
            *((name, _pairs(quantiles)) for name, quantiles in self.sizes.items()),
            ("duplicates", f"{_count(self.exact_groups, 'exact group')}, {_count(self.near_groups, 'near group')}"),
            *_listed("crossing", self.crossing),
            *_listed("conflicting", self.conflicting),
            ("no image", shown(self._classes_without("images"))),
            ("one image", shown(classes.index[classes["images"] == 1])),
            ("not in train", shown(self._classes_without("train"))),
            ("not in val", shown(self._classes_without("val"))),
            (
                "extends",
                f"{self.extended}; {_count(self.old_rows_absent, 'old row')} not in this source"
                if self.extended
                else "",
            ),
            *(("new label", readable(change)) for change in self.changed_labels[:EXAMPLES]),
        ]
        head = f"{self.out}: {_count(self.rows, 'row')} from {source.source} (layout {source.layout})"
        return "\n".join([head, *(f"  {name:<12} {text}" for name, text in lines if text), self.verdict])

    def _box_concerns(self) -> list[tuple[bool, str]]:
        """Report what is wrong with many boxes; a few that reach beyond the edge are usual."""
        if not self.boxes:
            return []
        many = max(1, BOXES_USUAL * self.boxes["images"])
        clamped, narrow = self.boxes["clamped"], self.boxes["one pixel"]
        fractions = self.boxes["within 0 to 1"] == self.boxes["images"]
        return [
            (fractions, "all boxes lie within 0 to 1, probably fractions of the image: multiply by width and height"),
            (narrow > 0 and not fractions, f"{_count(narrow, 'box')} one pixel wide or high"),
            (clamped > many, f"{_count(clamped, 'box')} reached beyond the image and were clamped to it"),
        ]

    def _empty_boxes_text(self) -> str:
        corner = "x2 and y2 are the far corner, not width and height"
        return f"{_count(self.empty_boxes, 'box')} of no pixel of their image ({corner})"


def report_health(
    rows: pd.DataFrame, groups: Sequence[int], *, candidates: Candidates, crop_boxes: bool, **context: Any
) -> HealthReport:
    """Report on a manifest's rows; `groups` numbers duplicates, `context` holds the report's remaining fields."""
    rows = rows.assign(group=groups)
    ok, failed = rows[rows["status"] == "ok"], rows[rows["status"] != "ok"]
    labelled = ok[ok["label"].notna()]
    is_aside = labelled["error_code"].fillna("") == SET_ASIDE
    counted = {"images": labelled, "used": labelled[~is_aside]}
    counted |= {split: labelled[labelled["split"] == split] for split in SPLITS}
    classes = pd.DataFrame({what: one["label"].value_counts() for what, one in counted.items()})
    content = ["sha256", *BOX] if crop_boxes else ["sha256"]
    exact = [group for _, group in ok[ok.duplicated(content, keep=False)].groupby(content, dropna=False, sort=False)]
    by_group = ok.groupby("group")
    straddling = ok[by_group["split"].transform("nunique") > 1]
    return HealthReport(
        candidates=candidates,
        rows=len(rows),
        ok=len(ok),
        unlabelled=len(ok) - len(labelled),
        errors=counts(failed["error_code"]),
        error_examples=[f"{row.uri}: {row.error}" for row in failed.head(EXAMPLES).itertuples()],
        classes=classes.reindex(candidates.classes).fillna(0).astype(int),
        sizes=_sizes(ok),
        splits={split: len(counted[split]) for split in SPLITS},
        exact_groups=len(exact),
        near_groups=int((by_group["sha256"].nunique() > 1).sum()),
        crossing=[_values(group, "split") for _, group in straddling.groupby("group", sort=False)],
        conflicting=[_values(group, "label") for group in exact if group["label"].nunique() > 1],
        set_aside=int(is_aside.sum()),
        boxes=_boxes(ok) if crop_boxes else {},
        empty_boxes=int((failed["error_code"] == "bad_box").sum()),
        **context,
    )


def _values(group: pd.DataFrame, column: str) -> dict[str, str]:
    known = group[group[column].notna()]
    return dict(zip(known["uri"], known[column], strict=True))


def _sizes(ok: pd.DataFrame) -> dict[str, dict[str, float]]:
    if ok.empty:
        return {}
    columns = ok[["width", "height", "size_bytes"]].astype("float64")
    columns["aspect"] = (columns["width"] / columns["height"]).round(3)
    quantiles = columns.quantile(list(_QUANTILES.values()), interpolation="nearest").set_axis(list(_QUANTILES))
    return {str(name): {str(share): float(value) for share, value in one.items()} for name, one in quantiles.items()}


def _boxes(ok: pd.DataFrame) -> dict[str, int]:
    boxed = ok[ok["x1"].notna()]
    if boxed.empty:
        return {}
    x1, y1, x2, y2, width, height = (boxed[name].astype("int64") for name in (*BOX, "width", "height"))
    across = x2.clip(upper=width) - x1.clip(lower=0)
    down = y2.clip(upper=height) - y1.clip(lower=0)
    return {
        "images": len(boxed),
        "clamped": int(((x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)).sum()),
        "one pixel": int(((across == 1) | (down == 1)).sum()),
        "within 0 to 1": int((boxed[[*BOX]].max(axis=1) <= 1).sum()),
    }


def _count(things: int | Sequence[Any], noun: str) -> str:
    number = things if isinstance(things, int) else len(things)
    ending = "" if number == 1 else "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def _pairs(values: Mapping[str, float]) -> str:
    numbers = {name: f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" for name, value in values.items()}
    return ", ".join(f"{readable(name)} {number}" for name, number in numbers.items())


def _listed(what: str, groups: list[dict[str, str]]) -> list[tuple[str, str]]:
    shown_groups = ["; ".join(f"{readable(uri)} ({value})" for uri, value in group.items()) for group in groups]
    return [(what, _count(groups, "group")), *(("", text) for text in shown_groups[:EXAMPLES])] if groups else []

"""Reports on a manifest: what is unreadable, rare, repeated or contradictory, and whether it can be tuned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from carray.core.text import readable
from carray.core.uri_tables import BOX
from carray.manifest.labels import similar_labels, unsure_labels
from carray.manifest.layouts import shown
from carray.manifest.manifest_file import SPLITS
from carray.manifest.sources import Candidates
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
    images_per_class: dict[str, float]
    """min, median and max over the classes with a readable image, without those set aside."""
    empty_classes: list[str]
    single_image_classes: list[str]
    classes_without_train: list[str]
    classes_without_val: list[str]
    sizes: dict[str, dict[str, float]]
    """Quantiles of width, height (pixels), aspect (width / height) and size_bytes."""
    splits: dict[str, int]
    exact_groups: int
    """Groups of rows with equal bytes (and box, where images are cut to it)."""
    near_groups: int
    """Groups of different bytes that look like one picture."""
    crossing_groups: int
    """Duplicate groups with images in more than one split."""
    crossing_examples: list[dict[str, str]]
    """Each maps uri to split."""
    conflicting_groups: int
    """Exact duplicates that carry different labels."""
    conflicting_examples: list[dict[str, str]]
    """Each maps uri to label."""
    label_changes: dict[str, int] = field(default_factory=dict)
    """Counts of normalised labels, by what changed: blank (no label at all), blanks, unicode form."""
    similar_classes: list[list[str]] = field(default_factory=list)
    """Groups of classes whose names differ only by case, compatible letters or the writing of a number."""
    unsure_classes: list[str] = field(default_factory=list)
    """Classes whose names look like a missing label: None, NULL, nan."""
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
    def unusable(self) -> str | None:
        """The reason why `tune` cannot use this manifest; None when it can."""
        if self.empty_boxes == self.rows:
            return self._empty_boxes_text()
        if not self.ok:
            return f"none of its {self.rows:,} images could be read"
        if self.unlabelled == self.ok:
            return "no readable image has a label; put images into class folders, or give a table with labels"
        if len(self.candidates.classes) - len(self.empty_classes) < 2:
            return "it has one class with readable images; two or more are needed"
        missing = [split for split in ("train", "val") if not self.splits[split]]
        if missing and missing[0] == "train":
            return "split train has no image; give a source that holds training images, too"
        return f"split {missing[0]} has no image" if missing else None

    @property
    def concerns(self) -> list[str]:
        """List what to look at before training, the worst first, a sentence each."""
        failed = self.rows - self.ok
        unlabelled_in = dict(list(self.candidates.unlabelled_in.items())[:EXAMPLES])
        folders = f" ({_pairs(unlabelled_in)})" if unlabelled_in else ""
        found = [
            *((True, warning) for warning in self.candidates.warnings),
            (self.conflicting_groups, f"copies carry different labels in {_count(self.conflicting_groups, 'group')}"),
            (
                self.crossing_groups,
                f"duplicates cross splits in {_count(self.crossing_groups, 'group')}, so scores flatter",
            ),
            (failed > 0.01 * self.rows, f"{failed / self.rows:.1%} of the images cannot be read"),
            (
                self.classes_without_train,
                f"{_count(len(self.classes_without_train), 'class')} without a train image "
                f"({shown(self.classes_without_train)})",
            ),
            (self.changed_labels, f"{_count(len(self.changed_labels), 'image')} labelled otherwise in {self.extended}"),
            (
                self.similar_classes,
                f"{_count(len(self.similar_classes), 'group')} of classes whose names look alike "
                f"({'; '.join(shown(group) for group in self.similar_classes[:EXAMPLES])})",
            ),
            (self.unsure_classes, f"classes that look like a missing label ({shown(self.unsure_classes)})"),
            (self.empty_boxes, self._empty_boxes_text()),
            *self._box_concerns(),
            (
                self.empty_classes,
                f"{_count(len(self.empty_classes), 'class')} without a readable image ({shown(self.empty_classes)})",
            ),
            (self.single_image_classes, f"{_count(len(self.single_image_classes), 'class')} with one image"),
            (self.classes_without_val, f"{_count(len(self.classes_without_val), 'class')} without a val image"),
            (
                self.images_per_class and self.images_per_class["max"] > 10 * self.images_per_class["median"],
                "the largest class has over 10 times the images of the median class",
            ),
            (not self.splits["test"], "no test split, so no final score can be given"),
            (
                self.unlabelled,
                f"{_count(self.unlabelled, 'readable image')} without a label, left out of every split{folders}",
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
            return f"Usable, with {_count(len(self.concerns), 'thing')} to look at: {'; '.join(self.concerns)}."
        return "Healthy: ready for tune."

    def text(self) -> str:
        """Format the report, several lines."""
        source = self.candidates
        lines = [
            f"{self.out}: {_count(self.rows, 'row')} from {source.source} (layout {source.layout})",
            f"  readable     {self.ok:,}" + (f"; unreadable {_pairs(self.errors)}" if self.errors else ""),
            *(f"               {readable(example)}" for example in self.error_examples),
            f"  skipped      {_pairs(source.skipped)} (not images by name)" if source.skipped else "",
            f"  left out     {_pairs(source.left_out)} (hidden, left by tools, or masks)" if source.left_out else "",
            f"  classes      {len(source.classes):,}; images a class {_pairs(self.images_per_class)}"
            if source.classes
            else "",
            f"  labels       normalised: {_pairs(self.label_changes)}" if self.label_changes else "",
            f"  splits       {_pairs(self.splits)}",
            f"  boxes        {_pairs(self.boxes)}" if self.boxes else "",
            f"  boxes        left out: {readable(source.boxes_left_out)}" if source.boxes_left_out else "",
            f"  set aside    {_count(self.set_aside, 'image')} over {self.balance:,} train images a class"
            if self.balance is not None
            else "",
            *(f"  {name:<12} {_pairs(quantiles)}" for name, quantiles in self.sizes.items()),
            f"  duplicates   {_count(self.exact_groups, 'exact group')}, {_count(self.near_groups, 'near group')}",
            *_listed("crossing", self.crossing_groups, self.crossing_examples),
            *_listed("conflicting", self.conflicting_groups, self.conflicting_examples),
            *(_names("no image", self.empty_classes), _names("one image", self.single_image_classes)),
            *(_names("not in train", self.classes_without_train), _names("not in val", self.classes_without_val)),
            f"  extends      {self.extended}; {_count(self.old_rows_absent, 'old row')} not in this source"
            if self.extended
            else "",
            *(f"  new label    {readable(change)}" for change in self.changed_labels[:EXAMPLES]),
            self.verdict,
        ]
        return "\n".join(line for line in lines if line)

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
        return (
            f"{_count(self.empty_boxes, 'box')} of no pixel of their image (x2 and y2 are the far corner, not width "
            "and height)"
        )


def report_health(
    rows: pd.DataFrame, groups: Sequence[int], *, candidates: Candidates, crop_boxes: bool, **context: Any
) -> HealthReport:
    """Report on a manifest's rows; `groups` numbers duplicates, `context` holds the report's remaining fields."""
    classes = candidates.classes
    ok = rows[rows["status"] == "ok"].assign(
        group=[g for g, s in zip(groups, rows["status"], strict=True) if s == "ok"]
    )
    failed = rows[rows["status"] != "ok"]
    labelled = ok[ok["label"].notna()]
    per_class = labelled["label"].value_counts()
    is_aside = (labelled["error_code"] == SET_ASIDE).fillna(False).astype(bool)
    split_of = {split: set(labelled.loc[labelled["split"] == split, "label"]) for split in SPLITS}
    present = sorted(per_class.index, key=classes.index) if len(per_class) else []
    return HealthReport(
        rows=len(rows),
        ok=len(ok),
        unlabelled=len(ok) - len(labelled),
        errors={str(code): int(count) for code, count in failed["error_code"].value_counts().items()},
        error_examples=[f"{row.uri}: {row.error}" for row in failed.head(EXAMPLES).itertuples()],
        candidates=candidates,
        images_per_class=_spread(labelled.loc[~is_aside, "label"].value_counts()),
        empty_classes=[name for name in classes if name not in per_class.index],
        single_image_classes=[name for name in present if per_class[name] == 1],
        classes_without_train=[name for name in present if name not in split_of["train"]],
        classes_without_val=[name for name in present if name not in split_of["val"]],
        sizes=_sizes(ok),
        splits={split: int((labelled["split"] == split).sum()) for split in SPLITS},
        set_aside=int(is_aside.sum()),
        similar_classes=similar_labels(classes),
        unsure_classes=unsure_labels(classes),
        boxes=_boxes(ok) if crop_boxes else {},
        empty_boxes=int((failed["error_code"] == "bad_box").sum()),
        **_duplicates(ok, crop_boxes),
        **context,
    )


def _spread(per_class: pd.Series) -> dict[str, float]:
    if per_class.empty:
        return {}
    return {"min": int(per_class.min()), "median": float(per_class.median()), "max": int(per_class.max())}


def _sizes(ok: pd.DataFrame) -> dict[str, dict[str, float]]:
    if ok.empty:
        return {}
    columns = {name: ok[name].astype("float64") for name in ("width", "height", "size_bytes")}
    columns["aspect"] = (columns["width"] / columns["height"]).round(3)
    return {
        name: {
            quantile: float(values.quantile(share, interpolation="nearest")) for quantile, share in _QUANTILES.items()
        }
        for name, values in columns.items()
    }


def _boxes(ok: pd.DataFrame) -> dict[str, int]:
    boxed = ok[ok["x1"].notna()]
    if boxed.empty:
        return {}
    x1, y1, x2, y2 = (boxed[name].astype("int64") for name in BOX)
    width, height = boxed["width"].astype("int64"), boxed["height"].astype("int64")
    across = x2.clip(upper=width) - x1.clip(lower=0)
    down = y2.clip(upper=height) - y1.clip(lower=0)
    return {
        "images": len(boxed),
        "clamped": int(((x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)).sum()),
        "one pixel": int(((across == 1) | (down == 1)).sum()),
        "within 0 to 1": int((boxed[[*BOX]].max(axis=1) <= 1).sum()),
    }


def _duplicates(ok: pd.DataFrame, crop_boxes: bool) -> dict[str, Any]:
    content = ["sha256", *BOX] if crop_boxes else ["sha256"]
    exact = ok[ok.duplicated(content, keep=False)]
    exact_groups = [group for _, group in exact.groupby(content, dropna=False, sort=False)]
    conflicting = [group for group in exact_groups if group["label"].nunique() > 1]
    by_group = ok.groupby("group")
    near = int((by_group["sha256"].nunique() > 1).sum())
    straddling = by_group["split"].transform("nunique") > 1
    crossing = [group for _, group in ok[straddling].groupby("group", sort=False)]
    return {
        "exact_groups": len(exact_groups),
        "near_groups": near,
        "crossing_groups": len(crossing),
        "crossing_examples": _examples(crossing, "split"),
        "conflicting_groups": len(conflicting),
        "conflicting_examples": _examples(conflicting, "label"),
    }


def _examples(found: list[pd.DataFrame], column: str) -> list[dict[str, str]]:
    return [
        {str(uri): str(value) for uri, value in zip(group["uri"], group[column], strict=True) if pd.notna(value)}
        for group in found[:EXAMPLES]
    ]


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}es" if noun.endswith(("s", "x")) else f"{number:,} {noun}s"


def _pairs(values: dict[str, Any]) -> str:
    numbers = {name: f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" for name, value in values.items()}
    return ", ".join(f"{readable(name)} {number}" for name, number in numbers.items())


def _names(what: str, names: list[str]) -> str:
    return f"  {what:<12} {shown(names)}" if names else ""


def _listed(what: str, number: int, examples: list[dict[str, str]]) -> list[str]:
    if not number:
        return []
    shown = ["; ".join(f"{readable(uri)} ({value})" for uri, value in example.items()) for example in examples]
    return [f"  {what:<12} {_count(number, 'group')}", *(f"               {line}" for line in shown)]

"""Lists a source's images with the labels, boxes and splits that it gives, without reading any image.

    layout          recognised by                               label from            split from
    table           a file .parquet, .csv or .tsv               column label          column split
    stanford-cars   devkit/cars_meta.mat, or car_ims/ beside    the annotations       cars_train/, cars_test/, or
                    cars_annos.mat                                                    the annotations
    splits          folders called train, val, test or alike    folders below (or     those folders
                                                                above) the split
    folder          images below other subfolders               the folders           none
    images          images directly in the folder               none                  none

A new layout is a function from a `Source` to `Candidates`, and a row in `LAYOUTS`. What holds for all of them is
checked here: (uri, box) is unique, an image without a label has no split, and what looks wrong is a warning.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import pandas as pd

from carray.core.errors import SchemaError, SettingsError
from carray.core.store.files import absolute
from carray.core.uri_tables import TABLE_SUFFIXES
from carray.manifest.candidates import CANDIDATE_TYPES, Candidates, Source, count_text, counts, is_picture, shown
from carray.manifest.folders import check_label_from, read_folders
from carray.manifest.labels import normalise_labels
from carray.manifest.manifest_file import SPLITS, check_unique
from carray.manifest.stanford_cars import read_stanford_cars
from carray.manifest.tables import read_table_source

__all__ = ["LAYOUTS", "Layout", "list_candidates"]


class Layout(NamedTuple):
    """A way in which images and their labels are organised."""

    read: Callable[[Source], Candidates | None]
    """Lists a source's images; None where the source is not organised in this way."""
    lacks: str
    """What such a source is without, as the end of an error's sentence."""


LAYOUTS = {
    "table": Layout(read_table_source, f"is no file that ends in one of {', '.join(TABLE_SUFFIXES)}; give a table"),
    "stanford-cars": Layout(
        read_stanford_cars,
        "holds neither devkit/cars_meta.mat nor cars_annos.mat beside car_ims/; give the folder that holds one of them",
    ),
    "splits": Layout(read_folders, "has no folder called train, val, test or the like; name one so"),
    "folder": Layout(read_folders, "holds all its images directly; put them into class folders, or use layout images"),
    "images": Layout(read_folders, "is no folder; give one"),
}
"""The layouts; `auto` is the first whose function recognises the source."""

_LOST_SHARE = 0.01
"""The share of skipped files, of all or of a class, above which to warn."""

_REMEDIES = {
    "convert {} to JPEG": r"\.(jxl|jp2|p[pgbn]m|tga|psd|svg|ico|cr[23]|nef|arw|dng)",
    "unpack {}": r"\.(zip|tar|gz|tgz|bz2|7z|rar|xz|zst)",
    "rename {} to what the format is called, such as .jpg": r"\.(p?jp|jif|png|web|tif|bmp|gif).*",
    "if {} are images, rename them or list them in a table, which is taken whole": r".*",
}
"""What to do about skipped files, and the suffixes to which it applies; the first that matches holds."""


def list_candidates(
    source: str,
    *,
    layout: str = "auto",
    label_from: str = "auto",
    column: Mapping[str, str] | None = None,
    crop_boxes: bool = False,
) -> Candidates:
    """List a source's images with the labels, boxes and splits that it gives.

    `label_from` says which folder names make the class (folders.check_label_from), `column` maps uri and label to
    a table's own column names; only with `crop_boxes` is a wrong box in a table an error.

    Raises:
        SettingsError: the layout or `label_from` is unknown, or the source is not laid out in that way.
        SchemaError: no image, a table without its columns, or the same uri and box twice.
        StorageError: the source does not exist or cannot be read.
    """
    if layout not in ("auto", *LAYOUTS):
        raise SettingsError(f"layout is {layout!r}; allowed are auto, {', '.join(LAYOUTS)}.")
    check_label_from(label_from)
    asked = Source(absolute(source), layout, label_from, column or {}, crop_boxes)
    readers = dict.fromkeys(one.read for name, one in LAYOUTS.items() if layout in ("auto", name))
    found = next((found for read in readers if (found := read(asked)) is not None), None)
    if found is None:
        raise SettingsError(f"layout is {layout}, but {asked.uri} {LAYOUTS[layout].lacks}.")
    if label_from != "auto" and found.layout not in ("folder", "splits"):
        raise SettingsError(
            f"label_from is {label_from}, but layout {found.layout} takes no label from folder names; leave it out."
        )
    if found.rows.empty:
        others = found.others["what"].value_counts().drop("", errors="ignore").sort_index()
        listed = ", ".join(f"{count:,} of {name}" for name, count in others.items())
        reason = f"it has only {listed}" if listed else "it is empty"
        raise SchemaError(f"{asked.uri} holds no image ({reason}); give a source that holds some.")
    return _check(found)


def _check(found: Candidates) -> Candidates:
    """Give all candidates the same columns and spelling of labels, and warn of what looks wrong."""
    rows = found.rows.reindex(columns=list(CANDIDATE_TYPES))
    rows["escaped"] = rows["escaped"].eq(True)  # null is false
    rows = rows.astype(CANDIDATE_TYPES)
    check_unique(rows, found.source)
    losses = _loss_warnings(rows, found.others)  # by the folders' own names
    labels, changes = normalise_labels(rows["label"])
    rows["folder"] = rows["folder"].mask(rows["label"].notna() & labels.isna(), "blank labels")
    rows = rows.assign(label=labels, split=rows["split"].mask(labels.isna()))
    return replace(
        found,
        rows=rows,
        classes=list(dict.fromkeys(normalise_labels(pd.Series(found.classes, dtype="string"))[0].dropna()))
        or sorted(set(labels.dropna())),
        warnings=[*found.warnings, *_split_warnings(rows), *losses],
        label_changes=changes,
    )


def _split_warnings(rows: pd.DataFrame) -> list[str]:
    """Warn of given splits that do not hold the same classes."""
    given = rows[rows["split"].notna()]
    classes = {split: set(given.loc[given["split"] == split, "label"]) for split in SPLITS}
    classes = {split: labels for split, labels in classes.items() if labels}
    found = []
    for first, second in combinations(classes, 2):
        smaller, common = min(len(classes[first]), len(classes[second])), len(classes[first] & classes[second])
        if 2 * common < smaller:
            found.append(f"{first} and {second} share only {common:,} of {smaller:,} classes")
    splits_of = given.groupby("label")["split"].unique()
    alone = splits_of[splits_of.str.len() == 1]
    if len(classes) > 1 and len(alone):
        names = shown([f"{label} in {split}" for label, (split,) in alone.items()])
        found.append(f"{len(alone):,} of {len(splits_of):,} classes lie in one given split only ({names})")
    return found


def _loss_warnings(rows: pd.DataFrame, others: pd.DataFrame) -> list[str]:
    """Warn of classes without an image file, and of many skipped files."""
    found = []
    per_class = rows["label"].value_counts()
    skipped = others[others["kind"] == "skipped"]
    if emptied := sorted(set(others["label"].dropna()) - set(per_class.index)):
        held = {label: counts(skipped.loc[skipped["label"] == label, "what"]) for label in emptied}
        named = [f"{label}: {count_text(suffixes) or 'empty'}" for label, suffixes in held.items()]
        folders = "folder" if len(emptied) == 1 else "folders"
        found.append(f"{len(emptied):,} class {folders} without any image file ({shown(named)})")
    pictures = skipped[skipped["what"].map(is_picture).astype(bool)]
    count, total = len(pictures), len(pictures) + len(rows)
    lost, suffixes = counts(pictures["label"]), counts(pictures["what"])
    whole = {label: number + int(per_class.get(label, 0)) for label, number in lost.items()}
    worst = sorted((label for label in lost if lost[label] > _LOST_SHARE * whole[label]), key=lambda x: (-lost[x], x))
    if count > _LOST_SHARE * total or worst:
        named = [f"{lost[label]:,} of {whole[label]:,} in {label}" for label in worst]
        found.append(
            f"{count:,} of {total:,} files ({count / total:.1%}) were skipped since their names are no image's: "
            f"{count_text(suffixes)}{f' ({shown(named)})' if named else ''}; {_remedy(suffixes)}"
        )
    return found


def _remedy(suffixes: Iterable[str]) -> str:
    kinds = defaultdict(list)
    for suffix in sorted(suffixes):
        kinds[next(text for text, pattern in _REMEDIES.items() if re.fullmatch(pattern, suffix, re.DOTALL))].append(
            suffix
        )
    return ", ".join(text.format(shown(names)) for text, names in kinds.items())

"""Lists a source's images with the labels, boxes and splits that it gives, without reading any image.

(uri, box) is unique. Keys without an image's suffix are counted by suffix, hidden ones and tools' files by name.

    layout          recognised by                               label from            split from
    table           a file .parquet, .csv or .tsv               column label          column split
    stanford-cars   devkit/cars_meta.mat, or car_ims/ beside    the annotations       cars_train/, cars_test/, or
                    cars_annos.mat                                                    the annotations
    splits          folders called train, val, test or alike    folders below (or     those folders
                                                                above) the split
    folder          images below other subfolders               the folders           none
    images          images directly in the folder               none                  none

How folder names are read: `manifest/layouts.py`.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any
from urllib.parse import unquote_to_bytes

import pandas as pd

from carray.core.errors import SchemaError, SettingsError
from carray.core.store.files import absolute, exists, is_folder, is_s3, join
from carray.core.store.image_bytes import is_image_key
from carray.core.store.listing import ListedImage, list_keys
from carray.core.text import readable
from carray.core.uri_tables import BOX, TABLE_SUFFIXES
from carray.images.pixels import Box
from carray.manifest.devkit import CarsRelease, find_release, read_release
from carray.manifest.layouts import (
    COMPANION_FOLDERS,
    Folder,
    FolderLayout,
    name_warnings,
    parse_label_from,
    read_layout,
    shown,
)
from carray.manifest.manifest_file import SPLITS, check_unique
from carray.manifest.tables import read_source_table

__all__ = ["LAYOUTS", "Candidates", "list_candidates"]

LAYOUTS = ("auto", "folder", "splits", "stanford-cars", "table", "images")

_FIRST_CLASSES = 5
_LOST_SHARE = 0.01
"""The share of skipped files, of all or of a class, above which to warn."""

_JUNK_NAMES = set(
    "__macosx thumbs.db ehthumbs.db desktop.ini @eadir $recycle.bin #recycle @recycle @tmp #snapshot lost+found "
    "__pycache__".split()
) | {"system volume information"}
"""Files of file managers, archives and network drives, in lower case; hidden names are junk, too."""
_TEXT_SUFFIXES = set(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .pdf .mat .parquet .db .log .py "
    ".ipynb .sh .names .lst .url .md5 .sha256".split()
)
_TEXT_NAMES = set("readme license licence copying changelog makefile _success".split())
_NO_PICTURES = _TEXT_SUFFIXES | _TEXT_NAMES
"""Suffixes and names of files that hold no picture."""
_CONVERT = set(".heic .heif .avif .jxl .jp2 .ppm .pgm .pbm .pnm .tga .psd .svg .ico .cr2 .cr3 .nef .arw .dng".split())
_UNPACK = set(".zip .tar .gz .tgz .bz2 .7z .rar .xz .zst".split())


@dataclass(frozen=True)
class Candidates:
    """A source's images, before any was read."""

    source: str
    layout: str
    rows: pd.DataFrame
    """Columns uri, escaped, label, split (as given; null where none), x1, y1, x2, y2 (Int32)."""
    classes: list[str]
    """Class names: the devkit's order, else sorted."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Counts of keys that are no images by name, by suffix."""
    boxes_left_out: str | None = None
    """Why a table's boxes, if they are not needed, were not read."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Counts of hidden keys, tools' files and masks, by name."""
    label_from: str = "auto"
    """Which folder names make the label (layouts.parse_label_from)."""
    inside: str = ""
    """The folders that only wrap the data, joined by `/`."""
    unlabelled_in: dict[str, int] = field(default_factory=dict)
    """Counts of images without a label, by folder."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong in the layout, or was left out, a sentence each."""

    def text(self) -> str:
        """Format how the source was read, several lines."""
        rows = self.rows
        given, labels = rows["split"].value_counts(), rows["label"].value_counts()
        classes = [f"{readable(name)} {labels.get(name, 0):,}" for name in self.classes[:_FIRST_CLASSES]]
        more = f" and {len(self.classes) - len(classes):,} more" if len(self.classes) > len(classes) else ""
        splits = ", ".join(f"{split} {given[split]:,}" for split in SPLITS if split in given)
        lines = [
            f"{self.source}: {len(rows):,} images, read as layout {self.layout}",
            f"  inside       {readable(self.inside)}/" if self.inside else "",
            f"  splits       {splits or 'none given'}",
            f"  classes      {len(self.classes):,}: {', '.join(classes)}{more}" if classes else "  classes      none",
            f"  no label     {count_text(self.unlabelled_in)}" if self.unlabelled_in else "",
            f"  skipped      {count_text(self.skipped)} (not images by name)" if self.skipped else "",
            f"  left out     {count_text(self.left_out)} (hidden, left by tools, or masks)" if self.left_out else "",
            *(f"  look at      {warning}" for warning in self.warnings),
        ]
        if self.layout != "table":
            lines.append("  If this is not what you mean: --layout and --label-from (carray prepare --help).")
        return "\n".join(line for line in lines if line)


def count_text(counts: Mapping[str, int]) -> str:
    """Format the five largest counts, by name, for a sentence."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(ordered) - 5:,} more" if len(ordered) > 5 else ""
    return ", ".join(f"{shown([name])} {count:,}" for name, count in ordered[:5]) + more


def list_candidates(
    source: str,
    *,
    layout: str = "auto",
    label_from: str = "auto",
    column: Mapping[str, str] | None = None,
    crop_boxes: bool = False,
) -> Candidates:
    """List a source's images with the labels, boxes and splits that it gives.

    `label_from` says which folder names make the class (layouts.parse_label_from), `column` maps uri and label to
    a table's own column names; only with `crop_boxes` is a wrong box in a table an error.

    Raises:
        SettingsError: the layout or `label_from` is unknown, or the source is not laid out in that way.
        SchemaError: no image, a table without its columns, or the same uri and box twice.
        StorageError: the source does not exist or cannot be read.
    """
    source = absolute(source)
    if layout not in LAYOUTS:
        raise SettingsError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}.")
    parse_label_from(label_from)
    if layout == "auto" and is_table(source):
        layout = "table"
    _check_source(source, layout)
    if column and layout != "table":
        raise SettingsError(f"column is {dict(column)}, but {source} is no table; leave it out.")
    if layout == "table":
        candidates = _from_table(source, column, crop_boxes)
    else:
        candidates = _from_listing(source, layout, label_from)
    if label_from != "auto" and candidates.layout not in ("folder", "splits"):
        raise SettingsError(
            f"label_from is {label_from}, but layout {candidates.layout} takes no label from folder names; "
            "leave it out."
        )
    if candidates.rows.empty:
        raise SchemaError(f"{source} holds no image ({_nothing_text(candidates)}); give a source that holds some.")
    check_unique(candidates.rows, source)
    return candidates


def is_table(source: str) -> bool:
    """Check whether a source is a table, by its suffix."""
    return source.lower().endswith(TABLE_SUFFIXES)


def _check_source(source: str, layout: str) -> None:
    if layout == "table":
        if not is_table(source):
            raise SettingsError(
                f"layout is table, but {source} ends in none of {', '.join(TABLE_SUFFIXES)}; give a table."
            )
        if is_folder(source):
            raise SettingsError(f"{source} is a folder, not a table; give a file, or another layout than table.")
    elif not is_s3(source) and exists(source):
        raise SettingsError(
            f"{source} is a file, but layout {layout} needs a folder; give a folder, or a table ending in "
            f"{', '.join(TABLE_SUFFIXES)}."
        )


def _from_table(source: str, column: Mapping[str, str] | None, crop_boxes: bool) -> Candidates:
    table = read_source_table(source, named=column, crop_boxes=crop_boxes)
    rows = table.rows
    classes = sorted(set(rows["label"].dropna()))
    without = int(rows["label"].isna().sum())
    warnings = [*name_warnings(classes), *_split_warnings(rows)]
    return Candidates(
        source,
        "table",
        rows,
        classes,
        boxes_left_out=table.boxes_left_out,
        unlabelled_in={"the table": without} if without else {},
        warnings=warnings,
    )


@dataclass
class _Files:
    """A source's files, divided into images and others."""

    images: list[tuple[Folder, ListedImage]] = field(default_factory=list)
    skipped_in: dict[Folder, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Counts of files that are no images by name, by folder and suffix."""
    left_out: Counter[str] = field(default_factory=Counter)
    folders: set[Folder] = field(default_factory=set)
    """Folders that may hold no file."""
    matlab: set[Folder] = field(default_factory=set)
    """Paths of the .mat files."""

    def pictures(self) -> Counter[Folder]:
        """Count each folder's images, and its files of other suffixes that may be pictures."""
        counts = Counter(folder for folder, _ in self.images)
        for folder, suffixes in self.skipped_in.items():
            if count := sum(number for suffix, number in suffixes.items() if suffix not in _NO_PICTURES):
                counts[folder] += count
        return counts


def _sort_files(listed: Iterable[ListedImage], source: str) -> _Files:
    files = _Files()
    for image in listed:
        *folders, name = _relative_path(image, source) or [""]
        folder = tuple(folders)
        depth = next((depth for depth, part in enumerate((*folders, name)) if _is_junk(part)), None)
        if depth is not None:
            junk = (*folders, name)[depth]
            files.folders.add(folder[:depth])
            if junk == name and is_image_key(name) and not name.startswith("._"):
                files.skipped_in[folder][f"hidden {_suffix(name)}"] += 1  # may be a photograph
            else:
                files.left_out["._*" if junk.startswith("._") else junk] += 1
        elif is_image_key(image.uri):
            files.images.append((folder, image))
        elif image.uri.endswith("/") and not image.size_bytes:  # an empty folder on S3
            files.folders.add((*folder, name))
        else:
            files.skipped_in[folder][_suffix(name)] += 1
            if name.lower().endswith(".mat"):
                files.matlab.add((*folder, name))
    return files


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _JUNK_NAMES or name.endswith("_$folder$")


def _suffix(name: str) -> str:
    """Extract a name's suffix in lower case, or the whole name of README and the like."""
    _stem, dot, suffix = name.rpartition(".")
    if not dot:
        return suffix.lower() if suffix.lower() in _TEXT_NAMES else "(none)"
    return "." + suffix.lower()


def _empty_folders(source: str) -> set[Folder]:
    """List the empty folders of a local source."""
    if is_s3(source):
        return set()
    found = set()
    for path, folders, names in os.walk(source):
        folders[:] = [name for name in folders if not _is_junk(name)]
        if not folders and not names:
            found.add(tuple(part for part in path[len(source.rstrip("/")) :].split("/") if part))
    return found


def _from_listing(source: str, layout: str, label_from: str) -> Candidates:
    files = _sort_files(list_keys(source), source)
    is_cars = layout == "stanford-cars"
    found = read_layout(files.pictures(), layout="auto" if is_cars else layout, label_from=label_from)
    if layout in ("auto", "stanford-cars"):
        release = find_release(files.matlab, found.inside, {folder for folder, _ in files.images})
        if release is not None:
            return _from_release(source, release, files)
    if is_cars:
        raise SettingsError(
            f"layout is stanford-cars, but {join(source, 'devkit/cars_meta.mat')} does not exist; give the folder that "
            "holds devkit/, cars_train/ and cars_test/, or cars_annos.mat and car_ims/, or another layout."
        )
    if layout == "folder" and files.images and found.kind == "images":
        raise SettingsError(
            f"layout is folder, but all {len(files.images):,} images lie directly in {source}; put them into class "
            "folders, or use layout images."
        )
    return _from_folders(source, found, files, by_hand=layout == "folder")


def _from_release(source: str, release: CarsRelease, files: _Files) -> Candidates:
    annotated, classes = read_release(source, release)
    rows: list[dict[str, Any]] = []
    unlabelled: Counter[str] = Counter()
    warnings = []
    depth = len(release.root)
    by_top: dict[str, dict[str, ListedImage]] = defaultdict(dict)
    for folder, image in files.images:
        top = folder[depth] if folder[:depth] == release.root and len(folder) > depth else ""
        if top in release.images.values():
            # By name: some copies hold cars_train/cars_train/.
            by_top[top][image.uri.rsplit("/", 1)[-1]] = image
        else:
            rows.append(_row(image, label=None, split=None))
            unlabelled[_folder_name(folder)] += 1
    for top in dict.fromkeys(release.images.values()):
        images = by_top[top]
        for split in [split for split, name in release.images.items() if name == top]:
            if annotated[split] and not any(name in images for name, _, _ in annotated[split]):
                warnings.append(f"{top}/ holds none of the {len(annotated[split]):,} annotated images of {split}")
            for name, label, box in annotated[split]:
                absent = ListedImage(join(source, *release.root, top, name), 0, None)
                image = images.pop(name, absent)
                rows.append(_row(image, label=label, split=split, box=box))
                unlabelled[f"{top}/"] += label is None
        rows += [_row(image, label=None, split=None) for image in images.values()]
        unlabelled[f"{top}/"] += len(images)
    frame = _frame(rows)
    skipped = sum(files.skipped_in.values(), Counter())
    skipped[".mat"] -= sum(path[-1].startswith("cars_") for path in files.matlab)  # they were read
    skipped = +skipped
    return Candidates(
        source,
        "stanford-cars",
        frame,
        classes,
        dict(skipped),
        left_out=dict(files.left_out),
        inside="/".join(release.root),
        unlabelled_in=dict(+unlabelled),
        warnings=[*warnings, *_split_warnings(frame), *_loss_warnings(len(files.images), skipped, {}, Counter())],
    )


def _from_folders(source: str, found: FolderLayout, files: _Files, *, by_hand: bool) -> Candidates:
    role = cache(found.role)
    left_out, unlabelled = files.left_out.copy(), Counter[str]()
    rows = []
    for folder, image in files.images:
        here = role(folder)
        if here.left_out:
            left_out[_folder_name(folder)] += 1
            continue
        if here.unlabelled_in is not None:
            unlabelled[_folder_name(here.unlabelled_in)] += 1
        rows.append(_row(image, label=here.label, split=here.split))
    frame = _frame(rows)
    per_class = Counter(row["label"] for row in rows if row["label"] is not None)
    lost: dict[str, Counter[str]] = defaultdict(Counter)
    for folder in {*files.skipped_in, *files.folders, *_empty_folders(source)} if found.kind != "images" else ():
        label = role(folder).label
        if label is not None and not any(part.casefold() in COMPANION_FOLDERS for part in folder):
            lost[label] += files.skipped_in.get(folder, Counter())
    classes, skipped = sorted(per_class), sum(files.skipped_in.values(), Counter())
    named = [] if by_hand else name_warnings(*found.class_names())
    if not classes and {"cars_train", "cars_test"} & set(found.splits):
        named.append(
            "the labels of Stanford Cars stand in its devkit/, which must lie beside cars_train/ and cars_test/"
        )
    losses = _loss_warnings(len(files.images), skipped, lost, per_class)
    return Candidates(
        source,
        found.kind,
        frame,
        classes,
        dict(skipped),
        left_out=dict(left_out),
        label_from=str(found.label_from),
        inside="/".join(found.inside),
        unlabelled_in=dict(unlabelled),
        warnings=[*found.warnings, *named, *_split_warnings(frame), *losses],
    )


def _split_warnings(rows: pd.DataFrame) -> list[str]:
    """Warn of given splits that do not hold the same classes."""
    given = rows[rows["label"].notna() & rows["split"].notna()]
    classes = {split: set(given.loc[given["split"] == split, "label"]) for split in SPLITS}
    classes = {split: labels for split, labels in classes.items() if labels}
    found = []
    for first, second in combinations(classes, 2):
        smaller, common = min(len(classes[first]), len(classes[second])), len(classes[first] & classes[second])
        if 2 * common < smaller:
            found.append(f"{first} and {second} share only {common:,} of {smaller:,} classes")
    if len(classes) > 1:
        splits_of = {label: [split for split in classes if label in classes[split]] for label in set(given["label"])}
        alone = sorted(label for label, splits in splits_of.items() if len(splits) == 1)
        if alone:
            names = shown([f"{label} in {splits_of[label][0]}" for label in alone])
            found.append(f"{len(alone):,} of {len(splits_of):,} classes lie in one given split only ({names})")
    return found


def _loss_warnings(
    images: int, skipped: Mapping[str, int], lost: Mapping[str, Counter[str]], per_class: Counter[str]
) -> list[str]:
    """Warn of classes without an image file, and of many skipped files."""
    found = []
    if emptied := sorted(label for label in lost if label not in per_class):
        names = shown([f"{label}: {count_text(lost[label]) or 'empty'}" for label in emptied])
        folders = "folder" if len(emptied) == 1 else "folders"
        found.append(f"{len(emptied):,} class {folders} without any image file ({names})")
    pictures = {suffix: count for suffix, count in skipped.items() if suffix not in _NO_PICTURES}
    count = sum(pictures.values())
    of_class = {
        label: sum(number for suffix, number in suffixes.items() if suffix not in _NO_PICTURES)
        for label, suffixes in lost.items()
    }
    hit = {label: number for label, number in of_class.items() if number > _LOST_SHARE * (number + per_class[label])}
    if count > _LOST_SHARE * (count + images) or hit:
        worst = sorted(hit, key=lambda label: (-hit[label], label))
        names = shown([f"{hit[label]:,} of {hit[label] + per_class[label]:,} in {label}" for label in worst])
        found.append(
            f"{count:,} of {count + images:,} files ({count / (count + images):.1%}) were skipped since their names "
            f"are no image's: {count_text(pictures)}{f' ({names})' if names else ''}; {_remedy(pictures)}"
        )
    return found


def _remedy(suffixes: Iterable[str]) -> str:
    kinds: dict[str, list[str]] = defaultdict(list)
    for suffix in sorted(suffixes):
        if suffix in _CONVERT:
            kinds["convert {} to JPEG"].append(suffix)
        elif suffix in _UNPACK:
            kinds["unpack {}"].append(suffix)
        elif re.match(r"\.(p?jp|jif|png|web|tif|bmp|gif)", suffix):
            kinds["rename {} to what the format is called, such as .jpg"].append(suffix)
        else:
            kinds["if {} are images, rename them or list them in a table, which is taken whole"].append(suffix)
    return ", ".join(text.format(shown(names)) for text, names in kinds.items())


def _relative_path(image: ListedImage, source: str) -> list[str]:
    """List the folders below the source and the name, without the empty ones of `//`."""
    parts = [part for part in image.uri.split("/")[len(source.rstrip("/").split("/")) :] if part]
    return [_unescape(part) for part in parts] if image.escaped else parts


def _unescape(part: str) -> str:
    # An escaped image's whole path is escaped, also those folders that are valid UTF-8.
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        return part


def _row(image: ListedImage, *, label: str | None, split: str | None, box: Box | None = None) -> dict[str, Any]:
    known = {"uri": image.uri, "escaped": image.escaped, "label": label, "split": split if label is not None else None}
    return known | dict(zip(BOX, box or [None] * len(BOX), strict=True))


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    kinds: dict[str, Any] = {
        "uri": "string",
        "escaped": bool,
        "label": "string",
        "split": "string",
        **dict.fromkeys(BOX, "Int32"),
    }
    return pd.DataFrame(rows, columns=list(kinds)).astype(kinds)


def _folder_name(folder: Folder) -> str:
    return "/".join(folder) + "/" if folder else "the top folder"


def _nothing_text(candidates: Candidates) -> str:
    others = candidates.skipped | candidates.left_out
    listed = ", ".join(f"{count:,} of {name}" for name, count in sorted(others.items()))
    return f"it has only {listed}" if others else "it is empty"

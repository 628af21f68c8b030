"""Turns a source into candidate rows: which images there are, with what label, box and given split. Opens no image.

From: class folders, a Stanford Cars devkit, a table of URIs or a bare folder, local or S3. To: `Candidates`.
Invariants: each (uri, box) stands once; a key without an image's suffix is counted by suffix, never silently lost (a
table is taken whole); a label never becomes a path, so `/` in it is only a character.

    layout          recognised by                               label from            split from
    table           a file .parquet, .csv or .tsv               column label          column split
    stanford-cars   devkit/cars_meta.mat                        devkit/*_annos*.mat   cars_train/, cars_test/
    folder          images below subfolders                     the class folder      train/, val/, test/ above it
    images          images directly in the folder               none                  none
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

import pandas as pd

from carray.core.errors import SchemaError, SettingsError
from carray.core.images import is_image_key
from carray.core.listing import ListedImage, list_keys
from carray.core.storage import absolute, exists, is_folder, is_s3, join
from carray.manifest.devkit import devkit_places, read_devkit
from carray.manifest.format import check_unique
from carray.manifest.tables import TABLE_SUFFIXES, given_split, read_source_table
from carray.pixels import Box

__all__ = ["LAYOUTS", "Candidates", "list_candidates"]

LAYOUTS = ("auto", "folder", "stanford-cars", "table", "images")


@dataclass(frozen=True)
class Candidates:
    """Holds what a source offers, before any image was opened."""

    source: str
    layout: str
    rows: pd.DataFrame
    """Columns uri, escaped, label, split (as given; null where none), x1, y1, x2, y2 (Int32)."""
    classes: list[str]
    """Class names: the devkit's order, else sorted."""
    skipped: dict[str, int] = field(default_factory=dict)
    """How many keys were left out, by their suffix."""
    boxes_left_out: str | None = None
    """Why a table's boxes were not taken, where they are not needed."""


def list_candidates(
    source: str, *, layout: str = "auto", column: Mapping[str, str] | None = None, crop_boxes: bool = False
) -> Candidates:
    """List a source's images with the labels, boxes and splits that it gives.

    `column` says which column of a table is which; a table's boxes must be right only with `crop_boxes`.

    Raises:
        SettingsError: the layout is unknown, or the source is not laid out in that way.
        SchemaError: no image, a table without its columns, or the same uri and box twice.
        StorageError: the source does not exist or cannot be read.
    """
    source = absolute(source)
    if layout not in LAYOUTS:
        raise SettingsError(f"layout is {layout!r}; allowed are {', '.join(LAYOUTS)}.")
    if layout == "auto" and is_table(source):
        layout = "table"
    _check_place(source, layout)
    if column and layout != "table":
        raise SettingsError(f"column is {dict(column)}, but {source} is no table; leave it out.")
    if layout == "table":
        candidates = _from_table(source, column, crop_boxes)
    elif layout == "stanford-cars" or (layout == "auto" and exists(devkit_places(source).meta)):
        candidates = _from_devkit(source)
    else:
        candidates = _from_listing(source, layout)
    if candidates.rows.empty:
        raise SchemaError(
            f"{source} holds no image ({_skipped_text(candidates.skipped)}); give a place that holds some."
        )
    check_unique(candidates.rows, source)
    return candidates


def is_table(source: str) -> bool:
    """Say whether a source's name is a table's."""
    return source.lower().endswith(TABLE_SUFFIXES)


def _check_place(source: str, layout: str) -> None:
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
    elif layout == "stanford-cars" and not exists(devkit_places(source).meta):
        raise SettingsError(
            f"layout is stanford-cars, but {devkit_places(source).meta} does not exist; give the folder that holds "
            "devkit/, cars_train/ and cars_test/, or another layout."
        )


def _from_table(source: str, column: Mapping[str, str] | None, crop_boxes: bool) -> Candidates:
    table = read_source_table(source, named=column, crop_boxes=crop_boxes)
    classes = sorted(set(table.rows["label"].dropna()))
    return Candidates(source, "table", table.rows, classes, boxes_left_out=table.boxes_left_out)


def _from_devkit(source: str) -> Candidates:
    annotated, classes = read_devkit(source)
    places = devkit_places(source)
    rows: list[dict[str, Any]] = []
    skipped: Counter[str] = Counter()
    for split, folder in places.images.items():
        listed = _images_in(list_keys(folder) if is_folder(folder) else (), skipped)
        # By name: some copies hold cars_train/cars_train/.
        by_name = {image.uri.rsplit("/", 1)[-1]: image for image in listed}
        for name, label, box in annotated[split]:
            image = by_name.pop(name, None) or ListedImage(join(folder, name), 0, None)
            rows.append(_row(image, label=label, split=split, box=box))
        rows += [_row(image, label=None, split=None) for image in by_name.values()]
    return Candidates(source, "stanford-cars", _frame(rows), classes, dict(skipped))


def _from_listing(source: str, layout: str) -> Candidates:
    skipped: Counter[str] = Counter()
    images = _images_in(list_keys(source), skipped)
    paths = [_relative_path(image, source) for image in images]
    if layout == "auto":
        layout = "folder" if any(len(path) > 1 for path in paths) else "images"
    elif layout == "folder" and images and not any(len(path) > 1 for path in paths):
        raise SettingsError(
            f"layout is folder, but all {len(images):,} images lie directly in {source}; put them into class "
            "folders, or use layout images."
        )
    if layout == "images":
        rows = [_row(image, label=None, split=None) for image in images]
    else:
        rows = [
            _row(image, label=label, split=split) for image, (label, split) in zip(images, _labels(paths), strict=True)
        ]
    classes = sorted({row["label"] for row in rows} - {None})
    return Candidates(source, layout, _frame(rows), classes, dict(skipped))


def _images_in(listed: Iterable[ListedImage], skipped: Counter[str]) -> list[ListedImage]:
    images = []
    for image in listed:
        if is_image_key(image.uri):
            images.append(image)
        else:
            skipped[_suffix(image.uri)] += 1
    return images


def _suffix(uri: str) -> str:
    name = uri.rsplit("/", 1)[-1]
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else "(none)"


def _relative_path(image: ListedImage, source: str) -> list[str]:
    """Give the folders below the source and the name; keys may hold `//`, whose empty folder names nothing."""
    parts = [part for part in image.uri.split("/")[len(source.rstrip("/").split("/")) :] if part]
    return [_plain_name(part) for part in parts] if image.escaped else parts


def _plain_name(part: str) -> str:
    # The whole path of an escaped image is escaped, its class folder too, though that may be good UTF-8 by itself.
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        return part


def _labels(paths: list[list[str]]) -> list[tuple[str | None, str | None]]:
    """Give each image's label and given split; an image that lies above the class folders has neither label."""
    tops = {path[0] for path in paths if len(path) > 1}
    # A class may be called `train`; only where every folder names a split are they splits.
    if "train" in tops and all(given_split(top) for top in tops):
        return [(path[1] if len(path) > 2 else None, given_split(path[0])) for path in paths]
    return [(path[0] if len(path) > 1 else None, None) for path in paths]


def _row(image: ListedImage, *, label: str | None, split: str | None, box: Box | None = None) -> dict[str, Any]:
    x1, y1, x2, y2 = box or (None, None, None, None)
    known = {"uri": image.uri, "escaped": image.escaped, "label": label, "split": split if label is not None else None}
    return {**known, "x1": x1, "y1": y1, "x2": x2, "y2": y2}


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    names = ["uri", "escaped", "label", "split", "x1", "y1", "x2", "y2"]
    frame = pd.DataFrame(rows, columns=names)
    boxes = dict.fromkeys(names[4:], "Int32")
    return frame.astype({"uri": "string", "label": "string", "split": "string", "escaped": bool, **boxes})


def _skipped_text(skipped: dict[str, int]) -> str:
    if not skipped:
        return "it is empty"
    return "it has only " + ", ".join(f"{count:,} of {suffix}" for suffix, count in sorted(skipped.items()))

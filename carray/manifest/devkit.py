"""Reads Stanford Cars' devkit: class names in index order, and each annotated image's name, class and box.

From: SOURCE/devkit/*.mat beside SOURCE/cars_train/ and SOURCE/cars_test/, local or S3. To: annotations by split.
Invariants: .mat files are read by scipy, which runs none of their content, in a process of its own (manifest.matlab);
boxes there are 1-based and inclusive, and leave here 0-based with x2, y2 exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from carray.core.errors import SchemaError
from carray.core.storage import exists, join, read_bytes
from carray.manifest.matlab import read_variable
from carray.pixels import Box

__all__ = ["Annotation", "DevkitPlaces", "devkit_places", "read_devkit"]

Annotation = tuple[str, str | None, Box | None]
"""An image's file name, label and box."""


@dataclass(frozen=True, slots=True)
class DevkitPlaces:
    """Names where a devkit's parts lie."""

    meta: str
    annotations: dict[str, list[str]]
    """Places of each split's annotations; the first that exists is read."""
    images: dict[str, str]
    """Folder of each split's images."""


def devkit_places(source: str) -> DevkitPlaces:
    """Name the places of a devkit's parts."""
    devkit = join(source, "devkit")
    labelled = "cars_test_annos_withlabels.mat"
    return DevkitPlaces(
        meta=join(devkit, "cars_meta.mat"),
        annotations={
            "train": [join(devkit, "cars_train_annos.mat")],
            # The labelled file was published apart from the devkit, so it often lies beside it.
            "test": [join(devkit, labelled), join(source, labelled), join(devkit, "cars_test_annos.mat")],
        },
        images={"train": join(source, "cars_train"), "test": join(source, "cars_test")},
    )


def read_devkit(source: str) -> tuple[dict[str, list[Annotation]], list[str]]:
    """Read the annotations of train and test, and the class names; labels of an unlabelled file are null.

    Raises:
        SchemaError: a file is not a MATLAB file, lacks its fields, or names a class that the devkit does not have.
        StorageError: a file cannot be read.
    """
    places = devkit_places(source)
    classes = [str(name) for name in _variable(places.meta, "class_names")]
    annotated: dict[str, list[Annotation]] = {"train": [], "test": []}
    for split, candidates in places.annotations.items():
        found = next((place for place in candidates if exists(place)), None)
        if found is not None:
            annotated[split] = [_annotation(entry, classes, found) for entry in _variable(found, "annotations")]
    return annotated, classes


def _variable(place: str, name: str) -> list[Any]:
    data = read_bytes(place)
    try:
        values = read_variable(data, name)
    except ValueError as err:
        raise SchemaError(
            f"{place} is not a MATLAB file of version 4 to 7.2 ({err}); fetch the devkit again."
        ) from None
    if values is None:
        raise SchemaError(f"{place} has no variable {name}; it is not part of a Stanford Cars devkit.")
    return values


def _annotation(entry: Any, classes: list[str], place: str) -> Annotation:
    fields = entry if isinstance(entry, dict) else {}
    missing = [name for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname") if name not in fields]
    if missing:
        raise SchemaError(f"{place} has annotations without {', '.join(missing)}; it is not a Stanford Cars devkit's.")
    # Only the name counts: some copies write a path before it.
    name = str(fields["fname"]).rsplit("/", 1)[-1]
    try:
        x1, y1, x2, y2 = (int(fields[f"bbox_{corner}"]) for corner in ("x1", "y1", "x2", "y2"))
        index = int(fields["class"]) if "class" in fields else None
    except (ValueError, TypeError, OverflowError):
        raise SchemaError(f"{place} gives {name!r} a box or a class that is no number; fetch it again.") from None
    if index is None:
        return name, None, (x1 - 1, y1 - 1, x2, y2)
    if not 1 <= index <= len(classes):
        raise SchemaError(f"{place} gives {name} the class {index}; the devkit has classes 1 to {len(classes)}.")
    return name, classes[index - 1], (x1 - 1, y1 - 1, x2, y2)

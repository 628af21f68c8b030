"""Reads Stanford Cars' annotations: class names in index order, and each image's name, class and box.

They are in SOURCE/devkit/*.mat beside cars_train/ and cars_test/, or in the first release's cars_annos.mat beside
car_ims/. Their boxes are 1-based and inclusive; here they are 0-based with x2, y2 exclusive.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from carray.core.errors import SchemaError
from carray.core.store.files import exists, join, read_bytes
from carray.images.pixels import Box
from carray.manifest.matlab import read_variable

__all__ = ["Annotation", "CarsRelease", "find_release", "read_devkit", "read_release"]

Annotation = tuple[str, str | None, Box | None]
"""An image's file name, label and box."""

_LABELLED = "cars_test_annos_withlabels.mat"
_CLASSES = "cars_meta.mat"
_FIRST_RELEASE = "cars_annos.mat"


@dataclass(frozen=True, slots=True)
class CarsRelease:
    """The folders of a copy of Stanford Cars."""

    root: tuple[str, ...]
    """Folders from the source down to the copy."""
    devkit: tuple[str, ...] | None
    """Folders from the source down to the devkit; None for the first release, which has none."""

    @property
    def images(self) -> dict[str, str]:
        """The folder of each split's images, below the root."""
        return {"train": "cars_train", "test": "cars_test"} if self.devkit else {"train": "car_ims", "test": "car_ims"}


def find_release(
    matlab: set[tuple[str, ...]], inside: tuple[str, ...], folders: Iterable[tuple[str, ...]]
) -> CarsRelease | None:
    """Find a copy of Stanford Cars among a source's files.

    Args:
        matlab: paths of the .mat files, from the source down.
        inside: folders that only wrap the data: the copy may lie in any of them.
        folders: folders that hold images directly.
    """
    folders = list(folders)
    roots = [inside[:depth] for depth in range(len(inside) + 1)]
    for root in roots:
        if (*root, "devkit", _CLASSES) in matlab:
            return CarsRelease(root, (*root, "devkit"))
        if (*root, _FIRST_RELEASE) in matlab and any(
            folder[: len(root) + 1] == (*root, "car_ims") for folder in folders
        ):
            return CarsRelease(root, None)
    for root in roots:  # some copies wrap the devkit once more: car_devkit/devkit/
        for path in sorted(matlab):
            if len(path) == len(root) + 3 and path[: len(root)] == root and path[-2:] == ("devkit", _CLASSES):
                return CarsRelease(root, path[:-1])
    return None


def read_release(source: str, release: CarsRelease) -> tuple[dict[str, list[Annotation]], list[str]]:
    """Read the annotations of train and test, and the class names; labels of an unlabelled file are null.

    Raises:
        SchemaError: a file is not a MATLAB file, lacks its fields, or names a class that the release does not have.
        StorageError: a file cannot be read.
    """
    root = join(source, *release.root)
    if release.devkit is not None:
        return read_devkit(root, devkit=join(source, *release.devkit))
    uri = join(root, _FIRST_RELEASE)
    classes = [str(name) for name in _variable(uri, "class_names")]
    annotated: dict[str, list[Annotation]] = {"train": [], "test": []}
    for entry in _variable(uri, "annotations"):
        fields = entry if isinstance(entry, dict) else {}
        entry = {**fields, "fname": fields["relative_im_path"]} if "relative_im_path" in fields else fields
        split = "test" if str(fields.get("test", 0)) == "1" else "train"
        annotated[split].append(_annotation(entry, classes, uri))
    return annotated, classes


def read_devkit(source: str, *, devkit: str | None = None) -> tuple[dict[str, list[Annotation]], list[str]]:
    """Read a devkit's annotations of train and test, and the class names; labels of an unlabelled file are null.

    Raises:
        SchemaError: a file is not a MATLAB file, lacks its fields, or names a class that the devkit does not have.
        StorageError: a file cannot be read.
    """
    devkit = devkit or join(source, "devkit")
    classes = [str(name) for name in _variable(join(devkit, _CLASSES), "class_names")]
    files = {
        "train": [join(devkit, "cars_train_annos.mat")],
        # The labelled file was published separately, so it often lies beside the devkit.
        "test": [join(devkit, _LABELLED), join(source, _LABELLED), join(devkit, "cars_test_annos.mat")],
    }
    annotated: dict[str, list[Annotation]] = {"train": [], "test": []}
    for split, candidates in files.items():
        found = next((uri for uri in candidates if exists(uri)), None)
        if found is not None:
            annotated[split] = [_annotation(entry, classes, found) for entry in _variable(found, "annotations")]
    return annotated, classes


def _variable(uri: str, name: str) -> list[Any]:
    data = read_bytes(uri)
    try:
        values = read_variable(data, name)
    except ValueError as err:
        raise SchemaError(f"{uri} is not a MATLAB file of version 4 to 7.2 ({err}); fetch the devkit again.") from None
    if values is None:
        raise SchemaError(f"{uri} has no variable {name}; it is not part of a Stanford Cars devkit.")
    return values


def _annotation(entry: Any, classes: list[str], uri: str) -> Annotation:
    fields = entry if isinstance(entry, dict) else {}
    missing = [name for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "fname") if name not in fields]
    if missing:
        raise SchemaError(f"{uri} has annotations without {', '.join(missing)}; it is not a Stanford Cars devkit's.")
    # Some copies write a path before the name.
    name = str(fields["fname"]).rsplit("/", 1)[-1]
    try:
        x1, y1, x2, y2 = (int(fields[f"bbox_{corner}"]) for corner in ("x1", "y1", "x2", "y2"))
        index = int(fields["class"]) if "class" in fields else None
    except (ValueError, TypeError, OverflowError):
        raise SchemaError(f"{uri} gives {name!r} a box or a class that is no number; fetch it again.") from None
    if index is None:
        return name, None, (x1 - 1, y1 - 1, x2, y2)
    if not 1 <= index <= len(classes):
        raise SchemaError(f"{uri} gives {name} the class {index}; the devkit has classes 1 to {len(classes)}.")
    return name, classes[index - 1], (x1 - 1, y1 - 1, x2, y2)

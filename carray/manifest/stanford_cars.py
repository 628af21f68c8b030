"""Reads a copy of Stanford Cars: class names in index order, and each image's label, box and split.

They are in devkit/*.mat beside cars_train/ and cars_test/, or in the first release's cars_annos.mat beside car_ims/.
Their boxes are 1-based and inclusive; here they are 0-based with x2, y2 exclusive.
"""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from carray.core.errors import SchemaError
from carray.core.store.files import exists, join, read_bytes
from carray.core.uri_tables import BOX
from carray.manifest.candidates import Candidates, Source
from carray.manifest.folders import wrapping_folders
from carray.manifest.matlab import read_variable

__all__ = ["read_devkit", "read_stanford_cars"]

_LABELLED = "cars_test_annos_withlabels.mat"
_CLASSES = "cars_meta.mat"
_FIRST_RELEASE = "cars_annos.mat"


def read_stanford_cars(source: Source) -> Candidates | None:
    """Read the images of a copy of Stanford Cars with their annotations; None where the source holds no copy.

    Raises:
        SchemaError: a file is not a MATLAB file, lacks its fields, or names a class that the release does not have.
        StorageError: the source or a file cannot be read.
    """
    files = source.files.assign(name=source.files["uri"].str.rpartition("/")[2], label=None)
    copy = _find_copy(files)
    if copy is None:
        return None
    root, devkit = copy
    uri = join(source.uri, *root)
    listed, classes = read_devkit(uri, join(source.uri, *devkit)) if devkit else _read_first_release(uri)
    annotated = pd.DataFrame(listed, columns=["top", "name", "split", "label", *BOX], dtype=object)
    is_image = files["kind"] == "image"
    tops = files["folder"].str.removeprefix("".join(f"{name}/" for name in root)).str.partition("/")[0]
    images = files[is_image].drop(columns="label").assign(top=tops.where(tops.isin(annotated["top"])))
    # By name within the top folder: some copies hold cars_train/cars_train/.
    known = annotated.merge(images, how="left", on=["top", "name"])
    warnings = [
        f"{top}/ holds none of the {len(uris):,} annotated images of {split}"
        for (top, split), uris in known.groupby(["top", "split"], sort=False)["uri"]
        if uris.isna().all()
    ]
    known["uri"] = known["uri"].fillna(uri + "/" + known["top"] + "/" + known["name"])
    rows = pd.concat([known, images[~images["uri"].isin(known["uri"])]], ignore_index=True)
    rows = rows.sort_values("top", ascending=False, kind="stable", na_position="first", ignore_index=True)
    rows["folder"] = (rows["top"].fillna(rows["folder"]) + "/").replace("/", "the top folder")
    was_read = files["name"].str.fullmatch(r"cars_.*\.mat")
    return Candidates(
        source.uri,
        "stanford-cars",
        rows,
        classes,
        others=files[~is_image & ~was_read],
        inside="/".join(root),
        warnings=warnings,
    )


def _find_copy(files: pd.DataFrame) -> tuple[list[str], list[str]] | None:
    """Find the names of the folders down to a copy, and down to its devkit, which the first release has not."""
    matlab = files[files["kind"] == "skipped"]
    devkits = sorted(matlab.loc[matlab["name"] == _CLASSES, "folder"], key=len)
    firsts = set(matlab.loc[matlab["name"] == _FIRST_RELEASE, "folder"])
    folders = set(files.loc[files["kind"] == "image", "folder"])
    inside = wrapping_folders(files)
    for root in ([*inside[:depth]] for depth in range(len(inside) + 1)):
        below = "".join(f"{name}/" for name in root)
        for devkit in devkits:  # some copies wrap the devkit once more: car_devkit/devkit/
            if re.fullmatch(rf"{re.escape(below)}([^/]+/)?devkit", devkit):
                return root, devkit.split("/")
        if below.rstrip("/") in firsts and any(f"{folder}/".startswith(f"{below}car_ims/") for folder in folders):
            return root, []
    return None


def read_devkit(root: str, devkit: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Read a devkit's annotations of train and test, and the class names; labels of an unlabelled file are null.

    An annotation has top (the folder of the image), name (of its file), split, label and the box.

    Raises:
        SchemaError: a file is not a MATLAB file, lacks its fields, or names a class that the devkit does not have.
        StorageError: a file cannot be read.
    """
    classes = [str(name) for name in _variable(join(devkit, _CLASSES), "class_names")]
    # The labelled file was published separately, so it often lies beside the devkit.
    tests = [join(devkit, _LABELLED), join(root, _LABELLED), join(devkit, "cars_test_annos.mat")]
    rows: list[dict[str, Any]] = []
    for split, uris in (("train", [join(devkit, "cars_train_annos.mat")]), ("test", tests)):
        if uri := next((uri for uri in uris if exists(uri)), None):
            entries = _variable(uri, "annotations")
            rows += [{"top": f"cars_{split}", "split": split, **_annotation(entry, classes, uri)} for entry in entries]
    return rows, classes


def _read_first_release(root: str) -> tuple[list[dict[str, Any]], list[str]]:
    uri = join(root, _FIRST_RELEASE)
    classes = [str(name) for name in _variable(uri, "class_names")]
    entries = _variable(uri, "annotations")
    rows = [{"top": "car_ims", **_annotation(entry, classes, uri)} for entry in entries]
    splits = ["test" if str(entry.get("test")) == "1" else "train" for entry in entries]
    return [row | {"split": split} for row, split in zip(rows, splits, strict=True)], classes


def _variable(uri: str, name: str) -> list[Any]:
    try:
        values = read_variable(read_bytes(uri), name)
    except ValueError as err:
        raise SchemaError(f"{uri} is not a MATLAB file of version 4 to 7.2 ({err}); fetch the devkit again.") from None
    if values is None:
        raise SchemaError(f"{uri} has no variable {name}; it is not part of a Stanford Cars devkit.")
    return values


def _annotation(entry: Any, classes: list[str], uri: str) -> dict[str, Any]:
    """Read an image's file name, label and box."""
    fields = entry if isinstance(entry, dict) else {}
    fields = {"fname": fields.get("relative_im_path"), **fields} if "relative_im_path" in fields else fields
    missing = [name for name in (*(f"bbox_{corner}" for corner in BOX), "fname") if name not in fields]
    if missing:
        raise SchemaError(f"{uri} has annotations without {', '.join(missing)}; it is not a Stanford Cars devkit's.")
    # Some copies write a path before the name.
    name, label = str(fields["fname"]).rsplit("/", 1)[-1], None
    try:
        x1, y1, x2, y2 = (int(fields[f"bbox_{corner}"]) for corner in BOX)
        index = int(fields["class"]) if "class" in fields else None
    except (ValueError, TypeError, OverflowError):
        raise SchemaError(f"{uri} gives {name!r} a box or a class that is no number; fetch it again.") from None
    if index is not None:
        if not 1 <= index <= len(classes):
            raise SchemaError(f"{uri} gives {name} the class {index}; the devkit has classes 1 to {len(classes)}.")
        label = classes[index - 1]
    return {"name": name, "label": label, "x1": x1 - 1, "y1": y1 - 1, "x2": x2, "y2": y2}

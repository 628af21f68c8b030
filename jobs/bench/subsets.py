"""Cuts a manifest down to fewer images, for measurements that need not see all of them.

Invariants: no test image is kept unless so many are asked for; what is kept does not depend on anything drawn.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from carray.manifest.manifest_file import Manifest, read_manifest, write_manifest

__all__ = ["few_images", "first_classes", "share_of_images"]


def share_of_images(manifest: str, share: float, out: Path) -> Manifest:
    """Keep a share of each class's training and validation images, at least two and one of them."""
    source = read_manifest(manifest)
    rows = source.usable
    parts = []
    for (_, split), group in rows[rows["split"] != "test"].groupby(["label", "split"], sort=False):
        parts.append(group.head(max(2 if split == "train" else 1, round(share * len(group)))))
    return _write(source, pd.concat(parts), out)


def few_images(manifest: str, out: Path) -> Manifest:
    """Keep 8 training and 2 validation images of each of the first two classes."""
    return first_classes(manifest, 2, out, train=8, val=2)


def first_classes(manifest: str, classes: int, out: Path, *, train: int, val: int, test: int = 0) -> Manifest:
    """Keep so many images of each of the first classes."""
    source = read_manifest(manifest)
    kept = source.classes[:classes]
    rows = source.usable
    rows = rows[rows["label"].isin(kept)]
    parts = [
        group.head({"train": train, "val": val, "test": test}[str(split)])
        for (_, split), group in rows.groupby(["label", "split"], sort=False)
    ]
    return _write(source, pd.concat(parts), out, classes=kept)


def _write(source: Manifest, rows: pd.DataFrame, out: Path, classes: list[str] | None = None) -> Manifest:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(rows.sort_index(), str(out), classes=classes or source.classes, crop_boxes=source.crop_boxes)
    return read_manifest(str(out))

"""A source as the layouts read it, with the list of its files, and the images that a layout found in it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from urllib.parse import unquote_to_bytes

import pandas as pd

from carray.core.errors import SettingsError
from carray.core.store.files import is_s3
from carray.core.store.image_bytes import is_image_key
from carray.core.store.listing import ListedImage, list_keys
from carray.core.text import readable
from carray.core.uri_tables import BOX, TABLE_SUFFIXES
from carray.manifest.manifest_file import SPLITS

__all__ = ["CANDIDATE_TYPES", "Candidates", "Source", "count_text", "counts", "is_picture", "shown"]

SHOWN = 5

CANDIDATE_TYPES = {
    "uri": "string",
    "escaped": "bool",
    "label": "string",
    "split": "string",
    **dict.fromkeys(BOX, "Int32"),
    "folder": "string",
}
"""Columns of a source's images; `folder` says where to look for images without a label."""

FILE_COLUMNS = ["uri", "escaped", "folder", "kind", "what"]

_JUNK_NAMES = set(
    "__macosx thumbs.db ehthumbs.db desktop.ini @eadir $recycle.bin #recycle @recycle @tmp #snapshot lost+found "
    "__pycache__".split()
) | {"system volume information"}
"""Files of file managers, archives and network drives, in lower case; hidden names are junk, too."""
_TEXT_NAMES = set("readme license licence copying changelog makefile _success".split())
_NO_PICTURES = _TEXT_NAMES | set(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .ini .cfg .md .rst .html .htm .pdf .mat .parquet .db .log .py "
    ".ipynb .sh .names .lst .url .md5 .sha256".split()
)
"""Names and suffixes of files that hold no picture."""


@dataclass(frozen=True)
class Source:
    """A source, and what was asked about it."""

    uri: str
    layout: str = "auto"
    label_from: str = "auto"
    column: Mapping[str, str] = field(default_factory=dict)
    """A table's own column names."""
    crop_boxes: bool = False

    @cached_property
    def files(self) -> pd.DataFrame:
        """The files below a folder or prefix: columns uri, escaped, folder, kind and what.

        `folder` is relative to the source, names joined by `/`; `kind` is image, skipped (no image by its name), left
        out (hidden, or left by tools) or folder (empty); `what` is the suffix of a skipped file, or the name left out.

        Raises:
            SettingsError: the source is a file, or columns are named.
            StorageError: the source does not exist or cannot be read.
        """
        if self.column:
            raise SettingsError(f"column is {dict(self.column)}, but {self.uri} is no table; leave it out.")
        if not is_s3(self.uri) and os.path.isfile(self.uri):
            raise SettingsError(
                f"{self.uri} is a file, but layout {self.layout} needs a folder; give a folder, or a table ending in "
                f"{', '.join(TABLE_SUFFIXES)}."
            )
        files = [(file.uri, file.escaped, *_sort_file(file, self.uri)) for file in list_keys(self.uri)]
        return pd.DataFrame(files + _empty_folders(self.uri), columns=FILE_COLUMNS)


@dataclass(frozen=True)
class Candidates:
    """A source's images, before any was read."""

    source: str
    layout: str
    rows: pd.DataFrame
    """An image a row; `list_candidates` adds those of CANDIDATE_TYPES that a layout does not give."""
    classes: list[str] = field(default_factory=list)
    """Class names in a given order, else sorted."""
    others: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=[*FILE_COLUMNS, "label"]))
    """The files that are not among the images, as `Source.files`, with the label that their folder names."""
    boxes_left_out: str | None = None
    """Why a table's boxes, if they are not needed, were not read."""
    inside: str = ""
    """The folders that only wrap the data, joined by `/`."""
    warnings: list[str] = field(default_factory=list)
    """What looks wrong in the layout, or was left out, a sentence each."""
    label_changes: dict[str, int] = field(default_factory=dict)
    """Counts of normalised labels, by what changed: blank (no label at all), blanks, unicode form."""

    @property
    def skipped(self) -> dict[str, int]:
        """Counts of files that are no images by name, by suffix."""
        return counts(self.others.loc[self.others["kind"] == "skipped", "what"])

    @property
    def left_out(self) -> dict[str, int]:
        """Counts of hidden files, tools' files and masks, by name."""
        return counts(self.others.loc[self.others["kind"] == "left out", "what"])

    @property
    def unlabelled_in(self) -> dict[str, int]:
        """Counts of images without a label, by folder."""
        return counts(self.rows.loc[self.rows["label"].isna(), "folder"])

    def text(self) -> str:
        """Format how the source was read, several lines."""
        given, labels = self.rows["split"].value_counts(), self.rows["label"].value_counts()
        classes = [f"{readable(name)} {labels.get(name, 0):,}" for name in self.classes[:SHOWN]]
        more = f" and {len(self.classes) - SHOWN:,} more" if len(self.classes) > SHOWN else ""
        lines = {
            "inside": f"{readable(self.inside)}/" if self.inside else "",
            "splits": ", ".join(f"{split} {given[split]:,}" for split in SPLITS if split in given) or "none given",
            "classes": f"{len(self.classes):,}: {', '.join(classes)}{more}" if classes else "none",
            "no label": count_text(self.unlabelled_in),
            "skipped": f"{count_text(self.skipped)} (not images by name)" if self.skipped else "",
            "left out": f"{count_text(self.left_out)} (hidden, left by tools, or masks)" if self.left_out else "",
        }
        told = [f"{self.source}: {len(self.rows):,} images, read as layout {self.layout}"]
        told += [f"  {name:<12} {text}" for name, text in lines.items() if text]
        told += [f"  look at      {warning}" for warning in self.warnings]
        if self.layout != "table":
            told.append("  If this is not what you mean: --layout and --label-from (carray prepare --help).")
        return "\n".join(told)


def is_picture(what: str) -> bool:
    """Check whether a skipped file may be a picture, by its suffix as in `Source.files`."""
    return what not in _NO_PICTURES


def counts(texts: pd.Series) -> dict[str, int]:
    """Count how often each text occurs."""
    return {str(text): int(count) for text, count in texts.value_counts().items()}


def count_text(numbers: Mapping[str, int]) -> str:
    """Format the largest counts, by name, for a sentence."""
    ordered = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f" and {len(ordered) - SHOWN:,} more" if len(ordered) > SHOWN else ""
    return ", ".join(f"{shown([name])} {count:,}" for name, count in ordered[:SHOWN]) + more


def shown(names: Iterable[str]) -> str:
    """Format the first SHOWN names, for a sentence."""
    names = list(names)
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(readable(name) if name == name.strip() else repr(name) for name in names[:SHOWN]) + more


def _sort_file(file: ListedImage, source: str) -> tuple[str, str, str]:
    """Determine a file's folder, kind and what, as in `Source.files`."""
    parts = _relative_path(file, source) or [""]
    *folders, name = parts
    junk = next((depth for depth, part in enumerate(parts) if _is_junk(part)), None)
    if junk == len(folders) and is_image_key(name) and not name.startswith("._"):
        return "/".join(folders), "skipped", f"hidden {_suffix(name)}"  # may be a photograph
    if junk is not None:
        return "/".join(folders[:junk]), "left out", "._*" if parts[junk].startswith("._") else parts[junk]
    if is_image_key(file.uri):
        return "/".join(folders), "image", ""
    if file.uri.endswith("/") and not file.size_bytes:  # an empty folder on S3
        return "/".join(parts), "folder", ""
    return "/".join(folders), "skipped", _suffix(name)


def _relative_path(file: ListedImage, source: str) -> list[str]:
    """List the folders below the source and the name, without the empty ones of `//`."""
    parts = [part for part in file.uri.split("/")[len(source.rstrip("/").split("/")) :] if part]
    return [_unescape(part) for part in parts] if file.escaped else parts


def _unescape(part: str) -> str:
    # An escaped image's whole path is escaped, also those folders that are valid UTF-8.
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        return part


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _JUNK_NAMES or name.endswith("_$folder$")


def _suffix(name: str) -> str:
    """Extract a name's suffix in lower case, or the whole name of README and the like."""
    _stem, dot, suffix = name.lower().rpartition(".")
    return f".{suffix}" if dot else suffix if suffix in _TEXT_NAMES else "(none)"


def _empty_folders(source: str) -> list[tuple[str, bool, str, str, str]]:
    found = []
    for path, folders, names in [] if is_s3(source) else os.walk(source):
        folders[:] = [name for name in folders if not _is_junk(name)]
        if not folders and not names:
            below = os.path.relpath(path, source).removeprefix(".")
            # Arrow's strings hold no name that is not UTF-8.
            found.append((source, False, below.encode(errors="backslashreplace").decode(), "folder", ""))
    return found

"""Lists images from outside: those that a bundle was never meant for, on which its doubt is measured.

From: a folder or prefix, or a Parquet table. To: rows of uri, escaped, kind and source.
Invariants: kinds are told apart by a table only, since a folder's names were not chosen for it; without a column
`source` every image is one of its own.

    uri      an image; relative to the table where it is neither absolute nor s3://
    kind     what sort of outside it is, such as photographs; optional, at most MOST_KINDS different ones
    source   the photograph that the image is, or is a tile of; optional
"""

from __future__ import annotations

import hashlib

import pandas as pd
import pyarrow as pa

from carray.core.errors import SchemaError, SettingsError
from carray.core.images import is_image_key
from carray.core.listing import list_keys
from carray.core.storage import absolute, is_s3, join
from carray.core.tables import read_table

__all__ = ["INSIDE", "MOST_KINDS", "list_outside", "outside_fingerprint"]

INSIDE, OUTSIDE = "inside", "outside"
MOST_KINDS = 6
_COLUMNS = ["uri", "escaped", "kind", "source"]


def list_outside(place: str) -> pd.DataFrame:
    """List outside images: columns uri, escaped, kind and source, without nulls, in the place's order.

    Raises:
        SchemaError: there is no image, the table lacks `uri`, or its kinds are too many or named `inside`.
        SettingsError: a table of another format than Parquet, or with credentials in a uri.
        StorageError: the place does not exist or cannot be read.
    """
    place = absolute(place)
    if place.lower().endswith((".csv", ".tsv")):
        raise SettingsError(f"--outside is {place}; give a folder, or a table in Parquet.")
    rows = _from_table(place) if place.lower().endswith(".parquet") else _from_folder(place)
    if rows.empty:
        raise SchemaError(f"{place} holds no image; give --outside a folder of images that show what is outside.")
    kinds = sorted(set(rows["kind"]))
    if len(kinds) > MOST_KINDS or INSIDE in kinds:
        raise SchemaError(
            f"{place} has {len(kinds)} kinds of outside images ({', '.join(map(repr, kinds[: MOST_KINDS + 1]))}); at "
            f"most {MOST_KINDS} are measured apart, and none may be named {INSIDE!r}."
        )
    return rows


def outside_fingerprint(rows: pd.DataFrame) -> str:
    """Hash which images are outside, and of what kind and source: 16 hex digits."""
    lines = sorted("|".join(map(str, row)) for row in rows[_COLUMNS].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _from_folder(place: str) -> pd.DataFrame:
    found = [image for image in list_keys(place) if is_image_key(image.uri)]
    rows = [{"uri": image.uri, "escaped": image.escaped, "kind": OUTSIDE, "source": image.uri} for image in found]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _from_table(place: str) -> pd.DataFrame:
    table = read_table(place, kind="table of outside images", required=["uri"])
    columns: dict[str, list[str | None]] = {name: [None] * len(table) for name in ("kind", "source")}
    given = [name for name in ("uri", "kind", "source") if name in table.schema.names]
    columns |= {name: table[name].cast(pa.string()).to_pylist() for name in given}
    missing = sum(uri is None for uri in columns["uri"])
    if missing:
        raise SchemaError(f"{place} has {missing} rows without a uri; leave them out.")
    folder, rows = place.rsplit("/", 1)[0], []
    for uri, kind, source in zip(map(str, columns["uri"]), columns["kind"], columns["source"], strict=True):
        uri = absolute(uri) if is_s3(uri) or uri.startswith("/") else join(folder, uri)
        rows.append({"uri": uri, "escaped": False, "kind": kind or OUTSIDE, "source": source or uri})
    return pd.DataFrame(rows, columns=_COLUMNS)

"""Measures how well `ood_score` tells images from outside, which a bundle was never meant for, from those of a split.

From: rows of a manifest's split, and a folder or prefix, or a Parquet table, of outside images. To: by kind of outside
images the AUROC, which is the probability that one of them has a higher `ood_score` than an image of the split.
Invariants: inside and outside images take the same path to pixels, boxes apart, which outside images have not; kinds
are told apart by a table only, since a folder's names were not chosen for it, and are measured apart, since a pooled
figure says only how they were mixed; tiles of one photograph are one draw of the bootstrap, not many.

    uri      an image; relative to the table where it is neither absolute nor s3://
    kind     what sort of outside it is, such as photographs; optional, at most MOST_KINDS different ones
    source   the photograph that the image is, or is a tile of; optional, else each image is one of its own
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from carray.bundle.scorer import Scorer, centred_energy
from carray.core.errors import BudgetError, SchemaError, SettingsError
from carray.core.store.files import absolute
from carray.core.store.image_bytes import is_image_key
from carray.core.store.listing import list_keys
from carray.core.tables import table_metadata
from carray.core.uri_tables import UriTable
from carray.evaluation.read_images import Row, read_batches, score_pixels
from carray.manifest.manifest_file import read_row

__all__ = ["list_outside", "measure_outside", "outside_fingerprint"]

OUTSIDE = "outside"
"""The kind of images whose kind no table says."""
MOST_KINDS = 6
FEWEST_SOURCES = 5
"""Of outside images, below which an interval would claim what cannot be known, and is null."""
RESAMPLES = 2000
_COLUMNS = ["uri", "escaped", "kind", "source"]
_KIND = "table of outside images"

Values = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


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
    if len(kinds) > MOST_KINDS:
        raise SchemaError(
            f"{place} has {len(kinds)} kinds of outside images ({', '.join(map(repr, kinds[: MOST_KINDS + 1]))}); at "
            f"most {MOST_KINDS} are measured apart."
        )
    return rows


def outside_fingerprint(rows: pd.DataFrame) -> str:
    """Hash which images are outside, and of what kind and source: 16 hex digits."""
    lines = sorted("|".join(map(str, row)) for row in rows[_COLUMNS].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def measure_outside(rows: Sequence[Row], outside: pd.DataFrame, scorer: Scorer, *, seed: int) -> dict[str, Any]:
    """Give the number of images inside, and by kind of outside images their numbers and the AUROC of `ood_score`.

    Args:
        rows: Of a manifest's split, the inside images.
        outside: Rows as from `list_outside`.
        scorer: The bundle's.
        seed: Of the bootstrap.

    Raises:
        BudgetError: no image of the split, or none from outside, can be read.
    """
    inside_N = _ood_scores(rows, scorer, what="scoring inside")
    inside_N = inside_N[~np.isnan(inside_N)]
    scored = outside.assign(score=_ood_scores(outside.to_dict("records"), scorer, what="scoring outside"))
    kinds = {}
    for kind, own in scored.groupby("kind", sort=False):
        read = own.dropna(subset="score")
        found: dict[str, Any] = dict.fromkeys(("auroc", "auroc_low", "auroc_high"))
        if len(read):
            wins_NM = pairwise_wins(inside_N, read["score"].to_numpy(np.float64))
            low, high = auroc_interval(wins_NM, read["source"].tolist(), seed=seed)
            found = {"auroc": float(wins_NM.mean()), "auroc_low": low, "auroc_high": high}
        kinds[str(kind)] = {"images": len(own), "scored": len(read), "sources": read["source"].nunique(), **found}
    return {"inside_images": len(inside_N), "inside_unreadable": len(rows) - len(inside_N), "kinds": kinds}


def pairwise_wins(inside_N: Values, outside_M: Values) -> Floats:
    """Say of each pair whether the outside image scores higher: 1, 0, or 0.5 for a tie, float32 (N, M).

    Their mean is the area under the ROC curve (Bamber, 'The area above the ordinal dominance graph', 1975).
    """
    higher_NM = outside_M[None, :] > inside_N[:, None]
    equal_NM = outside_M[None, :] == inside_N[:, None]
    return higher_NM.astype(np.float32) + 0.5 * equal_NM.astype(np.float32)


def auroc_interval(
    wins_NM: Floats, sources: Sequence[str], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """Give the 95 % percentile interval of the AUROC; nulls with fewer than FEWEST_SOURCES sources.

    Inside images are drawn with replacement, and so are outside sources, each with all of its images (Field and Welsh,
    'Bootstrapping clustered data', 2007).
    """
    names, source_M = np.unique(np.array(sources, dtype=object), return_inverse=True)
    if len(names) < FEWEST_SOURCES:
        return None, None
    random = np.random.default_rng(seed)
    images = len(wins_NM)
    # Every resample is a weight for each image or source, so no pair is compared again.
    inside_RN = random.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float32)
    outside_RS = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    outside_RM = outside_RS[:, source_M].astype(np.float32)
    means_RM = inside_RN @ wins_NM / images
    areas_R = (means_RM * outside_RM).sum(axis=1) / outside_RM.sum(axis=1)
    low, high = np.quantile(areas_R, [0.025, 0.975])
    return float(low), float(high)


def _ood_scores(rows: Sequence[Row], scorer: Scorer, *, what: str) -> Values:
    """Compute `ood_score` of each row, NaN where its image cannot be read.

    Raises:
        BudgetError: none can be read.
    """
    found: list[float] = []
    failed: Counter[str] = Counter()
    read = partial(read_row, settings=scorer.info.pixels, crop_boxes=scorer.info.uses_boxes, as_input=True)
    for batch in read_batches(rows, read, what=what):
        logits_BK, _ = score_pixels(scorer, [one.pixels_HWC for _, one in batch if one.pixels_HWC is not None])
        scores = iter(centred_energy(logits_BK, temperature=scorer.info.temperature).tolist())
        found += [np.nan if one.error_code else next(scores) for _, one in batch]
        failed.update(one.error_code for _, one in batch if one.error_code)
    if failed.total() == len(rows):
        codes = ", ".join(f"{count} {code}" for code, count in failed.items())
        raise BudgetError(f"{what}: no image can be read ({codes}), the first is {rows[0]['uri']}; look where it lies.")
    return np.array(found, dtype=np.float64)


def _from_folder(place: str) -> pd.DataFrame:
    found = [image for image in list_keys(place) if is_image_key(image.uri)]
    rows = [{"uri": image.uri, "escaped": image.escaped, "kind": OUTSIDE, "source": image.uri} for image in found]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _from_table(uri: str) -> pd.DataFrame:
    found = table_metadata(uri).get("kind", _KIND)
    if found != _KIND:
        raise SchemaError(f"{uri} is a table of {found}, but a {_KIND} is needed here.")
    table, rows = UriTable(uri, hints=("kind", "source"), option=False), []
    for batch in table.batches():
        nothing = pa.nulls(len(batch), pa.string())
        kinds, sources = (
            batch.hint(name, pa.string()) if name in table.columns else nothing for name in ("kind", "source")
        )
        for image, kind, source in zip(*(values.to_pylist() for values in (batch.uris(), kinds, sources)), strict=True):
            rows.append({"uri": image, "escaped": False, "kind": kind or OUTSIDE, "source": source or image})
    return pd.DataFrame(rows, columns=_COLUMNS)

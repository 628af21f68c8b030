"""Measures how well `ood_score` separates outside images (which show no class of the bundle) from those of a split.

The figure is the AUROC: the probability that an outside image has a higher `ood_score` than one of the split. It is
measured for each kind of outside images, since a pooled figure would depend on their mix. Outside images are a folder,
a prefix, or a Parquet table:

    uri      an image; relative to the table if it is neither absolute nor s3://
    kind     what it shows, such as photographs; optional, at most MOST_KINDS different ones
    source   the photograph that the image is, or is a tile of; optional, by default each image is its own

Tiles of one source are drawn together by the bootstrap.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
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
from carray.evaluation.score import Row, score_rows

__all__ = ["list_outside", "measure_outside", "outside_fingerprint"]

OUTSIDE = "outside"
"""The kind of images without a given kind."""
MOST_KINDS = 6
FEWEST_SOURCES = 5
"""With fewer sources of outside images the interval is null."""
RESAMPLES = 2000
_COLUMNS = ["uri", "escaped", "kind", "source"]
_KIND = "table of outside images"

Values = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]


def list_outside(uri: str) -> pd.DataFrame:
    """List outside images: columns uri, escaped, kind and source, without nulls, in the order of the folder or table.

    Raises:
        SchemaError: there is no image, the table lacks `uri`, or its kinds are too many or named `inside`.
        SettingsError: a table of another format than Parquet, or with credentials in a uri.
        StorageError: it does not exist or cannot be read.
    """
    uri = absolute(uri)
    if uri.lower().endswith((".csv", ".tsv")):
        raise SettingsError(f"--outside is {uri}; give a folder, or a table in Parquet.")
    if uri.lower().endswith(".parquet"):
        found = _from_table(uri)
    else:
        images = [image for image in list_keys(uri) if is_image_key(image.uri)]
        found = [(image.uri, image.escaped, OUTSIDE, image.uri) for image in images]
    rows = pd.DataFrame(found, columns=_COLUMNS)
    if rows.empty:
        raise SchemaError(f"{uri} holds no image; give --outside a folder of images that show no class of the bundle.")
    kinds = sorted(set(rows["kind"]))
    if len(kinds) > MOST_KINDS:
        raise SchemaError(
            f"{uri} has {len(kinds)} kinds of outside images ({', '.join(map(repr, kinds[: MOST_KINDS + 1]))}); at "
            f"most {MOST_KINDS} are allowed."
        )
    return rows


def outside_fingerprint(rows: pd.DataFrame) -> str:
    """Hash the outside images with their kinds and sources: 16 hex digits."""
    lines = sorted("|".join(map(str, row)) for row in rows[_COLUMNS].itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def measure_outside(rows: Sequence[Row], outside: pd.DataFrame, scorer: Scorer, *, seed: int) -> dict[str, Any]:
    """Measure the AUROC of `ood_score` by kind of outside images (`list_outside`) beside a split's rows, the inside.

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
    """Compare each pair: 1 if the outside image scores higher, 0 if lower, 0.5 for a tie; float32 (N, M).

    Their mean is the area under the ROC curve (Bamber, 'The area above the ordinal dominance graph', 1975).
    """
    return ((np.sign(outside_M[None, :] - inside_N[:, None]) + 1) / 2).astype(np.float32)


def auroc_interval(
    wins_NM: Floats, sources: Sequence[str], *, seed: int, resamples: int = RESAMPLES
) -> tuple[float | None, float | None]:
    """Compute the 95 % percentile interval of the AUROC; null with fewer than FEWEST_SOURCES sources.

    Inside images and outside sources, with all their images, are drawn with replacement (Field and Welsh,
    'Bootstrapping clustered data', 2007).
    """
    names, source_M = np.unique(np.array(sources, dtype=object), return_inverse=True)
    if len(names) < FEWEST_SOURCES:
        return None, None
    random = np.random.default_rng(seed)
    images = len(wins_NM)
    # A resample is a weight for each image or source, so pairs are compared only once.
    inside_RN = random.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float32)
    outside_RS = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    outside_RM = outside_RS[:, source_M].astype(np.float32)
    means_RM = inside_RN @ wins_NM / images
    areas_R = (means_RM * outside_RM).sum(axis=1) / outside_RM.sum(axis=1)
    low, high = np.quantile(areas_R, [0.025, 0.975])
    return float(low), float(high)


def _ood_scores(rows: Sequence[Row], scorer: Scorer, *, what: str) -> Values:
    """Compute `ood_score` of each row, NaN if its image cannot be read.

    Raises:
        BudgetError: none can be read.
    """
    reads, (logits_NK,) = score_rows(rows, scorer, what=what)
    if not len(logits_NK):
        codes = ", ".join(f"{count} {code}" for code, count in Counter(one.error_code for one in reads).items())
        raise BudgetError(
            f"{what}: no image can be read ({codes}), the first is {rows[0]['uri']}; check that it exists."
        )
    scores_N = np.full(len(rows), np.nan)
    scores_N[[one.status == "ok" for one in reads]] = centred_energy(logits_NK, temperature=scorer.info.temperature)
    return scores_N


def _from_table(uri: str) -> list[tuple[str, bool, str, str]]:
    """Read a table's uri, escaped, kind and source, without nulls."""
    found = table_metadata(uri).get("kind", _KIND)
    if found != _KIND:
        raise SchemaError(f"{uri} is a table of {found}, but a {_KIND} is needed here.")
    table, rows = UriTable(uri, hints=("kind", "source"), option=False), []
    for batch in table.batches():
        kinds, sources = (
            batch.hint(name, pa.string()).to_pylist() if name in table.columns else [None] * len(batch)
            for name in ("kind", "source")
        )
        for image, kind, source in zip(batch.uris().to_pylist(), kinds, sources, strict=True):
            rows.append((image, False, kind or OUTSIDE, source or image))
    return rows

"""Counts predictions for a bucket's page, and chooses the few hundred rows that it shows.

DuckDB counts in the Parquet files and spills to disk; only rows that are shown are loaded. The same predictions, seed
and number give the same rows in the same order, whatever the files. Costs a read of the counted columns for each count;
for each reason to choose, one of `uri` and a few narrow columns; then the chosen rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import pandas as pd

from carray.queries import UNCERTAIN_SCORE, query, read_predictions
from carray.queries.questions import count_by

__all__ = [
    "BINS",
    "GROUP_MEMBERS",
    "MOST_FAILED",
    "PICKS",
    "SHOWN",
    "Duplicates",
    "Tallies",
    "choose",
    "count",
    "count_duplicates",
    "count_folders",
]

BINS = 50
"""Of the score histogram, each 0.02 wide."""

_FEWEST_FOLDERS, _MOST_FOLDERS, _DEEPEST = 8, 1000, 3
"""Folders are counted one level deeper while there are few of them, such as years above days."""
SHOWN_FOLDERS = 200

_BITS = "bit_count(phash) BETWEEN 8 AND 56"
"""Hashes with fewer bits set or unset come from flat images (a wall, a gradient) and mean nothing: results/LOG.md."""

NAMES = ("make", "body", "year", "label")


@dataclass(frozen=True, slots=True)
class Tallies:
    """Counts of all rows; the frames have the columns named here, the most frequent first."""

    rows: int
    scored: int
    mean_score: float | None
    uncertain: int
    """Scored rows below UNCERTAIN_SCORE."""
    judged: int
    """Scored rows that were compared with a threshold."""
    accepted: int
    flat: int
    """Images with meaningless hashes, which are left out of the duplicates."""
    last_scored_at: pd.Timestamp | None
    base: str
    """The deepest folder, with its slash, that holds every image."""
    errors: pd.DataFrame
    """status, error_code, images, example (the first uri)."""
    names: dict[str, pd.DataFrame]
    """Of make, body, year and label: name, images, mean_score, uncertain; scored rows whose name is known."""
    bins: pd.DataFrame
    """bin (0..BINS - 1), accept, images."""

    @property
    def failed(self) -> int:
        """The rows without a prediction."""
        return self.rows - self.scored


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Groups of images with the same perceptual hash, the largest first."""

    groups: int
    images: int
    """Images in all groups."""
    table: pd.DataFrame
    """phash, images, labels (how many different ones)."""


def count(path: str) -> Tallies:
    """Count all rows.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    [total] = query(
        path,
        f"""
        SELECT count(*) AS rows, count(*) FILTER (status = 'ok') AS scored, avg(score) AS mean_score,
               count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain, count(accept) AS judged,
               count(*) FILTER (accept) AS accepted, count(*) FILTER (NOT {_BITS}) AS flat,
               max(scored_at) AS last_scored_at, min(uri) AS first_uri, max(uri) AS last_uri
        FROM predictions
        """,
    ).to_dict("records")
    known: dict[str, Any] = {str(name): None if pd.isna(value) else value for name, value in total.items()}
    base = _common_folder(known.pop("first_uri"), known.pop("last_uri"))
    errors = query(
        path,
        "SELECT status, error_code, count(*) AS images, min(uri) AS example FROM predictions WHERE status <> 'ok' "
        "GROUP BY ALL ORDER BY images DESC, status, error_code",
    )
    bins = query(
        path,
        f"SELECT least(floor(score * {BINS}), {BINS - 1})::INTEGER AS bin, accept, count(*) AS images FROM predictions "
        "WHERE score IS NOT NULL GROUP BY ALL ORDER BY ALL",
    )
    names = {name: _named(path, name) for name in NAMES}
    return Tallies(**known, base=base, errors=errors, names=names, bins=bins)


def _named(path: str, column: str) -> pd.DataFrame:
    known = count_by(path, column).dropna(subset=column).rename(columns={column: "name"})
    return known.reset_index(drop=True)


def _common_folder(first: str | None, last: str | None) -> str:
    """Return the deepest folder of all images: what the first and the last uri in order share, all share."""
    if not isinstance(first, str) or not isinstance(last, str):
        return ""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: first.rfind("/", 0, sum(1 for _ in alike)) + 1]


def count_folders(path: str, base: str) -> tuple[pd.DataFrame, int]:
    """Count failures and scores of each folder below `base`, one level deep, or up to three where those are few.

    Returns:
        The first SHOWN_FOLDERS of them, the most failures first, then the lowest scores: folder (null for images
        directly in `base`), images, failed, mean_score, uncertain; and how many folders there are.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    found, total = _folders_at(path, base, 1)
    for depth in range(2, _DEEPEST + 1):
        if not 1 < total < _FEWEST_FOLDERS:
            break
        deeper, more = _folders_at(path, base, depth)
        if not total < more <= _MOST_FOLDERS:
            break
        found, total = deeper, more
    return found, total


def _folders_at(path: str, base: str, depth: int) -> tuple[pd.DataFrame, int]:
    table = query(
        path,
        f"""
        WITH split AS NOT MATERIALIZED (
            SELECT string_split(substr(uri, {len(base) + 1}), '/') AS parts, status, score FROM predictions
        ), folders AS NOT MATERIALIZED (
            SELECT array_to_string(list_slice(parts, 1, least({depth}, len(parts) - 1)), '/') AS name,
                   len(parts) = 1 AS direct, count(*) AS images, count(*) FILTER (status <> 'ok') AS failed,
                   avg(score) AS mean_score, count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain
            FROM split GROUP BY ALL
        )
        SELECT CASE WHEN NOT direct THEN name END AS folder, images, failed, mean_score, uncertain,
               count(*) OVER () AS total
        FROM folders ORDER BY failed DESC, mean_score, folder LIMIT {SHOWN_FOLDERS}
        """,
    )
    return table.drop(columns="total"), int(table["total"].max()) if len(table) else 0


def count_duplicates(path: str, *, most: int) -> Duplicates:
    """Find images that share their perceptual hash with another, and the `most` largest groups of them.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    found = query(
        path,
        f"""
        WITH hashes AS NOT MATERIALIZED (
            SELECT phash, count(*) AS images FROM predictions WHERE {_BITS} GROUP BY phash HAVING count(*) > 1
        ), largest AS (
            SELECT phash, images, count(*) OVER () AS groups, sum(images) OVER () AS in_groups
            FROM hashes ORDER BY images DESC, phash LIMIT {most}
        ), labelled AS NOT MATERIALIZED (
            SELECT phash, count(DISTINCT label) AS labels FROM predictions
            WHERE phash IN (SELECT phash FROM largest) GROUP BY phash
        )
        SELECT phash, images, labels, groups, in_groups FROM largest JOIN labelled USING (phash)
        ORDER BY images DESC, phash
        """,
    )
    groups, in_groups = (int(found[name].iloc[0]) if len(found) else 0 for name in ("groups", "in_groups"))
    return Duplicates(groups, in_groups, found[["phash", "images", "labels"]])


PICKS = {
    "least": "least certain",
    "most": "most certain of its class",
    "random": "random",
    "failed": "failed",
    "duplicate": "near duplicates",
}
"""Reasons to show a row, in the page's order."""

GROUP_MEMBERS = 4
"""Of a group of near duplicates."""
MOST_FAILED = 60
_MOST_CLASSES, _MOST_OF_CLASS = 40, 6

SHOWN = (
    *("uri", "etag", "size_bytes", "width", "height", "status", "error_code", "error", "label", "score", "margin"),
    *("top5_labels", "top5_scores", "make", "phash", "runtime", "run_id", "bundle_id"),
)


def choose(path: str, tallies: Tallies, duplicates: Duplicates, *, images: int, seed: int) -> pd.DataFrame:
    """Choose at most `images` scored rows, and at most MOST_FAILED failed ones.

    `seed` decides the random ones, and the order of ties. A row with two reasons counts twice.

    Returns:
        The rows by reason, with the column `picks`, a list of keys of PICKS.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    parts = _parts(tallies, duplicates, images)
    if not parts:
        return pd.DataFrame(columns=[*SHOWN, "picks"])
    chosen = query(path, "\nUNION ALL\n".join(_sql(pick, seed=seed, **part) for pick, part in parts.items()))
    rows = read_predictions(path, SHOWN, [("uri", "in", sorted(set(chosen["uri"])))])
    return _joined(chosen, rows)


def _parts(tallies: Tallies, duplicates: Duplicates, images: int) -> dict[str, dict[str, Any]]:
    """Divide the images among the reasons: the least certain and the random ones get most, about 2 in 7 each."""
    parts: dict[str, dict[str, Any]] = {}
    groups = duplicates.table["phash"].tolist()[: images // (6 * GROUP_MEMBERS)]
    classes = min(len(tallies.names["label"]), _MOST_CLASSES, images // 4)
    of_class = min(_MOST_OF_CLASS, images // 4 // classes) if classes else 0
    rest = images - classes * of_class - len(groups) * GROUP_MEMBERS
    scored, failed = "status = 'ok'", "status <> 'ok'"
    if tallies.scored:
        parts["least"] = {"order": "margin", "where": scored, "most": rest - rest // 2}
        parts["random"] = {"order": "0", "where": scored, "most": rest // 2}
    if of_class:
        by_frequency = f"GROUP BY label ORDER BY count(*) DESC, label LIMIT {classes}"
        where = f"{scored} AND label IN (SELECT label FROM predictions WHERE {scored} {by_frequency})"
        parts["most"] = {"order": "-score", "where": where, "most": of_class, "each": "label"}
    if tallies.failed:
        most = max(1, MOST_FAILED // len(tallies.errors))
        parts["failed"] = {"order": "0", "where": failed, "most": most, "each": "status, error_code"}
    if groups:
        where = f"phash IN ({', '.join(str(int(phash)) for phash in groups)})"
        parts["duplicate"] = {"order": "phash", "where": where, "most": GROUP_MEMBERS, "each": "phash"}
    return {pick: parts[pick] for pick in PICKS if pick in parts and parts[pick]["most"]}


def _sql(pick: str, *, order: str, where: str, most: int, seed: int, each: str = "true") -> str:
    """Select the first `most` rows of each group, with a heap a group: a window would sort the whole table."""
    key = f"struct_pack(first := {order}, tie := hash(uri, {seed}), uri := uri, score := score)"
    return (
        f"SELECT '{pick}' AS pick, chosen.uri AS uri, chosen.score AS score, chosen.first::DOUBLE AS first, "
        f"chosen.tie AS tie FROM (SELECT unnest(min({key}, {most})) AS chosen FROM predictions WHERE {where} "
        f"GROUP BY {each})"
    )


def _joined(chosen: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Sort the whole rows as chosen; rows of a uri with several boxes are told apart by score."""
    chosen = chosen.assign(reason=chosen["pick"].map(list(PICKS).index))
    chosen = chosen.sort_values(["reason", "first", "tie", "uri"], kind="stable")
    keys = ["uri", "score"]
    picks = chosen.drop_duplicates([*keys, "pick"]).groupby(keys, dropna=False, sort=False)["pick"].agg(list)
    return picks.rename("picks").reset_index().merge(rows.drop_duplicates(keys), on=keys, how="inner")

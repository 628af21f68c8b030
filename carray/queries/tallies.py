"""Counts predictions for a report, and chooses the few hundred rows that it shows one by one.

From: a folder of predictions. To: counts by status, error, make, body, year, label, score and folder, the groups of
images that share a perceptual hash, and a frame of rows with the reasons why each was chosen.
Invariants: rows are aggregated where they lie (DuckDB over Parquet) and never loaded, but those that are shown; what
does not fit into memory DuckDB puts on disk. The same predictions, seed and number give the same rows, in the same
order, however the files are cut. Names are untrusted text.
Cost: one pass over each column that is counted, up to four over `uri` and two over `phash`; one over `uri` and a few
narrow columns for each reason, then the files that hold a chosen row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import pandas as pd

from carray.queries import UNCERTAIN_SCORE, query, read_predictions

__all__ = [
    "BINS",
    "GROUP_MEMBERS",
    "MOST_FAILED",
    "PICKS",
    "SHOWN",
    "Duplicates",
    "Folders",
    "Tallies",
    "choose",
    "count",
    "count_duplicates",
    "count_folders",
]

BINS = 50
"""Of the score histogram, each 0.02 wide."""

_FEWEST_FOLDERS, _MOST_FOLDERS, _DEEPEST = 8, 1000, 3
"""Folders are taken a level deeper while there are few of them, as years are above days, and as long as it helps."""
SHOWN_FOLDERS = 200

_BITS = "bit_count(phash) BETWEEN 8 AND 56"
"""Hashes with fewer bits set or unset come from flat images (a wall, a gradient) and mean nothing: results/LOG.md."""

NAMES = ("make", "body", "year", "label")

_SETS: dict[str, tuple[str, ...]] = {
    "total": (),
    "error": ("status", "error_code"),
    "score": ("bin", "accept"),
    **{name: (name,) for name in NAMES},
}
_GROUPED = list(dict.fromkeys(name for names in _SETS.values() for name in names))


@dataclass(frozen=True, slots=True)
class Tallies:
    """Holds the counts of all rows. Frames have the columns named here, the most frequent first."""

    rows: int
    scored: int
    mean_score: float | None
    uncertain: int
    """Scored rows below UNCERTAIN_SCORE."""
    judged: int
    """Scored rows that were compared with a threshold."""
    accepted: int
    flat: int
    """Images whose hash means nothing, which have no part in duplicates."""
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
        """Give the rows without a prediction."""
        return self.rows - self.scored


@dataclass(frozen=True, slots=True)
class Folders:
    """Holds the quality of an image tree's folders: those with the most failures, then the lowest scores, first."""

    base: str
    total: int = 0
    table: pd.DataFrame = field(default_factory=pd.DataFrame)
    """folder (below base; null for images directly in it), images, failed, mean_score, uncertain."""


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Holds the groups of images that share a perceptual hash, the largest first."""

    groups: int
    images: int
    """In all groups together."""
    table: pd.DataFrame
    """phash, images, labels (how many different ones)."""


def count(path: str) -> Tallies:
    """Count all rows, in one pass.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    sets = ", ".join(f"({', '.join(names)})" for names in _SETS.values())
    frame = query(
        path,
        f"""
        SELECT grouping({", ".join(_GROUPED)}) AS mask, {", ".join(_GROUPED)},
               count(*) AS images, count(*) FILTER (status = 'ok') AS scored,
               avg(score) AS mean_score, count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain,
               count(accept) AS judged, count(*) FILTER (accept) AS accepted, max(scored_at) AS last_scored_at,
               count(*) FILTER (NOT {_BITS}) AS flat, min(uri) AS first_uri, max(uri) AS last_uri
        FROM (SELECT *, CASE WHEN score IS NOT NULL THEN least(floor(score * {BINS}), {BINS - 1})::INTEGER END AS bin
              FROM predictions)
        GROUP BY GROUPING SETS ({sets})
        """,
    )
    parts = {name: frame[frame["mask"] == _mask(grouped)] for name, grouped in _SETS.items()}
    return _tallies(parts)


def _mask(grouped: tuple[str, ...]) -> int:
    """Give what SQL's grouping() says of a set: a bit for each column that it does not group by, the first highest."""
    return sum(1 << place for place, name in enumerate(reversed(_GROUPED)) if name not in grouped)


def _tallies(parts: dict[str, pd.DataFrame]) -> Tallies:
    total = parts["total"].iloc[0]
    errors = parts["error"][parts["error"]["status"] != "ok"].rename(columns={"first_uri": "example"})
    return Tallies(
        rows=int(total["images"]),
        scored=int(total["scored"]),
        mean_score=None if pd.isna(total["mean_score"]) else float(total["mean_score"]),
        uncertain=int(total["uncertain"]),
        judged=int(total["judged"]),
        accepted=int(total["accepted"]),
        flat=int(total["flat"]),
        last_scored_at=None if pd.isna(total["last_scored_at"]) else total["last_scored_at"],
        base=_common_folder(total["first_uri"], total["last_uri"]),
        errors=_ranked(errors, ["status", "error_code"])[["status", "error_code", "images", "example"]],
        names={name: _named(parts[name], name) for name in NAMES},
        bins=parts["score"].loc[parts["score"]["bin"].notna(), ["bin", "accept", "images"]],
    )


def _named(counted: pd.DataFrame, column: str) -> pd.DataFrame:
    known = counted[counted[column].notna() & (counted["scored"] > 0)]
    known = known.drop(columns="images").rename(columns={column: "name", "scored": "images"})
    return _ranked(known, ["name"])[["name", "images", "mean_score", "uncertain"]]


def _ranked(counted: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    ranked = counted.sort_values(["images", *names], ascending=[False, *(True for _ in names)])
    return ranked.reset_index(drop=True)


def _common_folder(first: str | None, last: str | None) -> str:
    """Give the deepest folder of all images, from the first and the last in order: what those share, all share."""
    if not isinstance(first, str) or not isinstance(last, str):
        return ""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return first[: first.rfind("/", 0, sum(1 for _ in alike)) + 1]


def count_folders(path: str, base: str) -> Folders:
    """Measure each folder below `base`, one level deep; a level or two deeper where that shows only a few.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    found = Folders(base)
    for depth in range(1, _DEEPEST + 1):
        deeper = _folders_at(path, base, depth)
        if depth > 1 and not found.total < deeper.total <= _MOST_FOLDERS:
            break
        found = deeper
        if not 1 < found.total < _FEWEST_FOLDERS:
            break
    return found


def _folders_at(path: str, base: str, depth: int) -> Folders:
    table = query(
        path,
        f"""
        WITH placed AS NOT MATERIALIZED (
            SELECT string_split(substr(uri, {len(base) + 1}), '/') AS parts, status, score FROM predictions
        ), folders AS NOT MATERIALIZED (
            SELECT array_to_string(list_slice(parts, 1, least({depth}, len(parts) - 1)), '/') AS name,
                   len(parts) = 1 AS direct, count(*) AS images, count(*) FILTER (status <> 'ok') AS failed,
                   avg(score) AS mean_score, count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain
            FROM placed GROUP BY ALL
        )
        SELECT CASE WHEN NOT direct THEN name END AS folder, images, failed, mean_score, uncertain,
               count(*) OVER () AS total
        FROM folders ORDER BY failed DESC, mean_score, folder LIMIT {SHOWN_FOLDERS}
        """,
    )
    total = int(table["total"].iloc[0]) if len(table) else 0
    return Folders(base, total, table.drop(columns="total"))


def count_duplicates(path: str, *, most: int) -> Duplicates:
    """Find the images that share their perceptual hash with another; the `most` largest groups one by one.

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
"""Why a row is shown, in this order: the smallest margins, the highest scores of frequent classes, and so on."""

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

    `seed` decides which random ones, and which of equals. A row that has two reasons counts twice.

    Returns:
        The rows, those of one reason after those of the one before, with the column `picks`, a list of keys of PICKS.

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
    """Share the images out: what is doubtful and what is random get the most, 2 in 7 each where nothing is lacking."""
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
    """Ask for the first `most` rows of each group: a heap a group, where a window would sort the whole table."""
    key = f"struct_pack(first := {order}, turn := hash(uri, {seed}), uri := uri, score := score)"
    return (
        f"SELECT '{pick}' AS pick, chosen.uri AS uri, chosen.score AS score, chosen.first::DOUBLE AS first, "
        f"chosen.turn AS turn FROM (SELECT unnest(min({key}, {most})) AS chosen FROM predictions WHERE {where} "
        f"GROUP BY {each})"
    )


def _joined(chosen: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Put the whole rows in the order of the choice.

    A uri has several rows where it has several boxes: they are told apart by score, and failed ones count as one.
    """
    chosen = chosen.assign(place=chosen["pick"].map(list(PICKS).index))
    chosen = chosen.sort_values(["place", "first", "turn", "uri"], kind="stable")
    keys = ["uri", "score"]
    picks = chosen.drop_duplicates([*keys, "pick"]).groupby(keys, dropna=False, sort=False)["pick"].agg(list)
    return picks.rename("picks").reset_index().merge(rows.drop_duplicates(keys), on=keys, how="inner")

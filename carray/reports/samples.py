"""Chooses the few hundred rows of a report that are shown one by one.

From: a folder of predictions, and a seed. To: a frame of rows, each with the reasons why it was chosen.
Invariants: the same predictions, seed and number give the same rows, in the same order, however the files are cut; no
more rows than were asked for leave DuckDB.
Cost: one pass over `uri` and a few narrow columns for each reason, then the files that hold a chosen row.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from carray.queries import query, read_predictions
from carray.reports.tallies import Duplicates, Tallies

__all__ = ["GROUP_MEMBERS", "MOST_FAILED", "PICKS", "SHOWN", "choose"]

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

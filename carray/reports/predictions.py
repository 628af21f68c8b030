"""Writes what is in a bucket, by its finished predictions, as one page that opens from disk.

From: a folder of predictions, and the images that it speaks of, as far as they are still there. To: one HTML file.
Invariants: no row is loaded that is not shown; keys, labels and errors are text, never markup; an image that cannot be
read now costs its picture, not the page; what the predictions do not hold is said, not left blank.
Cost: the columns that are counted, once or twice; then one GET a thumbnail. matplotlib takes 2 s to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.core.errors import SettingsError
from carray.core.page import render_page
from carray.core.progress import say
from carray.core.storage import absolute, exists, is_folder, join, read_json, write_bytes
from carray.predictions.format import record_place
from carray.queries import UNCERTAIN_SCORE, read_predictions
from carray.reports import figures
from carray.reports.cards import card, readable
from carray.reports.samples import PICKS, SHOWN, choose
from carray.reports.tallies import SHOWN_FOLDERS, Duplicates, Folders, Tallies, count, count_duplicates, count_folders
from carray.reports.thumbnails import Thumbnail, read_thumbnails

__all__ = ["MOST_THUMBNAILS", "THUMBNAILS", "write_report"]

THUMBNAILS = 300
"""Cards of scored images, and images that are read again for them."""
MOST_THUMBNAILS = 400
"""More would make the page larger than 5 MB, and nobody looks at them."""

_GROUPS = 12
"""Groups of near duplicates that are shown one by one."""
_ROWS = {"make": 60, "body": 30, "year": 80, "label": 100}
"""Names in a table; the page says how many more there are."""

_REMEDIES = {
    "not_found": ("gone since it was listed, or a table names what is not there", "--retry-failed once it is back"),
    "denied": ("the store refused it, or the credentials had expired", "mend the rights, then --retry-failed"),
    "timeout": ("no answer after every try", "--retry-failed"),
    "unavailable": ("errors or broken bodies after every try", "--retry-failed"),
    "empty": ("no bytes", "final; look at where the images come from"),
    "truncated": ("bytes that end too early", "final; upload it again"),
    "damaged": ("pixels whose decoder or checksum speaks of damage", "final; upload it again"),
    "unsupported": (
        "bytes that are no image, or of a kind that is not read",
        "final; look at where the images come from",
    ),
    "too_large": (
        "a file above max_image_mb, or over 89 million pixels to decode; the row's error says which",
        "raise max_image_mb in a new run for the first; shrink the image for the second",
    ),
    "bad_box": ("its box covers nothing of it", "mend the table"),
    "worker_lost": ("the process died twice with this image alone in hand", "look at the image; its shard went on"),
}
"""What each error_code means, and what to do."""


def write_report(predictions: str, *, out: str, thumbnails: int = THUMBNAILS, seed: int = 0) -> dict[str, Any]:
    """Write the page of a folder of predictions (or of one Parquet file) to `out`, and give its headline counts.

    Args:
        predictions: The output of a classification, local or s3://; it may be unfinished.
        out: The page's own name, local or s3://.
        thumbnails: Images that are read again at most, 0..MOST_THUMBNAILS; with 0 none is.
        seed: Decides which images stand for the others.

    Raises:
        SchemaError: the folder holds no predictions, or they lack a column.
        SettingsError: `out` is a folder or lies among the predictions, or `thumbnails` is out of range.
        StorageError: storage refused to read the predictions or to write the page.
    """
    path, names_folder, out = absolute(predictions).rstrip("/"), out.endswith("/"), absolute(out)
    _check(path, out, thumbnails, names_folder=names_folder)
    say(f"report: counting what {path} holds")
    # A filter that no row passes: the columns are checked, and nothing is read.
    read_predictions(path, [*SHOWN, "body", "year", "accept", "scored_at"], [("status", "==", "")])
    tallies = count(path)
    folders = count_folders(path, tallies.base) if tallies.rows else Folders("")
    duplicates = count_duplicates(path, most=_GROUPS)
    rows = choose(path, tallies, duplicates, images=thumbnails or THUMBNAILS, seed=seed)
    cards = _cards(rows, read_again=thumbnails > 0)
    run = _run(path, rows)
    page = render_page("reports/page.html.j2", _context(path, run, tallies, folders, duplicates, cards, thumbnails))
    write_bytes(out, page.encode())
    return {
        "images": tallies.rows,
        "scored": tallies.scored,
        "failed": tallies.failed,
        "finished": run["finished"],
        "mean_score": tallies.mean_score,
        "uncertain": tallies.uncertain,
        "accepted": tallies.accepted if tallies.judged else None,
        "duplicate_groups": duplicates.groups,
        "cards": len(cards),
        "thumbnails": sum(card["picture"] is not None for card in cards),
        "page": out,
    }


def _check(path: str, out: str, thumbnails: int, *, names_folder: bool) -> None:
    if not 0 <= thumbnails <= MOST_THUMBNAILS:
        raise SettingsError(
            f"thumbnails is {thumbnails}; allowed are 0 (read no image) to {MOST_THUMBNAILS}, more would make the page "
            "too large."
        )
    if names_folder or is_folder(out):
        raise SettingsError(f"--out {out} is a folder; give the page's own name, such as {join(out, 'report.html')}.")
    if f"{out}/".startswith(f"{path}/"):
        raise SettingsError(
            f"--out {out} lies among the predictions, where readers of Parquet would stumble over it; give another "
            "place."
        )


def _cards(rows: pd.DataFrame, *, read_again: bool) -> list[dict[str, Any]]:
    """Give the cards of all rows, with the pictures of those that were scored."""
    pictures: dict[int, Thumbnail] = {}
    if read_again:
        scored = rows[rows["status"] == "ok"]
        etags = [None if pd.isna(etag) else str(etag) for etag in scored["etag"]]
        pictures = dict(zip(scored.index, read_thumbnails(list(zip(scored["uri"], etags, strict=True))), strict=True))
    return [card(row, pictures.get(place)) | {"phash": row["phash"]} for place, row in _records(rows)]


def _records(rows: pd.DataFrame) -> list[tuple[int, dict[str, Any]]]:
    return list(zip(rows.index, ({str(k): v for k, v in row.items()} for row in rows.to_dict("records")), strict=True))


def _run(path: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Say what run the rows are of: by its own record, else, as of a single file, by the rows that are shown."""
    record = _record(path, "run.json")
    listed = _record(path, "listing.json")
    run: dict[str, Any] = {
        name: record[name] if name in record else ", ".join(sorted(set(rows[name].dropna())))
        for name in ("run_id", "bundle_id", "runtime")
    }
    is_file = path.endswith(".parquet") and exists(path)
    finished = None if is_file else any(exists(record_place(path, name)) for name in ("done.json", "compact.json"))
    return run | {
        "finished": finished,
        "source": record.get("source"),
        "bundle": record.get("bundle"),
        "created_at": record.get("created_at"),
        "listed": listed.get("images"),
    }


def _record(path: str, name: str) -> dict[str, Any]:
    place = record_place(path, name)
    return dict(read_json(place)) if exists(place) else {}


def _context(
    path: str,
    run: Mapping[str, Any],
    tallies: Tallies,
    folders: Folders,
    duplicates: Duplicates,
    cards: list[dict[str, Any]],
    thumbnails: int,
) -> dict[str, Any]:
    years = tallies.names["year"]
    return {
        "path": path,
        "place": readable(path),
        "run": run,
        "tallies": tallies,
        "uncertain_score": UNCERTAIN_SCORE,
        "errors": _errors(tallies),
        "retry": bool((tallies.errors["status"] == "fetch_error").any()) and run["bundle"] and run["source"],
        "scores_svg": figures.scores_svg(tallies.bins, title="Scores") if tallies.scored else "",
        "years_svg": figures.years_svg(years, title="Model years") if len(years) > 1 else "",
        "tables": {name: _table(tallies, name) for name in _ROWS},
        "folders": _folders(folders),
        "duplicates": duplicates,
        "groups": _groups(duplicates, cards),
        "cards": cards,
        "picks": {pick: name for pick, name in PICKS.items() if any(pick in card["picks"] for card in cards)},
        "makes": sorted({card["make"] for card in cards if card["make"]}),
        "asked": thumbnails,
        "pictures": sum(card["picture"] is not None for card in cards),
        "unread": sum(bool(card["reason"]) for card in cards),
        "changed": sum(card["changed"] for card in cards),
    }


def _errors(tallies: Tallies) -> list[dict[str, Any]]:
    errors = []
    for row in tallies.errors.to_dict("records"):
        meaning, remedy = _REMEDIES.get(row["error_code"], ("", ""))
        texts = {name: readable(row[name]) for name in ("status", "error_code", "example")}
        errors.append({**texts, "images": int(row["images"]), "meaning": meaning, "remedy": remedy})
    return errors


def _table(tallies: Tallies, name: str) -> dict[str, Any]:
    found, most = tallies.names[name], _ROWS[name]
    rows = [
        {
            "name": readable(row["name"]),
            "images": int(row["images"]),
            "fraction": row["images"] / tallies.scored,
            "mean_score": row["mean_score"],
            "uncertain_fraction": row["uncertain"] / row["images"],
        }
        for row in found.head(most).to_dict("records")
    ]
    return {"rows": rows, "more": len(found) - len(rows), "unnamed": tallies.scored - int(found["images"].sum())}


def _folders(folders: Folders) -> dict[str, Any]:
    rows = []
    for row in folders.table.to_dict("records"):
        name = "(directly in it)" if pd.isna(row["folder"]) else readable(row["folder"]) or "(no name)"
        mean_score = None if pd.isna(row["mean_score"]) else float(row["mean_score"])
        failed_fraction = row["failed"] / row["images"]
        scored = row["images"] - row["failed"]
        tip = f"{name}: {row['images']:,} images, {failed_fraction:.1%} failed"
        rows.append(
            {
                "name": name,
                "images": int(row["images"]),
                "failed": int(row["failed"]),
                "failed_fraction": failed_fraction,
                "mean_score": mean_score,
                "uncertain_fraction": row["uncertain"] / scored if scored else None,
                "tip": tip if mean_score is None else f"{tip}, mean score {mean_score:.3f}",
            }
        )
    drawn = pd.DataFrame(rows).sort_values("name") if len(rows) > 2 else None
    return {
        "base": readable(folders.base),
        "rows": rows,
        "total": folders.total,
        "more": max(0, folders.total - SHOWN_FOLDERS),
        "svg": "" if drawn is None else figures.folders_svg(drawn, title="Quality by folder"),
    }


def _groups(duplicates: Duplicates, cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for row in duplicates.table.to_dict("records"):
        members = [card for card in cards if "duplicate" in card["picks"] and card["phash"] == row["phash"]]
        phash = f"{int(row['phash']):016x}"
        groups.append({"phash": phash, "images": int(row["images"]), "labels": int(row["labels"]), "members": members})
    return groups

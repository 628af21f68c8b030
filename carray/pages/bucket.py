r"""Writes what is in a bucket, by its finished predictions, as one page that opens from disk.

From: a folder of predictions, and the images that it speaks of, as far as they are still there. To: one HTML file, with
its pictures as SVG and a gallery of cards.
Invariants: no row is loaded that is not shown; an image that cannot be read now costs its picture, not the page; what
the predictions do not hold is said, not left blank. Keys, labels and errors are untrusted text, never markup: letters
that do not show, or that turn text round, are spelled out (as \n or \u202e), so that what is read on the page is
what stands in the table.
Cost: the columns that are counted, once or twice; then one GET a thumbnail. matplotlib takes 2 s to import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from carray.classify.predictions_folder import record_place
from carray.core import text
from carray.core.errors import ERROR_CODES, ErrorCode, SettingsError
from carray.core.page import render_page
from carray.core.progress import say
from carray.core.store.files import absolute, exists, is_folder, is_s3, join, read_json, write_bytes
from carray.core.svg import PAGE_COLOURS, percent_axis, picture, whole_numbers
from carray.queries import UNCERTAIN_SCORE, read_predictions
from carray.reports.tallies import (
    BINS,
    PICKS,
    SHOWN,
    SHOWN_FOLDERS,
    Duplicates,
    Folders,
    Tallies,
    choose,
    count,
    count_duplicates,
    count_folders,
)
from carray.reports.thumbnails import Thumbnail, read_thumbnails

__all__ = ["MOST_THUMBNAILS", "THUMBNAILS", "card", "last_part", "readable", "write_report"]

_FIRST, _SECOND, _SOFT, _BAD = (PAGE_COLOURS[name] for name in ("first", "second", "soft", "bad"))


def scores_svg(bins: pd.DataFrame, *, title: str) -> str:
    """Draw how many images have which score; those that a threshold refuses stand out, if there is one."""
    from matplotlib.patches import Patch

    accepted = bins["accept"].astype("boolean")
    refused = (~accepted).fillna(value=False)
    kinds = [("accepted", _FIRST, accepted.fillna(value=False)), ("below the threshold", _SECOND, refused)]
    kinds.append(("scored", _FIRST, accepted.isna()))
    tips: dict[str, str] = {}
    with picture(title, "A bar's height is the number of images with that score.", tips) as (axes, svg):
        heights = pd.Series(0, index=range(BINS))
        handles = []
        for name, colour, chosen in kinds:
            images = bins[chosen].groupby("bin")["images"].sum().reindex(range(BINS), fill_value=0).astype(int)
            if not images.any():
                continue
            for place in images.index[images > 0]:
                span = f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}"
                tips[f"{name[0]}{place}"] = f"score {span}: {images[place]:,} {name}"
                _bar(axes, place / BINS, images[place], bottom=heights[place], colour=colour, tip=f"{name[0]}{place}")
            heights = heights + images
            handles.append(Patch(color=colour, label=name))
        axes.axvline(UNCERTAIN_SCORE, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1)
        if len(handles) > 1:
            axes.legend(handles=handles, loc="upper left")
        axes.set(xlabel="score", ylabel="images")
        axes.set_xlim(0, 1)
        _thousands(axes.yaxis)
    return svg()


def years_svg(years: pd.DataFrame, *, title: str) -> str:
    """Draw how many images show a vehicle of which model year."""
    tips = {f"y{row['name']}": f"{row['name']}: {row['images']:,} images" for row in years.to_dict("records")}
    with picture(title, "A bar's height is the number of images of that model year.", tips) as (axes, svg):
        for row in years.to_dict("records"):
            _bar(axes, row["name"] - 0.4, row["images"], width=0.8, colour=_FIRST, tip=f"y{row['name']}")
        axes.set(xlabel="model year", ylabel="images")
        axes.set_xlim(years["name"].min() - 1, years["name"].max() + 1)
        whole_numbers(axes.xaxis)
        _thousands(axes.yaxis)
    return svg()


def folders_svg(folders: pd.DataFrame, *, title: str) -> str:
    """Draw each folder's share of failures as a bar and its mean score as a dot, in the order of their names.

    `folders` has columns name, tip, failed_fraction and mean_score, and is in that order already.
    """
    tips = {f"f{place}": tip for place, tip in enumerate(folders["tip"])}
    description = "A bar is a folder's share of failures, a dot its mean score."
    with picture(title, description, tips, height=3.0) as (axes, svg):
        for place, row in enumerate(folders.to_dict("records")):
            tips[f"s{place}"] = row["tip"]
            _bar(axes, place - 0.4, row["failed_fraction"], width=0.8, colour=_BAD, tip=f"f{place}")
            if pd.notna(row["mean_score"]):
                size = 5.0 if len(folders) <= 60 else 3.0
                axes.plot(place, row["mean_score"], "o", color=_FIRST, markersize=size, gid=f"tip-s{place}")
        percent_axis(axes.yaxis)
        axes.set(ylabel="failed, and mean score", xlabel="folders, in the order of their names")
        _name_folders(axes, list(folders["name"]))
        axes.set_xlim(-0.7, len(folders) - 0.3)
        axes.set_ylim(0, 1.04)
        axes.grid(visible=False, axis="x")
    return svg()


def _name_folders(axes: Any, names: list[str]) -> None:
    """Write few and short names below their bars; more would cover each other, and a tip says them all the same."""
    if len(names) > 31 or sum(map(len, names)) > 80 or not all(name.isascii() for name in names):
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(names)), names)


def _bar(
    axes: Any, left: float, height: float, *, colour: str, tip: str, bottom: float = 0, width: float = 1 / BINS
) -> None:
    bars = axes.bar(left, height, width=width * 0.92, bottom=bottom, align="edge", color=colour)
    bars.patches[0].set_gid(f"tip-{tip}")


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def readable(value: Any) -> str:
    """Give untrusted text as core.text shows it; empty for a null."""
    return "" if value is None or pd.isna(value) else text.readable(value)


def last_part(uri: str) -> str:
    """Give a key's own name, without its folders; a legal key may end in a slash."""
    name = uri.rstrip("/").rsplit("/", 1)[-1] if is_s3(uri) or uri.startswith("/") else uri
    return readable(name) or readable(uri)


def card(row: Mapping[str, Any], thumbnail: Thumbnail | None) -> dict[str, Any]:
    """Give what one card shows; `thumbnail` is None where none was to be read."""
    known = {name: value if isinstance(value, list) or pd.notna(value) else None for name, value in _flat(row).items()}
    scored = known["status"] == "ok"
    top5 = zip(known["top5_labels"] or [], known["top5_scores"] or [], strict=False)
    return {
        "picks": known["picks"],
        "key": readable(known["uri"]),
        "name": last_part(str(row["uri"])),
        "scored": scored,
        "label": readable(known["label"]),
        "make": readable(known["make"]),
        "score": known["score"] if scored else None,
        "margin": known["margin"] if scored else None,
        "top5": [(readable(label), float(score)) for label, score in top5],
        "status": readable(known["status"]),
        "code": readable(known["error_code"]),
        "error": readable(known["error"]),
        "facts": _facts(known),
        "picture": thumbnail if thumbnail and thumbnail.data_uri else None,
        "reason": readable(thumbnail.reason) if thumbnail else "",
        "changed": bool(thumbnail and thumbnail.changed),
    }


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Make the lists of a row, which pandas holds as arrays, lists."""
    return {
        name: list(value) if hasattr(value, "__len__") and not isinstance(value, str) else value
        for name, value in row.items()
    }


def _facts(known: Mapping[str, Any]) -> str:
    size = f"{known['width']:,} x {known['height']:,} pixels" if known["width"] and known["height"] else ""
    weight = f"{known['size_bytes'] / 1000:,.0f} kB" if known["size_bytes"] is not None else ""
    return ", ".join(fact for fact in (size, weight) if fact)


THUMBNAILS = 300
"""Cards of scored images, and images that are read again for them."""
MOST_THUMBNAILS = 400
"""More would make the page larger than 5 MB, and nobody looks at them."""

_GROUPS = 12
"""Groups of near duplicates that are shown one by one."""
_ROWS = {"make": 60, "body": 30, "year": 80, "label": 100}
"""Names in a table; the page says how many more there are."""


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
        "scores_svg": scores_svg(tallies.bins, title="Scores") if tallies.scored else "",
        "years_svg": years_svg(years, title="Model years") if len(years) > 1 else "",
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


_UNKNOWN = ErrorCode("", "", "")


def _errors(tallies: Tallies) -> list[dict[str, Any]]:
    errors = []
    for row in tallies.errors.to_dict("records"):
        known = ERROR_CODES.get(row["error_code"], _UNKNOWN)
        texts = {name: readable(row[name]) for name in ("status", "error_code", "example")}
        errors.append({**texts, "images": int(row["images"]), "meaning": known.meaning, "remedy": known.remedy})
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
        "svg": "" if drawn is None else folders_svg(drawn, title="Quality by folder"),
    }


def _groups(duplicates: Duplicates, cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = []
    for row in duplicates.table.to_dict("records"):
        members = [card for card in cards if "duplicate" in card["picks"] and card["phash"] == row["phash"]]
        phash = f"{int(row['phash']):016x}"
        groups.append({"phash": phash, "images": int(row["images"]), "labels": int(row["labels"]), "members": members})
    return groups

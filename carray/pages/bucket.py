r"""Writes the page of a bucket: what its finished predictions hold, as counts, charts and a gallery of thumbnails.

Only rows that are shown are loaded. An image that cannot be read again costs its thumbnail, not the page. Keys, labels
and errors are untrusted text: never markup, and control characters or characters that reverse text are spelled out
(\n, \u202e). Costs one or two reads of the counted columns, and one GET a thumbnail.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from carray.classify.predictions_folder import record_place
from carray.core.errors import ERROR_CODES, ErrorCode, SettingsError
from carray.core.progress import say
from carray.core.store.files import absolute, exists, is_folder, join, read_json, write_bytes
from carray.pages.charts import PAGE_COLOURS, chart, count_axis, percent_axis, whole_numbers
from carray.pages.templates import readable, records, render_page
from carray.pages.thumbnails import read_thumbnails
from carray.queries import UNCERTAIN_SCORE, read_predictions
from carray.queries.tallies import BINS, PICKS, SHOWN, Tallies, choose, count, count_duplicates, count_folders

__all__ = ["MOST_THUMBNAILS", "THUMBNAILS", "write_page"]

THUMBNAILS = 300
"""Images that are read again for thumbnails, by default."""
MOST_THUMBNAILS = 400
"""More would make the page larger than 5 MB."""
_GROUPS = 12
"""Groups of near duplicates that are shown."""
_ROWS = {"make": 60, "body": 30, "year": 80, "label": 100}
"""Most rows of a table; the page says how many more there are."""
_UNKNOWN = ErrorCode("", "", "")
_FIRST, _SECOND, _SOFT, _BAD = (PAGE_COLOURS[name] for name in ("first", "second", "soft", "bad"))


def write_page(predictions: str, *, out: str, thumbnails: int = THUMBNAILS, seed: int = 0) -> dict[str, Any]:
    """Write the page of a folder of predictions, or of one Parquet file, to `out`, and return its headline counts.

    Args:
        predictions: Folder of a finished or unfinished classification, local or s3://.
        out: File to write, local or s3://.
        thumbnails: Most images that are read again, 0..MOST_THUMBNAILS.
        seed: Seed of the choice of images.

    Raises:
        SchemaError: the folder holds no predictions, or they lack a column.
        SettingsError: `out` is a folder or lies among the predictions, or `thumbnails` is out of range.
        StorageError: the predictions cannot be read, or the page cannot be written.
    """
    path, names_folder, out = absolute(predictions).rstrip("/"), out.endswith("/"), absolute(out)
    _check(path, out, thumbnails, names_folder=names_folder)
    say(f"report: counting what {path} holds")
    # A filter that no row passes checks the columns and reads nothing.
    read_predictions(path, [*SHOWN, "body", "year", "accept", "scored_at"], [("status", "==", "")])
    tallies = count(path)
    duplicates = count_duplicates(path, most=_GROUPS)
    rows = choose(path, tallies, duplicates, images=thumbnails or THUMBNAILS, seed=seed)
    run, cards = _run(path, rows), _cards(rows, read_again=thumbnails > 0)
    pictures = [card["thumbnail"] for card in cards if card["thumbnail"]]
    context = {
        "path": path,
        "run": run,
        "asked": thumbnails,
        "uncertain_score": UNCERTAIN_SCORE,
        "most": _ROWS,
        "duplicates": duplicates,
        "cards": cards,
        "picks": {pick: name for pick, name in PICKS.items() if any(pick in card["picks"] for card in cards)},
        "pictures": sum(bool(picture.data_uri) for picture in pictures),
        "unread": sum(bool(picture.reason) for picture in pictures),
        "changed": sum(picture.changed for picture in pictures),
    }
    context |= _counted(path, tallies)
    write_bytes(out, render_page("bucket.html.j2", context).encode())
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
        "thumbnails": context["pictures"],
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
            f"--out {out} lies among the predictions, where readers of Parquet would stumble over it; name "
            "another folder."
        )


def _cards(rows: pd.DataFrame, *, read_again: bool) -> list[dict[str, Any]]:
    """Add to each row `thumbnail`: None if it was not scored, or if no image is to be read."""
    shown = records(rows)
    scored = [row for row in shown if row["status"] == "ok" and read_again]
    read = read_thumbnails([(row["uri"], row["etag"]) for row in scored]) if read_again else []
    thumbnails = {id(row): thumbnail for row, thumbnail in zip(scored, read, strict=True)}
    return [row | {"thumbnail": thumbnails.get(id(row))} for row in shown]


def _run(path: str, rows: pd.DataFrame) -> dict[str, Any]:
    """Describe the run by its record, or, for a single file, by the rows that are shown."""
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
    uri = record_place(path, name)
    return dict(read_json(uri)) if exists(uri) else {}


def _counted(path: str, tallies: Tallies) -> dict[str, Any]:
    """Return what the page says of all rows, with its charts."""
    folders, total = count_folders(path, tallies.base) if tallies.rows else (pd.DataFrame(), 0)
    if total:
        folders = _with_shares(folders)
    years = tallies.names["year"]
    return {
        "tallies": tallies,
        "errors": [row | {"known": ERROR_CODES.get(row["error_code"], _UNKNOWN)} for row in records(tallies.errors)],
        "folders": records(folders),
        "all_folders": total,
        "scores_svg": _scores_svg(tallies.bins) if tallies.scored else "",
        "years_svg": _years_svg(years) if len(years) > 1 else "",
        "folders_svg": _folders_svg(folders.sort_values("name")) if len(folders) > 2 else "",
    }


def _with_shares(folders: pd.DataFrame) -> pd.DataFrame:
    counts = folders[["images", "failed", "mean_score", "uncertain"]].astype(float)
    names = [
        "(directly in it)" if folder is None or pd.isna(folder) else readable(folder) or "(no name)"
        for folder in folders["folder"]
    ]
    return folders.assign(
        name=names,
        mean_score=counts["mean_score"],
        failed_fraction=counts["failed"] / counts["images"],
        uncertain_fraction=counts["uncertain"] / (counts["images"] - counts["failed"]),
    )


def _scores_svg(bins: pd.DataFrame) -> str:
    """Draw a histogram of scores; those below the threshold, if there is one, have another colour."""
    from matplotlib.patches import Patch

    accepted = bins["accept"].astype("boolean")
    refused = (~accepted).fillna(value=False)
    kinds = [("accepted", _FIRST, accepted.fillna(value=False)), ("below the threshold", _SECOND, refused)]
    kinds.append(("scored", _FIRST, accepted.isna()))
    tips: dict[str, str] = {}
    with chart("Scores", "A bar's height is the number of images with that score.", tips) as (axes, svg):
        heights = pd.Series(0, index=range(BINS))
        handles = []
        for name, colour, chosen in kinds:
            images = bins[chosen].groupby("bin")["images"].sum().reindex(range(BINS), fill_value=0).astype(int)
            if not images.any():
                continue
            for i in images.index[images > 0]:
                tip = f"{name[0]}{i}"
                tips[tip] = f"score {i / BINS:.2f} to {(i + 1) / BINS:.2f}: {images[i]:,} {name}"
                _bar(axes, i / BINS, images[i], bottom=heights[i], colour=colour, tip=tip)
            heights = heights + images
            handles.append(Patch(color=colour, label=name))
        axes.axvline(UNCERTAIN_SCORE, color=_SOFT, linestyle=(0, (2, 3)), linewidth=1)
        if len(handles) > 1:
            axes.legend(handles=handles, loc="upper left")
        axes.set(xlabel="score", ylabel="images")
        axes.set_xlim(0, 1)
        count_axis(axes.yaxis)
    return svg()


def _years_svg(years: pd.DataFrame) -> str:
    """Draw the number of images by model year."""
    tips = {f"y{row['name']}": f"{row['name']}: {row['images']:,} images" for row in years.to_dict("records")}
    description = "A bar's height is the number of images of that model year."
    with chart("Model years", description, tips) as (axes, svg):
        for row in years.to_dict("records"):
            _bar(axes, row["name"] - 0.4, row["images"], width=0.8, colour=_FIRST, tip=f"y{row['name']}")
        axes.set(xlabel="model year", ylabel="images")
        axes.set_xlim(years["name"].min() - 1, years["name"].max() + 1)
        whole_numbers(axes.xaxis)
        count_axis(axes.yaxis)
    return svg()


def _folders_svg(folders: pd.DataFrame) -> str:
    """Draw each folder's share of failures as a bar and its mean score as a dot, in the given order."""
    rows = records(folders)
    tips: dict[str, str] = {}
    for i, row in enumerate(rows):
        score = "" if row["mean_score"] is None else f", mean score {row['mean_score']:.3f}"
        tip = f"{row['name']}: {row['images']:,} images, {row['failed_fraction']:.1%} failed{score}"
        tips |= {f"f{i}": tip, f"s{i}": tip}
    description = "A bar is a folder's share of failures, a dot its mean score."
    with chart("Quality by folder", description, tips, height=3.0) as (axes, svg):
        for i, row in enumerate(rows):
            _bar(axes, i - 0.4, row["failed_fraction"], width=0.8, colour=_BAD, tip=f"f{i}")
            if row["mean_score"] is not None:
                size = 5.0 if len(folders) <= 60 else 3.0
                axes.plot(i, row["mean_score"], "o", color=_FIRST, markersize=size, gid=f"tip-s{i}")
        percent_axis(axes.yaxis)
        axes.set(ylabel="failed, and mean score", xlabel="folders, in the order of their names")
        _name_folders(axes, list(folders["name"]))
        axes.set_xlim(-0.7, len(folders) - 0.3)
        axes.set_ylim(0, 1.04)
        axes.grid(visible=False, axis="x")
    return svg()


def _name_folders(axes: Any, names: list[str]) -> None:
    """Label the bars where few and short names leave room; the tips have all names."""
    if len(names) > 31 or sum(map(len, names)) > 80 or not all(name.isascii() for name in names):
        axes.set_xticks([])
    else:
        axes.set_xticks(range(len(names)), names)


def _bar(
    axes: Any, left: float, height: float, *, colour: str, tip: str, bottom: float = 0, width: float = 1 / BINS
) -> None:
    bars = axes.bar(left, height, width=width * 0.92, bottom=bottom, align="edge", color=colour)
    bars.patches[0].set_gid(f"tip-{tip}")

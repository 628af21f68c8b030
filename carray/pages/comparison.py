"""Compares two runs of predictions over the same images, or two bundles over one manifest, and writes the result.

    index.html         the page
    flips.parquet      label_a, label_b, images, mean_score_a, mean_score_b: the changes of label
    classes.parquet    each label's images, share with its change and interval, and mean score in A and in B
    comparison.json    the headline; the marker, written last
    a/, b/             the evaluations, of two bundles

Neither side is changed, and nothing is written into a folder with other files. The same comparison again replaces its
own files. What cannot be compared is said, not drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import SettingsError
from carray.core.progress import say
from carray.core.store.files import (
    absolute,
    delete,
    exists,
    is_s3,
    join,
    list_files,
    read_json,
    write_bytes,
    write_json,
)
from carray.core.tables import write_table
from carray.pages import evaluation
from carray.pages.charts import PAGE_COLOURS, chart, percent_axis
from carray.pages.templates import percent_text, records, render_page
from carray.queries import connect, open_predictions
from carray.queries.compare import BINS, compare_tables, psi_words

__all__ = ["compare_bundles", "compare_runs", "comparison_text"]

_MARKER, _PAGE = "comparison.json", "index.html"
_VERSION = 1
_TEXT, _COUNT, _NUMBER = pa.string(), pa.int64(), pa.float64()
_TABLES: dict[str, dict[str, pa.DataType]] = {
    "flips": {"label_a": _TEXT, "label_b": _TEXT, "images": _COUNT, "mean_score_a": _NUMBER, "mean_score_b": _NUMBER},
    "classes": {
        **{"label": _TEXT, "images_a": _COUNT, "images_b": _COUNT, "images_both": _COUNT},
        **{"share_a": _NUMBER, "share_b": _NUMBER, "share_change": _NUMBER, "share_change_low": _NUMBER},
        **{"share_change_high": _NUMBER, "mean_score_a": _NUMBER, "mean_score_b": _NUMBER},
    },
}
"""The columns of the Parquet files."""
_UNKNOWN: dict[str, Any] = dict.fromkeys(("bundle_id", "run_id", "runtime"))
_OWN_FILES = {_MARKER, _PAGE, *(f"{name}.parquet" for name in _TABLES)}
_MOST_ROWS = 500
"""Rows of a table on the page; the Parquet files have all."""
_A, _B, _SOFT, _INK = (PAGE_COLOURS[name] for name in ("first", "second", "soft", "ink"))
_CHANGE_BINS = 80
"""Between -1 and 1, so 0.025 wide: one is centred on no change."""


def compare_runs(a: str, b: str, *, out: str | None = None) -> dict[str, Any]:
    """Compare two folders of predictions over the same images, joined by uri, and return the headline.

    Raises:
        SettingsError: both are the same, or `out` holds something else.
        SchemaError: a folder holds no predictions, no image is in both, or a run has several rows of one uri.
        StorageError: the files cannot be read or written.
    """
    a, b = absolute(a), absolute(b)
    if _real(a) == _real(b):
        raise SettingsError(f"A and B are both {a}; name two runs.")
    sides: dict[str, dict[str, Any]] = {"a": {"path": a}, "b": {"path": b}}
    if out is not None:
        _check_out(out := absolute(out), sides)
    tables = {side: open_predictions(found["path"]) for side, found in sides.items()}
    for side, data in tables.items():
        sides[side] |= _origin(data)
    return _compare(tables, sides, out=out, keys=("uri",), origin={"manifest": None, "split": None})


def compare_bundles(
    a: str, b: str, manifest: str, *, split: str = "test", out: str, runtime: str = "fp32"
) -> dict[str, Any]:
    """Score one split of a manifest with two bundles, compare their labels and accuracy, and return the headline.

    The evaluations are in OUT/a and OUT/b; a second call reads them.

    Raises:
        SettingsError: both bundles are the same, or `out` holds something else.
        BundleError: a bundle is unfinished or damaged.
        SchemaError: the split is empty, or holds labels that a bundle does not know.
        BudgetError: no image of the split can be read.
        StorageError: the files cannot be read or written.
    """
    from carray.bundle.bundle_folder import open_bundle
    from carray.evaluation.evaluate import evaluate

    named = (("a", a), ("b", b))
    sides: dict[str, dict[str, Any]] = {side: _UNKNOWN | {"path": absolute(path)} for side, path in named}
    for side in sides.values():
        side["bundle_id"] = open_bundle(side["path"]).bundle_id
    if sides["a"]["bundle_id"] == sides["b"]["bundle_id"]:
        raise SettingsError(f"A and B are the same bundle, {sides['a']['bundle_id']}; name two.")
    _check_out(out := absolute(out), sides)
    tables = {}
    for name, side in sides.items():
        say(f"evaluating {name.upper()}: {side['path']}")
        folder = join(out, name)
        measured = evaluate(
            side["path"], manifest, split=split, out=folder, runtime=runtime, write_page=evaluation.write_page
        )
        side["runtime"] = measured["runtime"]
        tables[name] = _numbered(open_predictions(join(folder, "predictions.parquet")))
    origin = {"manifest": absolute(manifest), "split": split}
    return _compare(tables, sides, out=out, keys=("uri", "row_of_uri"), origin=origin)


def comparison_text(found: Mapping[str, Any]) -> str:
    """Format a headline as a few lines of text."""
    images, agreement, score = found["images"], found["agreement"], found["score"]
    lines = [
        f"A  {found['a']['path']}",
        f"B  {found['b']['path']}",
        f"  images       {images['both']:,} in both, {images['only_a']:,} only in A, {images['only_b']:,} only in B",
    ]
    if score is None:
        return "\n".join([*lines, "  no image was scored by both with the same bytes, so there is nothing to compare"])
    interval = f"(95 % interval {percent_text(agreement['low'])} to {percent_text(agreement['high'])})"
    sure = found["agreement_where_a_is_sure"]
    lines += [
        f"  agreement    {percent_text(agreement['rate'])} of {agreement['images']:,} {interval}",
        f"  where A is sure (score above {sure['above']})  {percent_text(sure['rate']) or 'no image'}",
        f"  score        {score['mean_a']:.3f} in A, {score['mean_b']:.3f} in B",
        f"  drift (PSI)  labels {found['psi']['classes']:.3f}, scores {found['psi']['scores']:.3f}",
    ]
    if (other := found["other_bytes"])["images"]:
        lines.append(f"  other bytes  {other['images']:,} images changed in between and are in no figure above")
    if truth := found["truth"]:
        right = f"A alone {truth['only_a_right']:,}, B alone {truth['only_b_right']:,}"
        accuracies = f"A {percent_text(truth['accuracy_a'])}, B {percent_text(truth['accuracy_b'])}"
        lines.append(f"  accuracy     {accuracies}; right: {right} (McNemar p = {truth['mcnemar_p']:.2g})")
    return "\n".join(lines)


def _compare(
    tables: Mapping[str, pads.Dataset],
    sides: Mapping[str, Mapping[str, Any]],
    *,
    out: str | None,
    keys: tuple[str, ...],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    names = (sides["a"]["path"], sides["b"]["path"])
    say(f"joining {names[0]} and {names[1]} by uri")
    figures, frames = compare_tables(tables["a"], tables["b"], names=names, keys=keys)
    found = {"version": _VERSION, **sides, **origin, **figures}
    if out is not None:
        _write(out, found, frames)
    return found


def _write(out: str, found: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> None:
    delete(join(out, _MARKER))
    origin = {side: found[side]["path"] for side in ("a", "b")}
    for name, columns in _TABLES.items():
        table = pa.Table.from_pandas(frames[name][list(columns)], schema=pa.schema(columns), preserve_index=False)
        write_table(table, join(out, f"{name}.parquet"), kind=f"comparison {name}", version=_VERSION, provenance=origin)
    write_bytes(join(out, _PAGE), _render(found, frames).encode())
    write_json(join(out, _MARKER), found)


def _origin(data: pads.Dataset) -> dict[str, Any]:
    """List the bundles, runs and runtimes that a table's rows name."""
    named = [name for name in _UNKNOWN if name in data.schema.names]
    if not named:
        return _UNKNOWN
    chosen = ", ".join(f"list_sort(list(DISTINCT {name}) FILTER ({name} IS NOT NULL))" for name in named)
    with connect({"run": data}) as connection:
        values = connection.execute(f"SELECT {chosen} FROM run").fetchall()[0]
    return _UNKNOWN | {name: ", ".join(found or []) or None for name, found in zip(named, values, strict=True)}


def _numbered(data: pads.Dataset) -> pads.Dataset:
    """Number each uri's rows, of which it has one a box, in the manifest's order."""
    table = data.to_table(columns=["uri", "status", "label", "score", "truth"])
    uris = table["uri"].to_pandas()
    return pads.dataset(table.append_column("row_of_uri", pa.array(uris.groupby(uris).cumcount())))


def _check_out(out: str, sides: Mapping[str, Mapping[str, Any]]) -> None:
    if any(_real(out) == _real(side["path"]) for side in sides.values()):
        raise SettingsError(f"--out is {out}, which is being compared and stays as it is; name another folder.")
    if exists(join(out, _MARKER)):
        there = read_json(join(out, _MARKER))
        before = [there.get(side, {}).get("path") for side in sides]
        if before != [side["path"] for side in sides.values()]:
            raise SettingsError(f"{out} holds the comparison of {' and '.join(map(str, before))}; name another folder.")
    foreign = [uri for uri in list_files(out) if uri.rsplit("/", 1)[-1] not in _OWN_FILES]
    if foreign:
        raise SettingsError(f"{out} holds something else, such as {foreign[0]!r}; name an empty folder with --out.")


def _real(path: str) -> str:
    return path.rstrip("/") if is_s3(path) else os.path.realpath(path)


def _render(found: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> str:
    """Render the page of a comparison; `found` is the content of comparison.json."""
    compared, flips, classes = found["agreement"]["images"], frames["flips"], frames["classes"]
    context: dict[str, Any] = {
        "found": found,
        "compared": compared,
        "flips": records(flips.head(_MOST_ROWS)),
        "all_flips": len(flips),
        "flipped": int(flips["images"].sum()),
        "classes": records(classes.head(_MOST_ROWS)),
        "all_classes": len(classes),
        "statuses": records(frames["statuses"]),
    }
    if compared:
        context |= {
            "psi": {name: (value, psi_words(value)) for name, value in found["psi"].items()},
            "scores_svg": _scores_svg(frames["scores"] / compared),
            "changes_svg": _changes_svg(frames["changes"]),
            "shares_svg": _shares_svg(classes),
        }
    return render_page("comparison.html.j2", context)


def _scores_svg(shares: pd.DataFrame) -> str:
    """Draw the shares of images by score in A and in B, as two outlines."""
    edges = [i / BINS for i in range(BINS + 1)]
    description = "Shares of the compared images by their score, A and B over the same bins."
    with chart("Scores in A and in B", description) as (axes, svg):
        for name, colour, style in (("A", _A, "-"), ("B", _B, (0, (4, 1.5)))):
            counted = shares[f"images_{name.lower()}"]
            axes.stairs(counted, edges, color=colour, linewidth=1.8, linestyle=style, label=name)
        axes.legend(loc="upper left")
        percent_axis(axes.yaxis)
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="score", ylabel="share of images")
    return svg()


def _changes_svg(changes: pd.DataFrame) -> str:
    """Draw the shares of images by the change of their score; right of 0 the score in B is higher."""
    width = 2 / _CHANGE_BINS
    shares = changes.groupby((changes["change"] / width).round())["images"].sum() / changes["images"].sum()
    description = "Shares of the compared images by score in B less score in A."
    with chart("Changes of score", description) as (axes, svg):
        axes.bar(shares.index * width, shares, width=width, color=_SOFT)
        axes.axvline(0, color=_INK, linewidth=1)
        percent_axis(axes.yaxis)
        reach = max(0.1, *(abs(i) * width for i in shares[shares > 0.0005].index)) + width
        axes.set_xlim(-reach, reach)
        axes.set(xlabel="score in B less score in A", ylabel="share of images")
    return svg()


def _shares_svg(classes: pd.DataFrame, *, most: int = 15) -> str:
    """Draw the largest changes of a label's share with their 95 % intervals."""
    shown = classes.head(most).iloc[::-1]
    tips = {f"{y}": _tip(row) for y, row in enumerate(shown.to_dict("records"))}
    description, height = "Change of each label's share from A to B.", 1.0 + 0.27 * len(shown)
    with chart("Changes of share", description, tips, height=height) as (axes, svg):
        axes.axvline(0, color=_INK, linewidth=1)
        for y, row in enumerate(shown.to_dict("records")):
            interval = [row["share_change_low"], row["share_change_high"]]
            axes.plot(interval, [y, y], color=_SOFT, linewidth=2, solid_capstyle="butt")
            colour = _B if row["share_change"] > 0 else _A
            axes.plot([row["share_change"]], [y], "o", color=colour, markersize=5.5, gid=f"tip-{y}")
        axes.set_yticks(range(len(shown)), [_short(label) for label in shown["label"]])
        axes.grid(visible=False, axis="y")
        percent_axis(axes.xaxis)
        axes.set_xlabel("change of share from A to B")
    return svg()


def _short(label: str, most: int = 28) -> str:
    text = "".join(char if char.isprintable() else " " for char in label)
    return text if len(text) <= most else text[: most - 1] + "…"


def _tip(row: Mapping[Any, Any]) -> str:
    return f"{row['label']}: {row['images_a']:,} images in A, {row['images_b']:,} in B"

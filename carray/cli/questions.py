"""The commands that answer questions about predictions, show them as a page, and compare two runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from carray.cli.options import Column, Predictions, SeedOption, new_file_option, path_argument, path_option, refuse
from carray.core.limits import MOST_COUNT
from carray.core.progress import print_result, say

__all__ = ["compare", "query", "report"]


def query(
    predictions: Predictions,
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION|SQL", help="A question's name, or SQL over the table predictions; without it, a summary."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        path_option("--labels", "True labels: a manifest, or a Parquet, CSV or TSV file with uri and label."),
    ] = None,
    column: Column = None,
    other: Annotated[str | None, path_option("--other", "Predictions of another run over the same images.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_COUNT, help="The most rows of the answer; 0 is all. Default: 1000 for a list."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="table, csv, json or parquet; default: by the suffix of --out, else table.")
    ] = None,
    out: Annotated[str | None, new_file_option("File for the answer; local or s3://.")] = None,
) -> None:
    """Summarise predictions, or answer a named question or SQL about them (DuckDB's dialect, read-only).

    Counts: by-make, by-label, by-year. Lists: uncertain, failed, near-duplicates. With --labels: accuracy,
    accuracy-by-class, accuracy-by-split. With --other: disagreements. SQL sees the table `predictions`, and `labels`
    and `other` where they are given.

    Reads PREDICTIONS/*.parquet, only the columns of the question. Writes nothing except --out. A CSV cell that a
    spreadsheet would run as a formula gets an apostrophe in front.

    Cost: see results/query.csv.

    Example: `carray query predictions "select make, count(*) n from predictions group by make order by n desc"`
    """
    from carray import queries
    from carray.core.uri_tables import parse_columns
    from carray.queries.answers import choose_format, jsonable

    chosen, named = choose_format(format, out), parse_columns(column or []) or None
    if question is not None and named and labels is None:
        refuse("--column is given without --labels, the table whose columns it names; leave it out.")
    given: dict[str, Any] = {"labels": labels, "column": named, "other": other, "limit": limit}
    if question is None:
        unused = [name for name, value in (given | {"out": out}).items() if value is not None]
        unused += [] if chosen in ("table", "json") else [f"format {chosen}"]
        if unused:
            refuse(f"--{unused[0]} belongs to a question, and none is asked; name one, or write SQL.")
        found = queries.summarize(predictions)
        typer.echo(json.dumps(jsonable(found), ensure_ascii=False) if chosen == "json" else queries.summary_text(found))
        return
    if len(question.split()) > 1:
        frame = queries.query(predictions, question, **given)
    else:
        frame = queries.ask_question(question, predictions, **given)
    if limit is None and len(frame) == queries.LIST_ROWS:
        say(f"these are the first {len(frame):,} rows; --limit 0 gives all.")
    origin = {"predictions": predictions, "question": question, "labels": labels, "other": other}
    text = queries.write_answer(frame, format=chosen, out=out, origin=origin)
    if text is None:
        print_result({"out": out, "rows": len(frame), "columns": list(frame.columns)})
    else:
        typer.echo(text)


def compare(
    a: Annotated[str, path_argument("A", "Predictions folder; with --manifest, a bundle.")],
    b: Annotated[str, path_argument("B", "What to compare A with, of the same kind.")],
    out: Annotated[str | None, path_option("--out", "Folder for the page and tables; local or s3://.")] = None,
    manifest: Annotated[
        str | None, path_option("--manifest", "Compare two bundles on a split of this manifest.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="With --manifest: train, val or test (the default).")] = None,
    runtime: Annotated[
        str | None, typer.Option(help="With --manifest: fp32 (the default), int8, bf16 or torch-bf16.")
    ] = None,
) -> None:
    """Compare two runs over the same images, or two bundles on one manifest: what changed, by how much, who is right.

    Reads uri, status, label, score and etag of both runs. Writes OUT/index.html (the page), flips.parquet,
    classes.parquet and comparison.json; without --out it only prints the headline.

    Cost: see results/query.csv; with --manifest, that of evaluating both bundles.

    Example: `carray compare predictions/may predictions/june --out may-to-june`
    """
    from carray.pages.comparison import compare_bundles, compare_runs, comparison_text

    for name, value in (("split", split), ("runtime", runtime)):
        if manifest is None and value is not None:
            refuse(f"--{name} is {value!r}, but no --manifest is given; name one.")
    if manifest is not None:
        if out is None:
            refuse("--manifest is given without --out, where the evaluations go; name a folder.")
        found = compare_bundles(a, b, manifest, split=split or "test", out=out, runtime=runtime or "fp32")
    else:
        found = compare_runs(a, b, out=out)
    typer.echo(comparison_text(found))
    print_result({"agreement": found["agreement"]["rate"], "images": found["agreement"]["images"], "out": out})


def report(
    predictions: Predictions,
    out: Annotated[str, new_file_option("Page to write, such as report.html; local or s3://.", suffix=".html")],
    thumbnails: Annotated[
        int, typer.Option(metavar="N", help="Images read again at most, for small pictures; 0 reads none.")
    ] = 300,
    seed: SeedOption = 0,
) -> None:
    """Show what is in a bucket: one page of counts, failures, folders, near duplicates, and a gallery with filters.

    Reads OUT/*.parquet of carray classify, and of the images a few hundred again. Writes one HTML file that needs no
    network and nothing beside it. The last line of output is one JSON document.

    The page holds small copies of photographs, which may show number plates and faces; `--thumbnails 0` leaves them
    out.

    Cost: a few reads of the counted columns, and one request a thumbnail; about 10 s for a few thousand rows.

    Example: `carray report predictions --out report.html`
    """
    from carray.pages.bucket import write_page

    print_result(write_page(predictions, out=out, thumbnails=thumbnails, seed=seed))

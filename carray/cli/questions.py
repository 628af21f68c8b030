"""The commands that ask predictions a question, and lay two runs beside each other."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from carray.cli.options import Column, Predictions, new_file, path
from carray.core.limits import MOST_COUNT

__all__ = ["compare", "query"]

Limit = Annotated[
    int | None, typer.Option(min=0, max=MOST_COUNT, help="Rows of the answer at most; a list has 1000. 0 is all.")
]


def query(
    predictions: Predictions,
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION|SQL", help="A question's name, or SQL over `predictions`; else a summary."),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="Manifest, or Parquet, CSV or TSV with uri and label.", parser=path("--labels")),
    ] = None,
    column: Column = None,
    other: Annotated[str | None, typer.Option(help="Another run over the same images.", parser=path("--other"))] = None,
    limit: Limit = None,
    format: Annotated[
        str | None, typer.Option(help="table, csv, json or parquet; by OUT's suffix if unset, else table.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="File for the answer; local or s3://.", parser=new_file("--out")),
    ] = None,
) -> None:
    """Summarise predictions, or ask them a question by its name or in SQL (DuckDB's dialect, read-only).

    Counts: by-make, by-label, by-year. Lists: uncertain, failed, near-duplicates. With --labels: accuracy,
    accuracy-by-class, accuracy-by-split. With --other: disagreements. SQL sees the tables `predictions`, and `labels`
    and `other` where they are given.

    Reads PREDICTIONS/*.parquet, only the columns that the question names; writes nothing but OUT. A CSV cell that a
    spreadsheet would run as a formula gets an apostrophe before it.

    Cost: see results/query.csv; the columns that the question names are read, no others.

    Example: `carray query predictions "select make, count(*) n from predictions group by make order by n desc"`
    """
    from carray import queries
    from carray.core.progress import print_result, say
    from carray.core.uri_tables import parse_columns
    from carray.queries.answers import choose_format, jsonable

    chosen, named = choose_format(format, out), parse_columns(column or []) or None
    if question is None:
        _refuse_beside_summary(
            format=chosen, labels=labels, column="given" if column else None, other=other, limit=limit, out=out
        )
        summary = queries.summarize(predictions)
        typer.echo(
            json.dumps(jsonable(summary), ensure_ascii=False) if chosen == "json" else queries.summary_text(summary)
        )
        return
    _check_labels(labels, named)
    given: dict[str, Any] = {"labels": labels, "column": named, "other": other, "limit": limit}
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


def _check_labels(labels: str | None, named: dict[str, str] | None) -> None:
    from carray.core.errors import SettingsError

    if named and labels is None:
        raise SettingsError("--column is given without --labels, the table whose columns it names; leave it out.")


def _refuse_beside_summary(*, format: str, **given: str | int | None) -> None:
    from carray.core.errors import SettingsError

    odd = [name for name, value in given.items() if value is not None]
    odd += [] if format in ("table", "json") else [f"format {format}"]
    if odd:
        raise SettingsError(f"--{odd[0]} belongs to a question, and none is asked; name one, or write SQL.")


def compare(
    a: Annotated[
        str,
        typer.Argument(metavar="A", help="Folder of predictions; a bundle with --manifest.", parser=path("A")),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with, of the same kind.", parser=path("B"))],
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for page and tables; local or s3://.", parser=path("--out"))
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(help="Score a split of this manifest with two bundles.", parser=path("--manifest")),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the manifest: train, val or test (the default).")] = None,
    runtime: Annotated[str | None, typer.Option(help="Of the bundles: fp32 (the default), int8, torch-bf16.")] = None,
) -> None:
    """Compare two runs over the same images, or two bundles over one manifest: what changed, by how much, who is right.

    Reads uri, status, label, score and etag of both. Writes OUT/index.html (the page), flips.parquet, classes.parquet
    and comparison.json; without --out only the headline, to the terminal.

    Cost: see results/query.csv; with --manifest, that of evaluating both bundles.

    Example: `carray compare predictions/may predictions/june --out may-to-june`
    """
    from carray.comparison.build import compare_bundles, compare_runs, comparison_text
    from carray.core.progress import print_result

    _check_together(manifest=manifest, out=out, split=split, runtime=runtime)
    if manifest is not None and out is not None:
        found = compare_bundles(a, b, manifest, split=split or "test", out=out, runtime=runtime or "fp32")
    else:
        found = compare_runs(a, b, out=out)
    typer.echo(comparison_text(found))
    print_result({"agreement": found["agreement"]["rate"], "images": found["agreement"]["images"], "out": out})


def _check_together(*, manifest: str | None, out: str | None, **of_manifest: str | None) -> None:
    from carray.core.errors import SettingsError

    if manifest is not None and out is None:
        raise SettingsError("--manifest is given without --out, where the evaluations go; name a folder.")
    if manifest is None:
        for name, value in of_manifest.items():
            if value is not None:
                raise SettingsError(f"--{name} is {value!r}, but no --manifest is given; name one.")

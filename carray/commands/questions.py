"""The commands that ask predictions a question."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["query"]


def query(
    predictions: Annotated[str, typer.Argument(metavar="PREDICTIONS", help="Folder that carray classify wrote.")],
    sql: Annotated[str | None, typer.Argument(help="SQL over the table `predictions`; without it, a summary.")] = None,
) -> None:
    """Summarise predictions, or ask them a question in SQL (DuckDB's dialect, read-only).

    Reads OUT/*.parquet, only the columns that the question names; writes nothing.

    Cost: the columns that the question names are read, no others.

    Example: `carray query predictions "select make, count(*) n from predictions group by make order by n desc"`
    """
    from carray import queries

    if sql is None:
        typer.echo(queries.summary_text(queries.summarize(predictions)))
    else:
        typer.echo(queries.query(predictions, sql).to_string(index=False, max_rows=1000))

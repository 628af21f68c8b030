"""Asks finished predictions: as pandas frames, by named questions, and in SQL.

From: a folder of predictions (or one Parquet file of them), local or S3. To: frames with declared dtypes.
Invariants: only data files are read, never `_carray/`; columns and filters are pushed down into the files, so a
question about two columns of ten thousand files reads two columns; SQL sees the one table `predictions` and can
neither read nor write any other file; nothing here changes a file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.progress import say
from carray.core.storage import absolute, exists, filesystem, join, list_files, retry

__all__ = [
    "QUESTIONS",
    "UNCERTAIN_SCORE",
    "by_make",
    "by_year",
    "failed",
    "near_duplicates",
    "query",
    "read_predictions",
    "summarize",
    "summary_text",
    "uncertain",
]

UNCERTAIN_SCORE = 0.5
"""Below it a label is more likely wrong than right, if the scores are calibrated."""

T = TypeVar("T")

_DONE = "_carray/done.json"
_TYPES = {
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Whole numbers stay whole beside nulls; pandas' own default turns a year with gaps into 2012.0."""


def read_predictions(
    path: str, columns: Sequence[str] | None = None, filters: Sequence[Any] | None = None
) -> pd.DataFrame:
    """Read predictions as a frame, with the same dtypes whatever the rows hold.

    Args:
        path: the output folder of a classification, or one Parquet file.
        columns: the columns to read, in this order; all by default.
        filters: conditions as pandas takes them, `[("score", "<", 0.5), ("make", "==", "Audi")]`, which must all hold;
            a list of such lists holds when any of them does.

    Raises:
        SchemaError: the folder holds no predictions, or a column is not among theirs.
        SettingsError: the filters are not understood.
        StorageError: the files cannot be read.
    """
    data = _open(path)
    _check_columns([*(columns or ()), *_filtered_columns(filters)], data.schema)
    chosen, condition = list(columns) if columns is not None else None, _expression(filters, data.schema)
    return _to_frame(_read(lambda: data.to_table(columns=chosen, filter=condition), path))


def query(path: str, sql: str) -> pd.DataFrame:
    """Answer one SQL query over the table `predictions`, in DuckDB's dialect.

    Raises:
        SchemaError: the folder holds no predictions.
        SettingsError: DuckDB refuses the query.
        StorageError: the files cannot be read.
    """
    return _ask(_open(path), sql)


def by_make(path: str) -> pd.DataFrame:
    """Count images by make, the most frequent first, with their mean score and how many are uncertain."""
    return query(path, _COUNTS.format(column="make", order="images DESC, make"))


def by_year(path: str) -> pd.DataFrame:
    """Count images by model year, in order, with their mean score and how many are uncertain."""
    return query(path, _COUNTS.format(column="year", order="year"))


def uncertain(path: str) -> pd.DataFrame:
    """List the images whose best score is below UNCERTAIN_SCORE, the closest races first: a list for labelling."""
    return query(
        path,
        f"SELECT uri, label, score, margin, top5_labels, top5_scores FROM predictions "
        f"WHERE status = 'ok' AND score < {UNCERTAIN_SCORE} ORDER BY margin, uri",
    )


def failed(path: str) -> pd.DataFrame:
    """List the images that could not be scored, by kind, with the reason."""
    return query(
        path,
        "SELECT uri, status, error_code, error FROM predictions WHERE status <> 'ok' ORDER BY status, error_code, uri",
    )


def near_duplicates(path: str) -> pd.DataFrame:
    """List the images that share their perceptual hash with another, largest group first."""
    return query(
        path,
        "SELECT phash, count(*) OVER (PARTITION BY phash) AS images, uri, label, score FROM predictions "
        "WHERE phash IS NOT NULL QUALIFY images > 1 ORDER BY images DESC, phash, uri",
    )


_COUNTS = (
    "SELECT {column}, count(*) AS images, avg(score) AS mean_score, "
    f"count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain "
    "FROM predictions WHERE status = 'ok' GROUP BY {column} ORDER BY {order}"
)

QUESTIONS: Mapping[str, Callable[[str], pd.DataFrame]] = {
    "by-make": by_make,
    "by-year": by_year,
    "uncertain": uncertain,
    "failed": failed,
    "near-duplicates": near_duplicates,
}
"""The named questions, as the command line calls them."""


def summarize(path: str, *, top: int = 10) -> dict[str, Any]:
    """Count rows by status, error kind, make and label (the `top` most frequent), with mean score and uncertain ones.

    Raises:
        SchemaError: the folder holds no predictions.
        StorageError: the files cannot be read.
    """
    data = _open(path)

    def counts(column: str, where: str, limit: int) -> dict[str, int]:
        frame = _ask(
            data,
            f"SELECT {column} AS name, count(*) AS images FROM predictions WHERE {where} AND {column} IS NOT NULL "
            f"GROUP BY {column} ORDER BY images DESC, name LIMIT {limit}",
        )
        return dict(zip(frame["name"], frame["images"].astype(int).tolist(), strict=True))

    by_status = counts("status", "true", 100)
    totals = _ask(
        data,
        f"SELECT avg(score) AS mean_score, count(*) FILTER (score < {UNCERTAIN_SCORE}) AS uncertain "
        "FROM predictions WHERE status = 'ok'",
    ).iloc[0]
    return {
        "path": absolute(path),
        "rows": sum(by_status.values()),
        "by_status": by_status,
        "error_codes": counts("error_code", "status <> 'ok'", 100),
        "mean_score": None if pd.isna(totals["mean_score"]) else float(totals["mean_score"]),
        "uncertain": int(totals["uncertain"]),
        "top_makes": counts("make", "status = 'ok'", top),
        "top_labels": counts("label", "status = 'ok'", top),
    }


def summary_text(summary: Mapping[str, Any]) -> str:
    """Say a summary in a few lines for a person."""

    def listed(counts: Mapping[str, int]) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "none"

    score = "none" if summary["mean_score"] is None else f"{summary['mean_score']:.3f}"
    return "\n".join(
        [
            f"{summary['rows']:,} images in {summary['path']}",
            f"  status      {listed(summary['by_status'])}",
            f"  errors      {listed(summary['error_codes'])}",
            f"  mean score  {score}; {summary['uncertain']:,} images below {UNCERTAIN_SCORE}",
            f"  makes       {listed(summary['top_makes'])}",
            f"  labels      {listed(summary['top_labels'])}",
        ]
    )


def _open(path: str) -> pads.Dataset:
    path = absolute(path)
    if path.endswith(".parquet") and exists(path):
        files = [path]
    else:
        files = [uri for uri in list_files(path) if uri.endswith(".parquet")]
        if not files:
            raise SchemaError(
                f"{path} holds no Parquet file, so it is no folder of predictions; give the --out of carray classify."
            )
        if not exists(join(path, _DONE)):
            _warn_unfinished(path)
    fs, _ = filesystem(path)
    places = [filesystem(uri)[1] for uri in files]
    data = _read(lambda: pads.dataset(places, filesystem=fs, format="parquet"), path)
    missing = [name for name in ("uri", "status") if name not in data.schema.names]
    if missing:
        raise SchemaError(
            f"{path} lacks the column {', '.join(missing)}, so it is no folder of predictions (it has "
            f"{', '.join(data.schema.names)}); give the --out of carray classify."
        )
    return data


@lru_cache
def _warn_unfinished(path: str) -> None:
    """Say so once: a report asks a run many questions."""
    say(f"warning: {path} is unfinished (it has no {_DONE}); run the same carray classify again to finish it.")


def _read(action: Callable[[], T], path: str) -> T:
    try:
        return retry(action, what=f"reading {path}")
    except FileNotFoundError as err:
        raise StorageError(f"{path} lost a file while it was read ({err}); try again.") from None
    except pa.ArrowInvalid as err:
        reason = " ".join(str(err).split())[:300]
        raise SchemaError(f"{path} holds a file that is not readable Parquet ({reason}); classify again.") from None


def _check_columns(names: Sequence[str], schema: pa.Schema) -> None:
    for name in names:
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(schema.names)}."
            raise SchemaError(f"{name!r} is not a column of these predictions; {hint}")


def _filtered_columns(filters: Sequence[Any] | None) -> list[str]:
    conditions = [c for part in filters or () for c in (part if isinstance(part, list) else [part])]
    if not all(isinstance(c, tuple) and len(c) == 3 and isinstance(c[0], str) for c in conditions):
        raise SettingsError(f"filters is {filters!r}; write conditions as [('score', '<', 0.5)].")
    return [c[0] for c in conditions]


def _expression(filters: Sequence[Any] | None, schema: pa.Schema) -> Any:
    from pyarrow.parquet import filters_to_expression

    if not filters:
        return None
    try:
        expression = filters_to_expression(list(filters))
        pads.Scanner.from_batches(schema.empty_table().to_batches(), schema=schema, filter=expression)
        return expression
    except (ValueError, TypeError, pa.ArrowNotImplementedError) as err:
        raise SettingsError(f"filters is {filters!r}: {' '.join(str(err).split())[:200].rstrip('.')}.") from None


def _ask(data: pads.Dataset, sql: str) -> pd.DataFrame:
    import duckdb

    with duckdb.connect(":memory:") as connection:
        connection.register("predictions", data)
        # Whoever may ask a question may not thereby read or write this machine's other files.
        connection.execute("SET enable_external_access = false")
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET lock_configuration = true")
        try:
            answer = connection.sql(sql)
            table = None if answer is None else answer.to_arrow_table()
        except duckdb.Error as err:
            message = " ".join(str(err).split("\n\n")[0].split())
            raise SettingsError(f"the SQL is refused ({message}); the one table is predictions.") from None
    if table is None:
        raise SettingsError(f"the SQL {sql!r} gives no table; write a SELECT over predictions.")
    return _to_frame(table)


def _to_frame(table: pa.Table) -> pd.DataFrame:
    # DuckDB sums whole numbers to 128 bits, which Arrow calls a decimal and pandas would keep as objects.
    for i, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            kind = pa.int64() if field.type.scale == 0 else pa.float64()
            table = table.set_column(i, field.name, table.column(i).cast(kind))
    frame: pd.DataFrame = table.to_pandas(types_mapper=_TYPES.get)
    return frame

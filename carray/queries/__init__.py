"""queries: finished predictions as pandas frames, by named questions and in SQL; nothing here changes a file.

predictions/part-*.parquet        one row an image; local or S3
    |  reading.read_predictions   columns and filters, pushed down into the files
    |  questions: by_make, ...     named questions: a path -> a frame
    |  sql.query                  one SELECT over the table `predictions`, in DuckDB's dialect
    v
a frame with declared dtypes      answers.write_answer: text, CSV, JSON or Parquet

For pages: `tallies` counts predictions and chooses rows to show, `compare` joins two runs.
"""

from carray.queries.answers import FORMATS, write_answer
from carray.queries.questions import (
    LIST_ROWS,
    QUESTIONS,
    UNCERTAIN_SCORE,
    accuracy,
    accuracy_by_class,
    accuracy_by_split,
    ask_question,
    by_label,
    by_make,
    by_year,
    disagreements,
    failed,
    near_duplicates,
    summarize,
    summary_text,
    uncertain,
)
from carray.queries.reading import open_labels, open_predictions, read_predictions, to_frame
from carray.queries.sql import connect, query

__all__ = [
    "FORMATS",
    "LIST_ROWS",
    "QUESTIONS",
    "UNCERTAIN_SCORE",
    "accuracy",
    "accuracy_by_class",
    "accuracy_by_split",
    "ask_question",
    "by_label",
    "by_make",
    "by_year",
    "connect",
    "disagreements",
    "failed",
    "near_duplicates",
    "open_labels",
    "open_predictions",
    "query",
    "read_predictions",
    "summarize",
    "summary_text",
    "to_frame",
    "uncertain",
    "write_answer",
]

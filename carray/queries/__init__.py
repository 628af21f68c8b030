"""queries: finished predictions, asked as pandas frames, by named questions and in SQL.

    predictions/part-*.parquet        one row an image; local or S3
        |  read_predictions           columns and filters, pushed down into the files
        |  by_make, uncertain, ...    named questions: a path -> a frame
        |  query                      one SELECT over the table `predictions`, in DuckDB's dialect
        v
    a frame with declared dtypes

1. reading    a path -> an opened table, or a frame of it (labels: a table of true labels)
2. sql        opened tables -> a locked DuckDB that answers one SELECT; guard refuses what is no reading
3. questions  the named questions; truth: those that need a second table
4. summary    a run in six lines
5. answers    a frame -> text, CSV, JSON or Parquet

Invariants: only data files are read, never `_carray/`; a question about two columns of ten thousand files reads two
columns; memory is bounded, what exceeds it goes to a temporary folder; nothing here changes a file.
"""

from carray.queries.answers import FORMATS, write_answer
from carray.queries.labels import open_labels
from carray.queries.questions import (
    LIST_ROWS,
    QUESTIONS,
    UNCERTAIN_SCORE,
    ask_question,
    by_label,
    by_make,
    by_year,
    failed,
    near_duplicates,
    uncertain,
)
from carray.queries.reading import open_predictions, read_predictions, to_frame
from carray.queries.sql import connect, query
from carray.queries.summary import summarize, summary_text
from carray.queries.truth import accuracy, accuracy_by_class, accuracy_by_split, disagreements

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

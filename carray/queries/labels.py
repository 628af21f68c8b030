"""Opens a table of true labels: a manifest, or any Parquet, CSV or TSV file with the columns uri and label.

Invariants: what is read is text; a uri is compared as it stands, so it has to be spelled as the predictions spell it.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from carray.core.errors import SchemaError, StorageError
from carray.core.storage import absolute, exists, filesystem
from carray.queries.reading import column_names, guarded_read

__all__ = ["open_labels"]

_COLUMNS = ("uri", "label")


def open_labels(path: str) -> pads.Dataset:
    """Open a table of true labels, local or S3.

    Raises:
        SchemaError: it lacks the column uri or label, or is no such table.
        StorageError: it does not exist or cannot be read.
    """
    path = absolute(path)
    if not exists(path):
        raise StorageError(f"{path} does not exist; give a manifest, or a Parquet, CSV or TSV file with uri and label.")
    fs, place = filesystem(path)
    kind = "parquet" if path.lower().endswith(".parquet") else _text_format(path)
    try:
        data = guarded_read(lambda: pads.dataset([place], filesystem=fs, format=kind), path)
    except SchemaError:
        raise SchemaError(f"{path} is not a readable table; give a .parquet, .csv or .tsv file.") from None
    names = column_names(data, path)
    missing = [name for name in _COLUMNS if name not in names]
    if missing:
        raise SchemaError(
            f"{path} lacks the column {', '.join(missing)}; a table of labels has uri and label (it has "
            f"{', '.join(names)})."
        )
    return data


def _text_format(path: str) -> pads.CsvFileFormat:
    return pads.CsvFileFormat(
        parse_options=pacsv.ParseOptions(
            delimiter="\t" if path.lower().endswith(".tsv") else ",",
            newlines_in_values=True,  # a key may hold one
        ),
        convert_options=pacsv.ConvertOptions(
            column_types={name: pa.string() for name in (*_COLUMNS, "split")},
            null_values=[""],  # a class may be called NA or null: only an empty field is a missing one
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )

"""Reads a table of images, which has a column of URIs: CSV, TSV or Parquet, local or S3, in batches of rows.

Every command that takes such a table reads it here, so column names, spellings of URIs and error sentences are the same
everywhere. A column that is not asked for never stops a job; of a text only an empty cell is null.
Memory: one batch. Cost: 2 microseconds a row of CSV.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import absolute, is_s3, join
from carray.core.store.random_access import open_file
from carray.core.tables import table_metadata
from carray.core.text import one_line, readable

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BOX", "COLUMNS", "TABLE_SUFFIXES", "TableRows", "UriTable", "parse_columns"]

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
BOX = ("x1", "y1", "x2", "y2")
COLUMNS = ("uri", "label", "split", *BOX)
"""The names that `--column` takes."""
BATCH_ROWS = 32_768

_OTHER_NAMES = {
    "uri": {"file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path", "img_path"},
    "label": {"class", "class_name", "category", "target"},
}
"""Names that other programs give a column, in any case of letters."""
_DELIMITERS = (",", ";", "\t")
_BYTES_AT_ONCE = 1 << 22
_ABSOLUTE_S3 = r"^s3://[^/@]+/(?s:.)"
_UNNORMALISED_PATH = r"^[^/]|//|/\.|/$|\x00"
"""A local path that matches is relative or not normalised; only such URIs are completed one by one."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]")


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """Read `--column` texts, such as uri=path, into a mapping from COLUMNS to the table's own column names.

    Raises:
        SettingsError: a text is not NAME=COLUMN, its NAME is unknown, or given twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        what, equals, name = text.partition("=")
        if not equals or not name or what not in COLUMNS:
            raise SettingsError(
                f"--column {text!r} is not NAME=COLUMN with NAME one of {', '.join(COLUMNS)}; write for example "
                "--column uri=path."
            )
        if what in named:
            raise SettingsError(f"--column names {what} twice ({named[what]!r} and {name!r}); give it once.")
        named[what] = name
    return named


class UriTable:
    """A table of images whose header has been read."""

    def __init__(
        self,
        uri: str,
        *,
        required: Sequence[str] = ("uri",),
        optional: Sequence[str] = (),
        hints: Sequence[str] = (),
        named: Mapping[str, str] | None = None,
        keep_others: bool = False,
        option: bool = True,
    ) -> None:
        """Read a table's header and find its columns.

        Args:
            uri: The table.
            required: Columns that must be there.
            optional: Columns that are read where they exist; an ambiguous one is an error.
            hints: Columns that are read where exactly one has that very name.
            named: The table's own names of columns, as from `parse_columns`.
            keep_others: Whether to read all other columns, too.
            option: Whether the command has the option `--column`, which error sentences then name.

        Raises:
            SchemaError: it is no table, lacks a required or named column, or several columns match one name.
            StorageError: it does not exist or cannot be read.
        """
        self.uri, self.folder, self._named = uri, uri.rsplit("/", 1)[0], dict(named or {})
        self._option = option
        self.is_parquet = uri.lower().endswith(".parquet")
        """Whether columns have types; in a text file all are text."""
        self._text = None if self.is_parquet else self._open_text()
        header = self._text.header if self._text else _parquet_names(uri)
        self.columns: dict[str, str] = {}
        """The columns that are read: our name to the table's own name."""
        for what in (*required, *optional):
            found = self._find(what, header)
            if len(found) > 1:
                raise SchemaError(self._ambiguous(what, found))
            if found:
                self.columns[what] = found[0]
        self._check_found(required, header)
        self.columns |= {name: name for name in hints if header.count(name) == 1}
        if keep_others:
            taken = {*self.columns, *self.columns.values()}
            self.columns |= {name: name for name in header if name not in taken and header.count(name) == 1}

    def batches(self) -> Iterator[TableRows]:
        """Read the table's rows in order.

        Raises:
            SchemaError: a row is longer or shorter than the header, or the file is damaged.
            StorageError: storage failed.
        """
        names = list(self.columns.values())
        batches = self._text.batches(names) if self._text else _parquet_batches(self.uri, names)
        for columns, where in batches:
            yield TableRows(self, dict(zip(self.columns, columns, strict=True)), where)

    def _open_text(self) -> _TextFile:
        own = "\t" if self.uri.lower().endswith(".tsv") else ","
        files = [_open_text(self.uri, own)]
        for delimiter in (other for other in _DELIMITERS if other != own):
            if self._find("uri", files[-1].header):
                return files[-1]
            files.append(_open_text(self.uri, delimiter))
        return files[-1] if self._find("uri", files[-1].header) else files[0]

    def _find(self, what: str, header: Sequence[str]) -> list[str]:
        if what in self._named:
            return [name for name in header if name == self._named[what]]
        free = [name for name in header if name not in self._named.values()]
        others = _OTHER_NAMES.get(what, set())
        ranks = (
            [name for name in free if name == what],
            [name for name in free if name.lower() == what],
            [name for name in free if name.lower().replace(" ", "_") in others],
        )
        return next((found for found in ranks if found), [])

    def _ambiguous(self, what: str, found: Sequence[str]) -> str:
        if len(set(found)) == 1:
            return f"{self.uri} has the column {readable(found[0])} {len(found)} times; give each its own name."
        names = ", ".join(map(readable, found))
        return f"{self.uri} has {len(found)} columns that may be {what} ({names}); {self._remedy(what)}"

    def _check_found(self, required: Sequence[str], header: Sequence[str]) -> None:
        missing = [what for what in required if what not in self.columns]
        missing += [what for what in self._named if self._named[what] not in header and what not in missing]
        if not missing:
            return
        names = [f"{readable(self._named[what])} (for {what})" if what in self._named else what for what in missing]
        seen = ", ".join(readable(name)[:40] for name in header[:30]) or "none"
        where = "its first line" if self._text else "it"
        raise SchemaError(
            f"{self.uri} lacks the column {', '.join(names)}; {where} has {seen}; {self._remedy(missing[0])}"
        )

    def _remedy(self, what: str) -> str:
        if self._option:
            return f"say which column it is: --column {what}=NAME."
        return f"give one column the name {what}."


class TableRows:
    """A batch of a table's rows, with its columns under our names."""

    def __init__(self, table: UriTable, columns: dict[str, pa.Array], where: Callable[[int], str]) -> None:
        self._table, self.columns, self._where = table, columns, where

    def __len__(self) -> int:
        """Count the rows of the batch."""
        return len(self.columns["uri"])

    def where(self, row: int) -> str:
        """Name the file and the line or row of it that a row of this batch comes from."""
        return f"{self._table.uri}, {self._where(row)}"

    def uris(self) -> pa.Array:
        """Normalise the URIs; a relative one is relative to the table's folder, `~/` is the home folder.

        Raises:
            SchemaError: a row has no URI, or one that is a bucket, has a scheme other than s3, or carries credentials.
        """
        uris = self.texts("uri")
        if uris.null_count:
            raise SchemaError(f"{self.where(_first(pc.is_null(uris)))}, has no uri; every row needs one.")
        is_s3_uri, unnormalised = (
            pc.match_substring_regex(uris, pattern) for pattern in (_ABSOLUTE_S3, _UNNORMALISED_PATH)
        )
        if pc.all(pc.or_(is_s3_uri, pc.invert(unnormalised))).as_py() is not False:
            return uris
        complete = []
        for row, uri in enumerate(uris.to_pylist()):
            try:
                complete.append(_complete(uri, self._table.folder))
            except SettingsError as err:
                raise SchemaError(f"{self.where(row)}: {err}") from None
        return pa.array(complete, pa.string())

    def texts(self, name: str) -> pa.Array:
        """Read a column as text, null where it is empty; a whole number in a float column becomes `1`, not `1.0`.

        Raises:
            SchemaError: its type cannot be text.
        """
        values = self.columns[name]
        if isinstance(values.type, pa.DictionaryType):
            values = values.dictionary_decode()
        if pa.types.is_floating(values.type):
            values = pa.array(map(_number_text, values.cast(pa.float64()).to_pylist()), pa.string())
        try:
            texts = values.cast(pa.string())
        except (pa.ArrowException, ValueError):
            raise SchemaError(
                f"{self._table.uri} has the column {readable(self._table.columns[name])} of type {values.type}, "
                f"which is not text; {self._table._remedy(name)}"
            ) from None
        blank = pc.equal(pc.utf8_length(texts if name != "uri" else pc.utf8_trim_whitespace(texts)), 0)
        return pc.if_else(blank, pa.scalar(None, pa.string()), texts)

    def flags(self, name: str) -> pa.Array:
        """Read a column as booleans, false where a cell is neither, or where there is no such column."""
        values = self.columns.get(name)
        if values is None:
            return pa.repeat(False, len(self))
        if pa.types.is_string(values.type):  # of a CSV
            values = pc.equal(pc.utf8_lower(values), "true")
        return pc.fill_null(values, False) if pa.types.is_boolean(values.type) else pa.repeat(False, len(self))

    def hint(self, name: str, kind: pa.DataType) -> pa.Array:
        """Read a column that is not needed: null where a cell is not of that type."""
        values = self.columns[name]
        if pa.types.is_integer(kind) and pa.types.is_string(values.type):
            whole = pc.match_substring_regex(values, r"^\d{1,18}$")
            return pc.if_else(whole, values, pa.scalar(None, pa.string())).cast(kind)
        if pa.types.is_integer(kind):
            return values if values.type == kind else pa.array(self._numbers(name, 2**53)[0].astype("Int64"), kind)
        try:
            return self.texts(name)
        except SchemaError:
            return pa.nulls(len(self), kind)

    def boxes(self) -> dict[str, pa.Array]:
        """Read x1, y1, x2 and y2 as int32, null where a row has no box; empty where the table has no boxes.

        Raises:
            SchemaError: a column is missing, a box incomplete, or a value is no whole number of pixels.
        """
        found = [name for name in BOX if name in self.columns]
        if found and len(found) < len(BOX):
            raise SchemaError(
                f"{self._table.uri} lacks the column {', '.join(n for n in BOX if n not in found)}; a box needs all "
                "of x1, y1, x2 and y2."
            )
        boxes = {}
        for name in found:
            numbers, wrong = self._numbers(name, np.iinfo(np.int32).max)
            if wrong.any():
                raise SchemaError(self._wrong_box(name, int(wrong.argmax())))
            boxes[name] = pa.array(numbers.astype("Int32"), pa.int32())
        missing = sum(pc.is_null(values).to_numpy(zero_copy_only=False).astype(int) for values in boxes.values())
        partial_box = np.asarray((missing > 0) & (missing < len(BOX))).reshape(-1)
        if partial_box.any():
            raise SchemaError(
                f"{self.where(int(partial_box.argmax()))}, has an incomplete box; give all of x1, y1, x2, y2, or none."
            )
        return boxes

    def _wrong_box(self, name: str, row: int) -> str:
        value, corners = self.columns[name][row].as_py(), [_number(self.columns[corner][row].as_py()) for corner in BOX]
        remedy = "correct it"
        if all(abs(corner) <= 1 for corner in corners):
            remedy = "multiply fractions of the image by its width and height"
        elif math.isfinite(_number(value)) and _number(value) % 1:
            remedy = "round it"
        return (
            f"{self.where(row)}, has {str(value)[:80]!r} as {readable(self._table.columns[name])}; a box is whole "
            f"numbers of pixels, x2 and y2 exclusive; {remedy}."
        )

    def _numbers(self, name: str, most: int) -> tuple[pd.Series, Any]:
        import pandas as pd

        """Read a column's whole numbers, null elsewhere, and a mask of values that are none or exceed `most`."""
        values = pd.Series(self.columns[name].to_pylist(), dtype=object).replace("", None)
        try:
            numbers = pd.to_numeric(values, errors="coerce").astype("Float64")
        except (TypeError, ValueError):  # lists and the like
            numbers = pd.Series([pd.NA] * len(values), dtype="Float64")
        not_whole = ((numbers != numbers.round()) | (numbers.abs() > most)).fillna(False)
        wrong = (numbers.isna() & values.notna()) | not_whole
        return numbers.mask(wrong), wrong.to_numpy(dtype=bool)


@dataclass(frozen=True)
class _TextFile:
    """The format of a CSV or TSV file, and the names in its first line."""

    uri: str
    encoding: str
    delimiter: str
    spaced: bool
    """Whether a blank follows each delimiter, even before a quotation mark."""
    header: list[str]

    def batches(self, names: Sequence[str]) -> Iterator[tuple[list[pa.Array], Callable[[int], str]]]:
        """Read these columns in batches; with each, a function from a row's index to the line on which it begins."""
        wanted = [self.header.index(name) for name in names]
        for line, rows in _text_rows(self, BATCH_ROWS, skip_header=True):
            filled = self._filled_rows(line, rows)
            if filled:
                chosen = rows if len(filled) == len(rows) else [rows[row] for row in filled]
                arrays = [pa.array([cells[i] for cells in chosen], pa.string()) for i in wanted]
                yield arrays, partial(_nth_line, line, rows, filled)

    def _filled_rows(self, line: int, rows: list[list[str]]) -> Sequence[int]:
        """List the indices of the rows that are no blank lines; each must have the header's columns."""
        width = len(self.header)
        if set(map(len, rows)) == {width}:
            return range(len(rows))
        for row, cells in enumerate(rows):
            if (cells and len(cells) < width) or any(cell.strip() for cell in cells[width:]):
                raise SchemaError(
                    f"{self.uri}, line {_line(line, rows, row)}, has {len(cells)} fields where the first line names "
                    f"{width} columns; put a text that holds {self.delimiter!r} into quotation marks, or correct the "
                    "line."
                )
        return [row for row, cells in enumerate(rows) if cells]


def _open_text(uri: str, delimiter: str) -> _TextFile:
    with _sentences(uri), _open(uri) as stream:
        head = stream.read(2)
    # Spreadsheets write a byte order mark before UTF-8, too.
    encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    file = _TextFile(uri, encoding, delimiter, False, [])
    header = next((cells for _, rows in _text_rows(file, 1) for cells in rows if cells), None)
    if header is None:
        raise SchemaError(f"{uri} is empty; the first line of a table names its columns, such as uri.")
    names = [name.strip() for name in header]
    while len(names) > 1 and not names[-1]:
        names.pop()
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return replace(file, header=names, spaced=spaced)


def _text_rows(file: _TextFile, size: int, *, skip_header: bool = False) -> Iterator[tuple[int, list[list[str]]]]:
    """Read a text file's rows in batches, blank lines as empty rows, each with the line on which it begins."""
    with _sentences(file.uri), _open(file.uri) as stream:
        text = io.TextIOWrapper(stream, encoding=file.encoding, newline="")
        reader = csv.reader(text, delimiter=file.delimiter, skipinitialspace=file.spaced, strict=True)
        if skip_header:
            next((cells for cells in reader if cells), None)
        while True:
            line, rows = reader.line_num + 1, list[list[str]]()
            try:
                rows.extend(islice(reader, size))  # keeps the rows before an error
            except UnicodeDecodeError as err:
                line = reader.line_num + 1 + err.object[: err.start].count(b"\n")
                raise SchemaError(
                    f"{file.uri}, line {line}, is not {err.encoding.upper()}; save the table as CSV in UTF-8."
                ) from None
            except csv.Error as err:
                raise SchemaError(
                    f"{file.uri}, line {_line(line, rows, len(rows))}, has quotation marks that do not pair ({err}); "
                    "put a text into quotation marks as a whole, and double those inside it."
                ) from None
            if not rows:
                return
            yield line, rows


def _line(line: int, rows: Sequence[Sequence[str]], row: int) -> int:
    """Count from the line of the first row to that of another; a text in quotes may hold line ends."""
    return line + sum(1 + sum(len(_LINE_END.findall(cell)) for cell in cells) for cells in rows[:row])


def _nth_line(line: int, rows: Sequence[Sequence[str]], filled: Sequence[int], row: int) -> str:
    return f"line {_line(line, rows, filled[row])}"


def _nth_row(first: int, row: int) -> str:
    return f"row {first + row}"


def _parquet_names(uri: str) -> list[str]:
    table_metadata(uri)  # raises a sentence where it is not Parquet
    return list(pq.read_schema(open_file(uri)).names)


def _parquet_batches(uri: str, names: Sequence[str]) -> Iterator[tuple[list[pa.Array], Callable[[int], str]]]:
    first = 1
    with _sentences(uri), pq.ParquetFile(open_file(uri)) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(names)):
            batch.validate(full=True)  # Parquet's reader does not check that texts are UTF-8
            yield [batch[name] for name in names], partial(_nth_row, first)
            first += batch.num_rows


@contextmanager
def _sentences(uri: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = one_line(err, 200)
        raise SchemaError(f"{uri} is not a readable table ({reason}); it was damaged, so write it again.") from None
    except OSError as err:
        if not is_s3(uri) and err.errno is None:  # the disk answered: the content is damaged
            raise SchemaError(f"{uri} is not a readable table ({err}); it was damaged, so write it again.") from None
        raise StorageError(f"reading {uri} failed midway ({one_line(err)}); run it again.") from err


def _open(uri: str) -> Any:
    try:
        return pa.BufferedInputStream(open_file(uri), _BYTES_AT_ONCE)
    except FileNotFoundError:
        raise StorageError(f"{uri} does not exist; check its spelling.") from None


def _complete(uri: str, folder: str) -> str:
    """Make a URI of a table in `folder` absolute."""
    if "://" not in uri and _OTHER_ADDRESS.match(uri):
        raise SettingsError(f"{uri[:80]!r} is an address of another kind; allowed are s3://bucket/key and plain paths.")
    if uri.startswith(("/", "~/")) or "://" in uri:
        found = absolute(uri)
        if is_s3(found) and not found.removeprefix("s3://").partition("/")[2]:
            raise SettingsError(f"{found!r} is a bucket and not an image; write s3://bucket/key.")
        return found
    if not is_s3(folder):
        return absolute(join(folder, uri))
    if not {".", ".."} & set(uri.split("/")):
        return absolute(join(folder, uri))  # unnormalised: a key may hold `//`
    bucket, _, prefix = folder.removeprefix("s3://").partition("/")
    return absolute(f"s3://{bucket}{posixpath.normpath(f'/{prefix}/{uri}')}")


def _number_text(number: float | None) -> str | None:
    if number is None or number != number:
        return None
    return str(int(number)) if number.is_integer() else repr(number)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.inf


def _first(mask: pa.Array) -> int:
    return int(np.argmax(mask.to_numpy(zero_copy_only=False)))

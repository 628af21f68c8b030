"""Reads a table of images, which has a column of URIs: CSV, TSV or Parquet, local or S3, in batches of rows.

From: one file. To: `TableRows`, whose columns are asked for by what they hold.
Invariants: every row of the table is a row here, in its order; whoever reads a table, the names of columns, the
spellings of URIs and the sentences are the same; a column that is not asked for never stops a job; of a text only an
empty cell is null. Memory: one batch. Cost: 2 microseconds a row of CSV.
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
from itertools import islice, repeat
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from carray.core.errors import SchemaError, SettingsError, StorageError
from carray.core.store.files import absolute, filesystem, is_s3, join, retry
from carray.core.tables import table_metadata
from carray.core.text import readable

__all__ = ["BOX", "COLUMNS", "TABLE_SUFFIXES", "TableRows", "UriTable", "parse_columns"]

TABLE_SUFFIXES = (".parquet", ".csv", ".tsv")
BOX = ("x1", "y1", "x2", "y2")
COLUMNS = ("uri", "label", "split", *BOX)
"""What `--column` can name."""
BATCH_ROWS = 32_768

_OTHER_NAMES = {
    "uri": {"file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path", "img_path"},
    "label": {"class", "class_name", "category", "target"},
}
"""What other programs call a column, in any case of letters."""
_DELIMITERS = (",", ";", "\t")
_BYTES_AT_ONCE = 1 << 22
_WHOLE_S3 = r"^s3://[^/@]+/(?s:.)"
_ODD_PATH = r"^[^/]|//|/\.|/$|\x00"
"""What a local path that needs completing has; a URI that is neither whole nor plain is looked at by itself."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_OTHER_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:[/\\]")


def parse_columns(texts: Iterable[str]) -> dict[str, str]:
    """Read `--column` texts, such as uri=path: what a column holds, to its name in the table.

    Raises:
        SettingsError: a text is not NAME=COLUMN, names nothing that a table holds, or names it twice.
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
    """A table of images, whose header has been read and understood."""

    def __init__(
        self,
        place: str,
        *,
        required: Sequence[str] = ("uri",),
        optional: Sequence[str] = (),
        hints: Sequence[str] = (),
        named: Mapping[str, str] | None = None,
        keep_others: bool = False,
    ) -> None:
        """Read a table's header and find its columns.

        `optional` columns are read where they exist, and refused where they are ambiguous; `hints` are read where one
        column has exactly that name; `named` says which column of the table is which; `keep_others` reads all others.

        Raises:
            SchemaError: it is no table, lacks a required or named column, or several columns may be the wanted one.
            StorageError: it does not exist or cannot be read.
        """
        self.place, self.folder, self._named = place, place.rsplit("/", 1)[0], dict(named or {})
        self.is_parquet = place.lower().endswith(".parquet")
        """Whether columns have types; those of a text file are all text."""
        self._text = None if self.is_parquet else self._open_text()
        header = self._text.header if self._text else _parquet_names(place)
        self.columns: dict[str, str] = {}
        """What is read, to its column's name in the table."""
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
        """Give the table's rows in order.

        Raises:
            SchemaError: a row is longer or shorter than the header, or the file is damaged.
            StorageError: storage broke off.
        """
        names = list(self.columns.values())
        batches = self._text.batches(names) if self._text else _parquet_batches(self.place, names)
        for columns, where in batches:
            yield TableRows(self, dict(zip(self.columns, columns, strict=True)), where)

    def _open_text(self) -> _TextFile:
        own = "\t" if self.place.lower().endswith(".tsv") else ","
        files = [_open_text(self.place, own)]
        for delimiter in (other for other in _DELIMITERS if other != own):
            if self._find("uri", files[-1].header):
                return files[-1]
            files.append(_open_text(self.place, delimiter))
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
            return f"{self.place} has the column {readable(found[0])} {len(found)} times; give each its own name."
        names = ", ".join(map(readable, found))
        return f"{self.place} has {len(found)} columns that may be {what} ({names}); say which: --column {what}=NAME."

    def _check_found(self, required: Sequence[str], header: Sequence[str]) -> None:
        missing = [what for what in required if what not in self.columns]
        missing += [what for what in self._named if self._named[what] not in header and what not in missing]
        if not missing:
            return
        names = [f"{readable(self._named[what])} (for {what})" if what in self._named else what for what in missing]
        seen = ", ".join(readable(name)[:40] for name in header[:30]) or "none"
        where = "its first line" if self._text else "it"
        raise SchemaError(
            f"{self.place} lacks the column {', '.join(names)}; {where} has {seen}; if it stands there under another "
            f"name, say so: --column {missing[0]}=NAME."
        )


class TableRows:
    """A batch of a table's rows, whose columns are asked for by what they hold."""

    def __init__(self, table: UriTable, columns: dict[str, pa.Array], where: Callable[[int], str]) -> None:
        self._table, self.columns, self._where = table, columns, where

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.columns["uri"])

    def where(self, row: int) -> str:
        """Say in which file, and at which line or row of it, a row of this batch stands."""
        return f"{self._table.place}, {self._where(row)}"

    def uris(self) -> pa.Array:
        """Give the URIs in their one spelling; a relative one is relative to the table's folder, `~/` is the home.

        Raises:
            SchemaError: a row has no URI, or one that is a bucket, has a scheme other than s3, or carries credentials.
        """
        uris = self.texts("uri")
        if uris.null_count:
            raise SchemaError(f"{self.where(_first(pc.is_null(uris)))}, has no uri; every row needs one.")
        whole, odd = (pc.match_substring_regex(uris, pattern) for pattern in (_WHOLE_S3, _ODD_PATH))
        if pc.all(pc.or_(whole, pc.invert(odd))).as_py() is not False:
            return uris
        complete = []
        for row, uri in enumerate(uris.to_pylist()):
            try:
                complete.append(_complete(uri, self._table.folder))
            except SettingsError as err:
                raise SchemaError(f"{self.where(row)}: {err}") from None
        return pa.array(complete, pa.string())

    def texts(self, name: str) -> pa.Array:
        """Give a column as text, null where it is empty; a whole number of a float column has no point: `1`, not `1.0`.

        Raises:
            SchemaError: it is of a type that is no text.
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
                f"{self._table.place} has the column {readable(self._table.columns[name])} of type {values.type}, "
                f"which is not text; name another: --column {name}=NAME."
            ) from None
        blank = pc.equal(pc.utf8_length(texts if name != "uri" else pc.utf8_trim_whitespace(texts)), 0)
        return pc.if_else(blank, pa.scalar(None, pa.string()), texts)

    def flags(self, name: str) -> pa.Array:
        """Give a column as yes or no, false where it is neither, or where there is no such column."""
        values = self.columns.get(name)
        if values is None:
            return pa.repeat(False, len(self))
        if pa.types.is_string(values.type):  # of a CSV
            values = pc.equal(pc.utf8_lower(values), "true")
        return pc.fill_null(values, False) if pa.types.is_boolean(values.type) else pa.repeat(False, len(self))

    def hint(self, name: str, kind: pa.DataType) -> pa.Array:
        """Give a column that may help and can be done without: null where it is not what its name says."""
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
        """Give x1, y1, x2 and y2 as int32, null where a row has no box; nothing where the table has none.

        Raises:
            SchemaError: a column is missing, a box incomplete, or a value is no whole number of pixels.
        """
        there = [name for name in BOX if name in self.columns]
        if there and len(there) < len(BOX):
            raise SchemaError(
                f"{self._table.place} lacks the column {', '.join(n for n in BOX if n not in there)}; a box needs all "
                "of x1, y1, x2 and y2."
            )
        boxes = {}
        for name in there:
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
        remedy = "mend it"
        if all(abs(corner) <= 1 for corner in corners):
            remedy = "multiply fractions of the image by its width and height"
        elif math.isfinite(_number(value)) and _number(value) % 1:
            remedy = "round it"
        return (
            f"{self.where(row)}, has {str(value)[:80]!r} as {readable(self._table.columns[name])}; a box is whole "
            f"numbers of pixels, x2 and y2 exclusive; {remedy}."
        )

    def _numbers(self, name: str, most: int) -> tuple[pd.Series, Any]:
        """Give a column's whole numbers, null where there is none, and where a value is none or beyond `most`."""
        values = pd.Series(self.columns[name].to_pylist(), dtype=object).replace("", None)
        try:
            numbers = pd.to_numeric(values, errors="coerce").astype("Float64")
        except (TypeError, ValueError):  # lists and the like
            numbers = pd.Series([pd.NA] * len(values), dtype="Float64")
        odd = ((numbers != numbers.round()) | (numbers.abs() > most)).fillna(False)
        wrong = (numbers.isna() & values.notna()) | odd
        return numbers.mask(wrong), wrong.to_numpy(dtype=bool)


@dataclass(frozen=True)
class _TextFile:
    """A CSV or TSV file: how it is written, and the names in its first line."""

    place: str
    encoding: str
    delimiter: str
    spaced: bool
    """Whether a blank follows each delimiter, also before the quotation mark of a text in quotes."""
    header: list[str]

    def batches(self, names: Sequence[str]) -> Iterator[tuple[list[pa.Array], Callable[[int], str]]]:
        """Give these columns batch by batch, and for each batch what says on which line a row of it begins."""
        wanted = [self.header.index(name) for name in names]
        for line, rows in _text_rows(self, repeat(BATCH_ROWS), skip_header=True):
            kept = self._kept(line, rows)
            if kept:
                rows_kept = rows if len(kept) == len(rows) else [rows[row] for row in kept]
                arrays = [pa.array([cells[i] for cells in rows_kept], pa.string()) for i in wanted]
                yield arrays, partial(_nth_line, line, rows, kept)

    def _kept(self, line: int, rows: list[list[str]]) -> Sequence[int]:
        """Give the places of the rows that are no blank lines; each must have the header's columns."""
        width = len(self.header)
        if set(map(len, rows)) == {width}:
            return range(len(rows))
        for row, cells in enumerate(rows):
            if (cells and len(cells) < width) or any(cell.strip() for cell in cells[width:]):
                raise SchemaError(
                    f"{self.place}, line {_line(line, rows, row)}, has {len(cells)} fields where the first line names "
                    f"{width} columns; put a text that holds {self.delimiter!r} into quotation marks, or mend the line."
                )
        return [row for row, cells in enumerate(rows) if cells]


def _open_text(place: str, delimiter: str) -> _TextFile:
    with _sentences(place), _open(place) as stream:
        head = stream.read(2)
    # A spreadsheet puts a byte order mark before UTF-8, too.
    encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    file = _TextFile(place, encoding, delimiter, False, [])
    header = next((cells for _, rows in _text_rows(file, repeat(1)) for cells in rows if cells), None)
    if header is None:
        raise SchemaError(f"{place} is empty; the first line of a table names its columns, such as uri.")
    names = [name.strip() for name in header]
    while len(names) > 1 and not names[-1]:
        names.pop()
    spaced = len(header) > 1 and all(name.startswith(" ") for name in header[1:])
    return replace(file, header=names, spaced=spaced)


def _text_rows(
    file: _TextFile, sizes: Iterable[int], *, skip_header: bool = False
) -> Iterator[tuple[int, list[list[str]]]]:
    """Give a text file's rows, blank lines as empty ones, with the line on which each batch begins."""
    with _sentences(file.place), _open(file.place) as stream:
        text = io.TextIOWrapper(stream, encoding=file.encoding, newline="")
        reader = csv.reader(text, delimiter=file.delimiter, skipinitialspace=file.spaced, strict=True)
        if skip_header:
            next((cells for cells in reader if cells), None)
        for size in sizes:
            line, rows = reader.line_num + 1, list[list[str]]()
            try:
                rows.extend(islice(reader, size))  # which keeps what came before an error
            except UnicodeDecodeError as err:
                line = reader.line_num + 1 + err.object[: err.start].count(b"\n")
                raise SchemaError(
                    f"{file.place}, line {line}, is not {err.encoding.upper()}; save the table as CSV in UTF-8."
                ) from None
            except csv.Error as err:
                raise SchemaError(
                    f"{file.place}, line {_line(line, rows, len(rows))}, has quotation marks that do not pair ({err}); "
                    "put a text into quotation marks as a whole, and double those inside it."
                ) from None
            if not rows:
                return
            yield line, rows


def _line(line: int, rows: Sequence[Sequence[str]], row: int) -> int:
    """Give the line on which a row begins, from that of the first one; a text in quotes may hold line ends."""
    return line + sum(1 + sum(len(_LINE_END.findall(cell)) for cell in cells) for cells in rows[:row])


def _nth_line(line: int, rows: Sequence[Sequence[str]], kept: Sequence[int], row: int) -> str:
    return f"line {_line(line, rows, kept[row])}"


def _nth_row(first: int, row: int) -> str:
    return f"row {first + row}"


def _parquet_names(place: str) -> list[str]:
    table_metadata(place)  # refuses in a sentence what is no Parquet
    fs, path = filesystem(place)
    return list(retry(lambda: pq.read_schema(path, filesystem=fs), what=f"reading {place}").names)


def _parquet_batches(place: str, names: Sequence[str]) -> Iterator[tuple[list[pa.Array], Callable[[int], str]]]:
    fs, path = filesystem(place)
    first = 1
    with _sentences(place), pq.ParquetFile(path, filesystem=fs) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(names)):
            batch.validate(full=True)  # Parquet's reader takes it on trust that a text is UTF-8
            yield [batch[name] for name in names], partial(_nth_row, first)
            first += batch.num_rows


@contextmanager
def _sentences(place: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, ValueError, LookupError) as err:
        reason = " ".join(str(err).split())[:200]
        raise SchemaError(f"{place} is not a readable table ({reason}); it was damaged, so write it again.") from None
    except OSError as err:
        if not is_s3(place) and err.errno is None:  # the disk answered: what it holds is damaged
            raise SchemaError(f"{place} is not a readable table ({err}); it was damaged, so write it again.") from None
        raise StorageError(f"reading {place} broke off ({' '.join(str(err).split())}); run it again.") from err


def _open(place: str) -> Any:
    fs, path = filesystem(place)
    try:
        return fs.open_input_stream(path, compression=None, buffer_size=_BYTES_AT_ONCE)
    except FileNotFoundError:
        raise StorageError(f"{place} does not exist; check its spelling.") from None


def _complete(uri: str, folder: str) -> str:
    """Give a URI of a table that lies in `folder` in its one spelling."""
    if "://" not in uri and _OTHER_ADDRESS.match(uri):
        raise SettingsError(f"{uri[:80]!r} is an address of another kind; allowed are s3://bucket/key and plain paths.")
    if uri.startswith(("/", "~/")) or "://" in uri:
        whole = absolute(uri)
        if is_s3(whole) and not whole.removeprefix("s3://").partition("/")[2]:
            raise SettingsError(f"{whole!r} is a bucket and not an image; write s3://bucket/key.")
        return whole
    if not is_s3(folder):
        return absolute(join(folder, uri))
    if not {".", ".."} & set(uri.split("/")):
        return absolute(join(folder, uri))  # as it is: a key may hold `//`
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

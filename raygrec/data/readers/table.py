"""Tables: interactions, and if wanted items, as CSV, TSV or Parquet with named columns."""

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np  # np.from_dlpack: Arrow's own to_numpy, and values of Python beside columns, import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from raygrec.data.files import open_metered, open_unpacked, read_lines
from raygrec.data.options import ITEM_OPTIONS, TABLE_OPTIONS, PrepareOptions
from raygrec.data.readers.base import LAST_SECOND, Chunk, Source
from raygrec.data.text import Item, make_item
from raygrec.errors import InputError

_BLOCK = 8 << 20  # bytes of one CSV chunk
_ROWS = 200_000  # rows of one Parquet chunk
_ENDINGS = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
_MICROSECONDS = 1_000_000  # of a second: what all times of tables are counted in
_FORMS = (pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))  # in which text may tell a time


@dataclass(frozen=True)
class Layout:
    """How a text table is written.

    names: of the columns where the file has no header line. delimiter: None = by the file's ending.
    """

    delimiter: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Request:
    """Which columns a reader asks for; those in `strings` come as strings whatever they look like.

    types: of other columns of a text table, whatever their first values look like.
    lists: the column whose values may be lists, as only Parquet has them.
    """

    needed: list[str]
    strings: list[str]
    optional: list[str] = field(default_factory=list)
    types: dict[str, pa.DataType] = field(default_factory=dict)
    lists: str | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None = there is no such column."""

    user: str
    item: str
    time: str | None
    rating: str | None


def open_source(options: PrepareOptions) -> Source:
    """Reads a table file, or a folder with `interactions.*` and `items.*`."""
    interactions = _find(options.path, "interactions", needed=True)
    items = options.items or _find(options.path, "items", needed=False)
    if not interactions.is_file() or (items and not items.is_file()):
        wrong = items if interactions.is_file() else interactions
        raise InputError(f"{wrong}: no such file; expected a table ({', '.join(_ENDINGS)})")
    columns = Columns(
        options.user_column,
        options.item_column,
        options.time_column,
        options.rating_column if options.min_rating is not None else None,
    )
    note = () if options.time_column else ("no time column: the order of the file is taken as the order in time",)
    return Source(
        files=[interactions, items] if items else [interactions],
        chunks=lambda: read_interactions(interactions, columns),
        items=(lambda: read_items(items, options)) if items else None,
        has_times=columns.time is not None,
        has_ratings=columns.rating is not None,
        notes=note if items else (*note, "no items table: the items' ids stand for their titles"),
        reads=tuple(option for option in TABLE_OPTIONS if items or option not in ITEM_OPTIONS),
    )


def read_interactions(path: Path, columns: Columns, layout: Layout = Layout()) -> Iterator[Chunk]:
    """Chunks of a table, streamed; `InputError` names the file and the line, row or column."""
    needed = [column for column in (columns.user, columns.item, columns.time, columns.rating) if column]
    types = {columns.time: pa.string(), columns.rating: pa.float64()}
    request = _Request(needed, [columns.user, columns.item], types={name: types[name] for name in types if name})
    row, form = 0, None
    with _open_table(path, request, layout) as batches:
        for batch in batches:
            if not batch.num_rows:
                continue
            users, items = (_ids(path, batch, name, row, layout) for name in (columns.user, columns.item))
            form = form or (_form(batch[columns.time]) if columns.time else None)
            times = _times(path, batch, columns.time, row, layout, form) if columns.time else None
            ratings = _ratings(path, batch[columns.rating], columns.rating) if columns.rating else None
            yield Chunk(users, items, times, ratings, _MICROSECONDS)
            row += batch.num_rows


def read_items(path: Path, options: PrepareOptions, layout: Layout = Layout()) -> Iterator[Item]:
    """Items of a table; categories and description may be absent unless the options name them."""
    id_column, title = options.item_column, options.title_column
    named = {"categories_column", "description_column"} & options.model_fields_set
    needed = [id_column, title, *(getattr(options, option) for option in sorted(named))]
    optional = [options.categories_column, options.description_column]
    request = _Request(needed, [id_column, title, *optional], optional, lists=options.categories_column)
    with _open_table(path, request, layout) as batches:
        for batch in batches:
            columns = {name: batch[name].to_pylist() for name in batch.schema.names}
            empty = [None] * batch.num_rows
            categories = columns.get(options.categories_column, empty)
            descriptions = columns.get(options.description_column, empty)
            for item, name, path_text, words in zip(
                columns[id_column], columns[title], categories, descriptions, strict=True
            ):
                names = path_text.split(options.category_separator) if isinstance(path_text, str) else path_text
                try:
                    yield make_item(str(item), name, names, words)
                except TypeError as error:
                    raise InputError(f"{path}, item '{item}': {error}") from None


def _find(path: Path, stem: str, needed: bool) -> Path | None:
    if not path.is_dir():
        return path if needed else None
    found = [path / f"{stem}{ending}" for ending in _ENDINGS if (path / f"{stem}{ending}").is_file()]
    if not found and needed:
        raise InputError(f"{path}: no table there; expected {stem}.csv, .tsv or .parquet")
    return found[0] if found else None


@contextmanager
def _open_table(path: Path, request: _Request, layout: Layout) -> Iterator[Iterator[pa.RecordBatch]]:
    if not path.name.endswith(_ENDINGS) and not layout.names:
        raise InputError(f"{path}: unknown kind of table; expected a name ending in {', '.join(_ENDINGS)}")
    try:
        with open_metered(path, f"reading {path.name}") as file:
            opener = _parquet if path.suffix == ".parquet" else _csv
            yield opener(path, file, request, layout)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: {_first_line(error)}") from None


def _parquet(path: Path, file: BinaryIO, request: _Request, layout: Layout) -> Iterator[pa.RecordBatch]:
    from pyarrow.parquet import ParquetFile  # slow to import

    table = ParquetFile(file)
    columns = _present(path, table.schema_arrow.names, request)
    for name in columns:
        kind = table.schema_arrow.field(name).type
        if pa.types.is_nested(kind) and name != request.lists:
            raise InputError(f"{path}: column '{name}': expected one value per row, found {kind}")
    for batch in table.iter_batches(_ROWS, columns=columns):
        yield _as_strings(batch, request.strings)


def _csv(path: Path, file: BinaryIO, request: _Request, layout: Layout) -> Iterator[pa.RecordBatch]:
    delimiter = layout.delimiter or ("\t" if ".tsv" in path.suffixes else ",")
    stream = pa.CompressedInputStream(file, "gzip") if path.suffix == ".gz" else file
    before, header = (0, list(layout.names)) if layout.names else _header(path, delimiter)
    columns = _present(path, header, request)
    types = {name: pa.string() for name in request.strings if name in columns} | request.types
    quoted = not layout.names
    rows = 0
    try:
        for batch in pa.csv.open_csv(
            stream,
            # One thread: an error then names its row, and the order of the rows is the file's.
            read_options=pa.csv.ReadOptions(
                use_threads=False, block_size=_BLOCK, skip_rows=before, column_names=list(layout.names) or None
            ),
            parse_options=pa.csv.ParseOptions(
                delimiter=delimiter,
                newlines_in_values=quoted,
                quote_char='"' if quoted else False,
            ),
            convert_options=pa.csv.ConvertOptions(include_columns=columns, column_types=types),
        ):
            rows += batch.num_rows
            yield batch
    except pa.ArrowInvalid as error:
        if quoted:
            _check_quotes(path, delimiter)
        raise _csv_error(path, header, before, layout, error) from None
    if quoted:
        _check_quotes(path, delimiter, rows)


def _check_quotes(path: Path, delimiter: str, rows: int = 0) -> None:
    """`InputError` where a quote takes in the lines after it: it is never closed, or amid the text of a later line.

    rows: that were read; where there are as many lines, no value holds a line break, and no more is asked. Two stray
    quotes that both stand alone between delimiters cannot be told from a value with line breaks.
    """
    with open_unpacked(path, None) as stream:
        if not any(b'"' in block for block in iter(lambda: stream.read(_BLOCK), b"")):
            return
        stream.seek(0)
        if sum(map(bool, map(bytes.strip, stream))) == rows + 1:
            return
        stream.seek(0)
        taken: dict[int, str] = {}  # of one row, the lines with quotes by their numbers; others change nothing here
        try:
            for _ in csv.reader(_lines_with_quotes(stream, taken), delimiter=delimiter):
                if len(taken) > 1:
                    list(csv.reader(taken.values(), delimiter=delimiter, strict=True))
                taken.clear()
        except csv.Error:
            raise InputError(
                f"{path}, line {min(taken)}: a quote is opened there and never closed, or amid the text of a later "
                'line; write "" for a quote inside a value'
            ) from None


def _lines_with_quotes(lines: Iterable[bytes], taken: dict[int, str]) -> Iterator[str]:
    """Such lines, which `taken` gets too, and at the end an empty one."""
    for number, line in enumerate(lines, start=1):
        if b'"' in line:
            taken[number] = line.decode("latin-1")
            yield taken[number]
    taken[number + 1] = ""


def _header(path: Path, delimiter: str) -> tuple[int, list[str]]:
    """The number of blank lines at the start, and the columns."""
    # Closed by name: what a signal raises while a generator is collected is not heard.
    with closing(read_lines(path, bar=False)) as lines:
        number, line = next(lines, (0, ""))
    if not line:
        raise InputError(f"{path}: empty; expected a header line and rows")
    if "\r" in line:
        raise InputError(f"{path}: its lines end in CR alone; expected LF or CR LF")
    return number - 1, next(csv.reader([line], delimiter=delimiter))


def _present(path: Path, found: list[str], request: _Request) -> list[str]:
    """The columns to read; `InputError` when a needed one is not there, or one stands there twice."""
    for name in request.needed:
        if name not in found:
            raise InputError(f"{path}: column '{name}' is missing; found {', '.join(found)}")
    columns = list(dict.fromkeys([*request.needed, *(name for name in request.optional if name in found)]))
    for name in columns:
        if found.count(name) > 1:
            raise InputError(f"{path}: {found.count(name)} columns are named '{name}'; expected one")
    return columns


def _as_strings(batch: pa.RecordBatch, strings: list[str]) -> pa.RecordBatch:
    for index, (name, kind) in enumerate(zip(batch.schema.names, batch.schema.types, strict=True)):
        if name in strings and not pa.types.is_nested(kind) and kind != pa.string():
            batch = batch.set_column(index, name, batch.column(index).cast(pa.string()))
    return batch


def _ids(path: Path, batch: pa.RecordBatch, name: str, row: int, layout: Layout) -> pa.Array:
    ids = batch[name]
    if ids.null_count or pc.min(pc.binary_length(ids)).as_py() == 0:
        first = pc.index(pc.fill_null(pc.equal(ids, ""), True), True).as_py()
        raise InputError(f"{path}, {_place(path, row + first, layout)}: column '{name}' is empty; expected an id")
    return ids


def _form(times: pa.Array) -> pa.DataType:
    """The type to read times as: their own, or where they are text that of the first of them."""
    kind = times.type
    if any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_temporal)):
        return kind
    return next((form for form in _FORMS if not _read(times[:1], form).null_count), _FORMS[0])


def _read(times: pa.Array, form: pa.DataType) -> pa.Array:
    """[rows] of type `form`: null where a text is of another form."""
    if times.type == form:
        return times
    texts = times.cast(pa.string())
    with suppress(pa.ArrowInvalid):
        return texts.cast(form)
    # Blanks around it are no part of a time, and digits after the sixth are less than a microsecond.
    texts = pc.replace_substring_regex(pc.utf8_trim_whitespace(texts), r"(:\d\d\.\d{6})\d+", r"\1")
    with suppress(pa.ArrowInvalid):
        return texts.cast(form)
    half = len(texts) // 2
    return pa.concat_arrays([_read(texts[:half], form), _read(texts[half:], form)]) if half else pa.nulls(1, form)


def _times(path: Path, batch: pa.RecordBatch, name: str, row: int, layout: Layout, form: pa.DataType) -> np.ndarray:
    times = _read(batch[name], form)
    first = _first_wrong(times)
    if first is not None:
        place, found, time = _place(path, row + first, layout), batch[name][first].as_py(), times[first].as_py()
        late = isinstance(time, int | float) and LAST_SECOND <= abs(time) < float("inf")
        right = "; these look like milliseconds" if late else " or ISO dates in one form"
        found = "nothing" if found in (None, "") else repr(found)
        raise InputError(f"{path}, {place}: column '{name}': expected seconds since 1970{right}, found {found}")
    if pa.types.is_floating(form):
        return np.round(np.from_dlpack(times.cast(pa.float64())) * _MICROSECONDS).astype(np.int64)
    if pa.types.is_integer(form):
        return np.from_dlpack(times.cast(pa.int64())) * _MICROSECONDS
    nanoseconds = getattr(form, "unit", "") == "ns"  # may lose their last digits, which are no error
    return np.from_dlpack(times.cast(pa.timestamp("us"), safe=not nanoseconds).cast(pa.int64()))


def _first_wrong(times: pa.Array) -> int | None:
    """The row of the first value that is no time."""
    kind = times.type
    if times.null_count:
        return pc.index(pc.is_null(times), True).as_py()
    if pa.types.is_temporal(kind):  # these are times of a day and durations too
        return None if pa.types.is_date(kind) or pa.types.is_timestamp(kind) else 0
    wrong = ~(np.abs(np.from_dlpack(times)) < LAST_SECOND)
    return int(wrong.argmax()) if wrong.any() else None


def _ratings(path: Path, ratings: pa.Array, name: str) -> np.ndarray:
    if not (pa.types.is_integer(ratings.type) or pa.types.is_floating(ratings.type)):
        raise InputError(f"{path}: column '{name}' holds no ratings; expected numbers, found {ratings.type}")
    return ratings.cast(pa.float32()).to_numpy(zero_copy_only=False)


def _place(path: Path, row: int, layout: Layout) -> str:
    """Where row `row` (from 0) is: the line of a text file, if no value before it may hold a line break."""
    if path.suffix != ".parquet":
        before = -1 if layout.names else -2  # rows, with the header line as one
        with open_unpacked(path, None) as lines:
            for number, line in enumerate(lines, start=1):
                if b'"' in line and not layout.names:
                    break
                # A line of blanks is a row, but before the header.
                before += bool(line.strip(b"\r\n" if before >= -1 else None))
                if before == row:
                    return f"line {number}"
    return f"row {row + 1}"


def _csv_error(path: Path, header: list[str], before: int, layout: Layout, error: pa.ArrowInvalid) -> InputError:
    """Arrow's error with the line, if it names a row; `before`: the lines before the header."""
    message = _first_line(error)
    if "utf8" in message.lower().replace("-", ""):
        for _ in read_lines(path):  # names the line
            pass
    place = ""
    if row := re.search(r"Row #(\d+): ", message):  # from 1, all lines but empty ones after the header
        message = message.replace(row[0], "", 1)
        place = f", {_place(path, int(row[1]) - before - (1 if layout.names else 2), layout)}"
    message = re.sub(r"In CSV column #(\d+)", lambda match: f"column '{header[int(match[1])]}'", message)
    message = message.replace("CSV conversion error to double: invalid value", "expected a number, found")
    return InputError(f"{path}{place}: {message}")


def _first_line(error: pa.ArrowInvalid) -> str:
    return str(error).strip().splitlines()[0]

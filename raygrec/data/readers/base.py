"""What readers hand over, and what they share: finding files, checking fields, batching records."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raygrec.data.files import read_records
from raygrec.data.text import Item
from raygrec.errors import InputError

LAST_SECOND = 100_000_000_000  # of the year 5138; a later time is one in milliseconds, or none
_CHUNK = 200_000  # records of one chunk; bounds the memory that Python objects take


@dataclass(frozen=True)
class Chunk:
    """A run of interactions in the order of the file.

    users, items: ids as Arrow strings. times: int64, in ticks. ratings: float32, NaN = unrated.
    """

    users: pa.Array
    items: pa.Array
    times: np.ndarray | None = None
    ratings: np.ndarray | None = None
    ticks_per_second: int = 1


@dataclass(frozen=True)
class Source:
    """An opened data set.

    files: all that is read, for checksums; the interactions first, the items second. chunks, items: start
    reading when called; items is None where no file describes them. has_times: moments, not just an order.
    notes: for the manifest. reads: which of `TABLE_OPTIONS` it makes use of.
    """

    files: list[Path]
    chunks: Callable[[], Iterator[Chunk]]
    items: Callable[[], Iterator[Item]] | None
    has_times: bool
    has_ratings: bool
    notes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


def find_one(folder: Path, what: str, patterns: list[str], exclude: str = "") -> Path | None:
    """The one file of `folder` that fits a pattern and does not start with `exclude`; two are an error."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder}: {found}; expected the folder with the {what} file ({', '.join(patterns)})")
    fitting = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    names = sorted(path.name for path in fitting if not (exclude and path.name.startswith(exclude)))
    if len(names) > 1:
        raise InputError(f"{folder}: more than one {what} file ({', '.join(names)}); keep one data set per folder")
    return folder / names[0] if names else None


def need_one(folder: Path, what: str, patterns: list[str], exclude: str = "") -> Path:
    """Like `find_one`; none is an `InputError` too."""
    path = find_one(folder, what, patterns, exclude)
    if path is None:
        raise InputError(f"{folder}: no {what} file there; expected {' or '.join(patterns)}")
    return path


Row = tuple[str, str, float, int]  # user, item, rating, time


def record_chunks(path: Path, to_row: Callable[[dict[str, Any]], Row], ticks_per_second: int = 1) -> Iterator[Chunk]:
    """Chunks of a JSON-lines file; what `to_row` cannot find or read in a record names the line."""
    rows = _rows(path, to_row)
    while batch := list(islice(rows, _CHUNK)):
        users, items, ratings, times = zip(*batch, strict=True)
        yield Chunk(
            pa.array(users, pa.string()),
            pa.array(items, pa.string()),
            np.array(times, dtype=np.int64),
            np.array(ratings, dtype=np.float32),
            ticks_per_second,
        )


def _rows(path: Path, to_row: Callable[[dict[str, Any]], Row]) -> Iterator[Row]:
    for number, record in read_records(path):
        with_line = f"{path}, line {number}"
        try:
            row = to_row(record)
        except KeyError as error:
            raise missing_field(with_line, error, record) from None
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"{with_line}: {error}") from None
        if not all(isinstance(name, str) and name for name in row[:2]):
            raise InputError(f"{with_line}: expected ids that are strings and not empty, found {row[:2]}")
        yield row


def read_number(record: dict[str, Any], key: str, kind: type = float) -> Any:
    """The record's `key` as a float or int; `ValueError` names the key, `KeyError` where it is missing."""
    try:
        return kind(record[key])
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"field '{key}': expected a number, found {record[key]!r}") from None


def read_time(record: dict[str, Any], key: str, ticks_per_second: int = 1) -> int:
    """The record's `key` as ticks since 1970, 1 or 1000 per second; `ValueError` also where it is far too late."""
    time = read_number(record, key, int)
    if abs(time) >= LAST_SECOND * ticks_per_second:
        seconds = "seconds since 1970; these look like milliseconds"
        right = seconds if ticks_per_second == 1 else "milliseconds since 1970"
        raise ValueError(f"field '{key}': expected {right}, found {time}")
    return time


def texts(key: str, found: object, expected: str) -> list[str]:
    """`found`, if it is a list of texts; `TypeError` names the field `key` and what is expected there."""
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{key}: expected {expected}, found {found!r}")
    return found


def missing_field(place: str, error: KeyError, record: dict[str, Any]) -> InputError:
    """The error of a record without a field, with the fields it has."""
    return InputError(f"{place}: field '{error.args[0]}' is missing; found {', '.join(record) or 'none'}")


def item_stream(path: Path, to_item: Callable[[dict[str, Any]], Item], python_literals: bool = False) -> Iterator[Item]:
    """Items of a JSON-lines file, as `to_item` reads them from a record."""
    for number, record in read_records(path, python_literals):
        place = f"{path}, line {number}"
        try:
            yield to_item(record)
        except KeyError as error:
            raise missing_field(place, error, record) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{place}: not an item record ({error})") from None

"""Reads source files: lines with their numbers, gzip or plain, checksums, and a bar for the large ones."""

import ast
import codecs
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from raygrec.errors import InputError
from raygrec.progress import progress_bar

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # written as an escape, it may stand alone
_MEGABYTE = 1 << 20
_BAR_FROM_BYTES = 32 * _MEGABYTE  # below that a file is read in the blink of an eye


class _MeteredFile(io.FileIO):
    """A raw file that reports how many bytes each read took."""

    def __init__(self, path: Path, report: Callable[[int], None]) -> None:
        super().__init__(path)
        self._report = report

    def readinto(self, buffer) -> int:  # noqa: ANN001  (a writable buffer: no public type before 3.12)
        count = super().readinto(buffer)
        self._report(count)
        return count


@contextmanager
def open_metered(path: Path, description: str | None) -> Iterator[BinaryIO]:
    """Opens `path` for reading bytes; a large file gets a bar in megabytes if it has a description.

    `InputError` when it cannot be read, or is a gzip file that ends early.
    """
    try:
        size = path.stat().st_size
        if size < _BAR_FROM_BYTES or description is None:
            with path.open("rb") as file:
                yield file
            return
        with progress_bar() as bar:
            task = bar.add_task(description, total=size / _MEGABYTE, note="MB")
            metered = _MeteredFile(path, lambda count: bar.advance(task, count / _MEGABYTE))
            with io.BufferedReader(metered, buffer_size=_MEGABYTE) as file:
                yield file
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())  # Arrow's may have several lines
        if error.errno is None and path.suffix == ".gz":
            raise InputError(f"{path}: not a complete gzip file ({reason})") from None
        raise InputError(f"{path}: cannot be read ({reason})") from None
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete gzip file ({error})") from None


@contextmanager
def open_unpacked(path: Path, description: str | None) -> Iterator[BinaryIO]:
    """Like `open_metered`; a name ending in `.gz` is unpacked."""
    with open_metered(path, description) as raw:
        yield gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def read_lines(path: Path, encoding: str = "utf-8", bar: bool = True) -> Iterator[tuple[int, str]]:
    """Yields (line number from 1, text without its end) for each line that is not blank.

    A name ending in `.gz` is unpacked, and a byte order mark at the start left out. `InputError` names the line
    that is not in `encoding`.
    """
    with open_unpacked(path, f"reading {path.name}" if bar else None) as stream:
        for number, line in enumerate(stream, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                text = line.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError:
                raise InputError(f"{path}, line {number}: not {encoding.upper()} text") from None
            if text.strip():
                yield number, text


def read_records(path: Path, python_literals: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSON-lines file.

    With `python_literals`, a line that is no JSON may be a Python dict literal, as in Amazon's 2014 item
    files; it is read by `ast.literal_eval`, which runs nothing.
    """
    for number, text in read_lines(path):
        record = _parse(text, python_literals)
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: expected one JSON object, found {text[:40]!r}")
        if _SURROGATE.search(text):
            try:
                json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise InputError(f"{path}, line {number}: {half!r} is half a character; expected both") from None
        yield number, record


def _parse(text: str, python_literals: bool) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if not python_literals:
            return None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open_metered(path, f"checksum of {path.name}") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

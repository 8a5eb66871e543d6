"""Ragged arrays: the one layout of the store, for interactions, token ids and strings alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class CSR:
    """Rows of integers of different lengths; row r is `indices[indptr[r]:indptr[r + 1]]`.

    indptr: [rows + 1] int64. indices: [entries] int32. Both may be memory-mapped.
    """

    indptr: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.indices[self.indptr[row] : self.indptr[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64."""
        return self.indptr[1:] - self.indptr[:-1]

    @property
    def rows(self) -> np.ndarray:
        """[entries] int64: the row of each entry."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @staticmethod
    def from_lists(rows: Iterable[Sequence[int]]) -> "CSR":
        rows = list(rows)
        return CSR(_starts(map(len, rows)), np.fromiter(chain.from_iterable(rows), np.int32))

    @staticmethod
    def from_pairs(rows: np.ndarray, values: np.ndarray, num_rows: int) -> "CSR":
        """Groups `values` by `rows`; inside a row the given order is kept."""
        order = np.argsort(rows, kind="stable")
        return CSR(_starts(np.bincount(rows, minlength=num_rows)), np.ascontiguousarray(values[order], dtype=np.int32))

    def transposed(self, num_columns: int) -> "CSR":
        """The same entries grouped by value: [num_columns] rows of row numbers, ascending."""
        columns = np.asarray(self.indices)
        rows = self.rows.astype(np.int32)[stable_order(columns)]
        return CSR(_starts(np.bincount(columns, minlength=num_columns)), rows)

    def take(self, rows: np.ndarray) -> "CSR":
        """The given rows [n], in the given order."""
        starts = self.indptr[rows]
        lengths = self.indptr[rows + 1] - starts  # never those of all rows: there may be millions
        indptr = _starts(lengths)
        offsets = np.repeat(starts - indptr[:-1], lengths)
        return CSR(indptr, self.indices[np.arange(indptr[-1]) + offsets])


@dataclass(frozen=True)
class Strings(Sequence):
    """Strings as one UTF-8 byte array: string r is bytes `data[indptr[r]:indptr[r + 1]]`."""

    indptr: np.ndarray
    data: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> str:  # type: ignore[override]
        return bytes(self.data[self.indptr[row] : self.indptr[row + 1]]).decode()

    @staticmethod
    def from_list(strings: Iterable[str]) -> "Strings":
        parts = list(map(str.encode, strings))
        return Strings(_starts(map(len, parts)), np.frombuffer(b"".join(parts), dtype=np.uint8))

    @staticmethod
    def from_arrow(strings: "pa.LargeStringArray") -> "Strings":
        """Without nulls; a view of its memory."""
        _, starts, data = strings.buffers()
        indptr = np.frombuffer(starts, np.int64)[strings.offset :][: len(strings) + 1]
        whole = np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8)
        return Strings(indptr - indptr[0], whole[indptr[0] : indptr[-1]])


def stable_order(*keys: np.ndarray) -> np.ndarray:
    """[entries] int64: what `np.lexsort` returns: by the last key first; entries that are equal keep their order.

    keys: [entries] whole numbers, of less than 2^32 entries. Digits of 32 bits are sorted together with their places,
    since plain sorting takes a fraction of the time of an indirect one.
    """
    order = None
    for key in keys:
        low, high = int(key.min(initial=0)), int(key.max(initial=0))
        for shift in range(0, max(1, (high - low).bit_length()), 32):
            digits = (key if order is None else key[order]).astype(np.int64)
            digits -= low
            packed = digits.view(np.uint64)
            packed >>= np.uint64(shift)
            packed <<= np.uint64(32)
            packed |= np.arange(len(key), dtype=np.uint64)
            packed.sort()
            packed &= np.uint64(0xFFFFFFFF)
            places = packed.view(np.int64)
            order = places if order is None else order[places]
    return order


def _starts(lengths: Iterable[int]) -> np.ndarray:
    """[rows + 1] int64: where each row begins, and the last ends."""
    lengths = lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64)
    return np.concatenate([[0], np.cumsum(lengths)])

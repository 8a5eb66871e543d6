"""Ragged arrays: the one layout of the store, for interactions, token ids and strings alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


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
        return np.diff(self.indptr)

    @property
    def rows(self) -> np.ndarray:
        """[entries] int64: the row of each entry."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @staticmethod
    def from_lists(rows: Iterable[Sequence[int]]) -> "CSR":
        parts = [np.asarray(row, dtype=np.int32) for row in rows]
        indptr = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=indptr[1:])
        return CSR(indptr, np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32))

    @staticmethod
    def from_pairs(rows: np.ndarray, values: np.ndarray, num_rows: int) -> "CSR":
        """Groups `values` by `rows`; inside a row the given order is kept."""
        order = np.argsort(rows, kind="stable")
        indptr = np.zeros(num_rows + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=num_rows), out=indptr[1:])
        return CSR(indptr, np.ascontiguousarray(values[order], dtype=np.int32))

    def transposed(self, num_columns: int) -> "CSR":
        """The same entries grouped by value: [num_columns] rows of row numbers, ascending."""
        return CSR.from_pairs(np.asarray(self.indices), self.rows, num_columns)

    def take(self, rows: np.ndarray) -> "CSR":
        """The given rows, in the given order."""
        lengths = self.lengths[rows]
        indptr = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum(lengths, out=indptr[1:])
        offsets = np.repeat(self.indptr[rows] - indptr[:-1], lengths)
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
        parts = [string.encode() for string in strings]
        indptr = np.zeros(len(parts) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=indptr[1:])
        return Strings(indptr, np.frombuffer(b"".join(parts), dtype=np.uint8))

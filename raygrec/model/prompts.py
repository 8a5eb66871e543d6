"""Prompts as arrays of symbols: text tokens, item nodes, user nodes and answer slots in one number space.

No tokenizer runs here: phrases and terms come tokenised, prompts are gathered with numpy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.model.head import Cells, Targets

PAD = -1


@dataclass(frozen=True)
class Symbols:
    """Where each kind of symbol begins: text ids from 0, then items, then users, then slots."""

    text: int
    items: int
    users: int
    slots: int

    @property
    def first_item(self) -> int:
        return self.text

    @property
    def first_user(self) -> int:
        return self.text + self.items

    @property
    def first_slot(self) -> int:
        return self.text + self.items + self.users


@dataclass(frozen=True)
class PromptBatch:
    """B prompts of at most T symbols, and what they must answer.

    symbols: [B, T] int64, PAD where a prompt has ended. segments: [B, T] int64; a position attends to the
    segments up to its own. answers: [P] int64, flat positions (row · T + column) that carry a target.
    slots: [B, k] int64, flat positions of the answer slots. history_indptr / history: the items each prompt is
    about, as CSR; its symbols may show fewer. tables: [B] int64, which fit of the item nodes each prompt reads, 0 for
    the one on all edges. user_kept: [B] bool, False where the user token is dropped out.
    dropout_keys: [B] int64 that the masks of dropout follow from; None where nothing is dropped. prefix: how many first
    columns are the same text in all prompts, in segment 0 and without a target. moment: when what is not in training
    is read (`model/trend.py`), where that matters. successors: of the answer positions in training, of the first slots
    in other prompts (`model/successors.py`), where the model reads them.
    """

    symbols: torch.Tensor
    segments: torch.Tensor
    slots: torch.Tensor
    answers: torch.Tensor
    targets: Targets
    history_indptr: torch.Tensor
    history: torch.Tensor
    tables: torch.Tensor
    user_kept: torch.Tensor
    dropout_keys: torch.Tensor | None = None
    prefix: int = 0
    moment: int | None = None
    successors: Cells | None = None

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})

    @property
    def lengths(self) -> torch.Tensor:
        """[B] symbols of each prompt."""
        return (self.symbols != PAD).sum(1)

    @property
    def counts(self) -> torch.Tensor:
        """[terms] what each term of the loss is summed over."""
        return torch.tensor([len(self.answers)], dtype=torch.float64)

    @property
    def attention(self) -> torch.Tensor:
        """[B, T, T] bool: block-causal between segments; no symbol attends to padding."""
        shown = self.symbols != PAD
        allowed = (self.segments[:, :, None] >= self.segments[:, None, :]) & shown[:, None, :]
        return allowed | torch.eye(shown.shape[1], dtype=torch.bool, device=shown.device)


# (node or slot numbers [n], their rows [n], their columns [n]) -> embeddings [n, D]
Embed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Placed(NamedTuple):
    """Vectors of positions of B prompts of at most T symbols: rows_ND, and where_BT, the row of each position.

    Positions that are the same may share a row. Padding, and what was not asked for, has some row that means nothing.
    """

    rows_ND: torch.Tensor
    where_BT: torch.Tensor

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """[..., D] vectors of flat positions (row · T + column)."""
        rows = self.where_BT.flatten()[positions.flatten()]
        return self.rows_ND.index_select(0, rows).view(*positions.shape, self.rows_ND.shape[1])

    def padded(self) -> torch.Tensor:
        """[B, T, D]; what stands in padding means nothing."""
        return self.at(torch.arange(self.where_BT.numel(), device=self.where_BT.device).view(self.where_BT.shape))


def embed_symbols(
    symbols: torch.Tensor,
    base: Symbols,
    text: Callable[[torch.Tensor], torch.Tensor],
    items: Embed,
    users: Embed,
    slots: Embed,
) -> Placed:
    """Embeddings of symbols [B, T]: each kind by its own function."""
    kinds = (
        (0, base.text, lambda numbers, *_: text(numbers)),
        (base.first_item, base.first_user, items),
        (base.first_slot, base.first_slot + base.slots, slots),
        (base.first_user, base.first_slot, users),
    )
    where, found, count = torch.zeros_like(symbols), [], 0
    for first, end, embed in kinds:
        here = (symbols >= first) & (symbols < end)
        places = here.nonzero(as_tuple=True)
        found.append(embed(symbols[places] - first, *places))
        where[places] = torch.arange(count, count + len(found[-1]), device=symbols.device)
        count += len(found[-1])
    return Placed(torch.cat([rows.to(found[0].dtype) for rows in found]), where)


def join_rows(parts: list[CSR]) -> CSR:
    """Row r of the result is row r of every part, one after the other."""
    indptr = np.zeros(len(parts[0]) + 1, dtype=np.int64)
    np.cumsum(sum(part.lengths for part in parts), out=indptr[1:])
    values, starts = np.empty(indptr[-1], dtype=np.int64), indptr[:-1]
    for part in parts:
        lengths = part.lengths
        values[np.repeat(starts - part.indptr[:-1], lengths) + np.arange(len(part.indices))] = part.indices
        starts = starts + lengths
    return CSR(indptr, values)


def repeated(values: np.ndarray | list[int], rows: int) -> CSR:
    """The same values in every one of `rows` rows."""
    values = np.asarray(values, dtype=np.int64)
    return CSR(np.arange(rows + 1, dtype=np.int64) * len(values), np.tile(values, rows))


def expand(rows: CSR, pieces: CSR) -> CSR:
    """Replaces every number in `rows` by the row of `pieces` with that number (terms by their token ids)."""
    pieces_taken = pieces.take(np.asarray(rows.indices))
    ends = np.concatenate([[0], np.cumsum(pieces_taken.lengths)])
    return CSR(ends[rows.indptr], pieces_taken.indices)


def truncated(rows: CSR, length: int, keep: str = "last") -> CSR:
    """At most `length` entries of each row, its last or its first ones."""
    kept = np.minimum(rows.lengths, length)
    indptr = np.concatenate([[0], np.cumsum(kept)])
    starts = rows.indptr[:-1] if keep == "first" else rows.indptr[1:] - kept
    return CSR(indptr, rows.indices[np.repeat(starts - indptr[:-1], kept) + np.arange(indptr[-1])])


def newest(rows: CSR) -> np.ndarray:
    """[rows]: the last entry of each, −1 where it is empty."""
    return np.where(rows.lengths > 0, rows.indptr[1:] - 1, -1)


def padded(rows: CSR, multiple: int = 1) -> np.ndarray:
    """[rows, T] int64 with PAD at the end; T is the longest row, rounded up to `multiple`."""
    lengths = rows.lengths
    width = -(-max(int(lengths.max(initial=1)), 1) // multiple) * multiple
    grid = np.full((len(rows), width), PAD, dtype=np.int64)
    grid[np.arange(width) < lengths[:, None]] = rows.indices
    return grid


def as_targets(rows: np.ndarray, items: np.ndarray, positions: int) -> Targets:
    """Targets of `positions` answer positions from (row, item) pairs; the items of a row weigh the same."""
    grouped = CSR.from_pairs(rows, items, positions)
    weights = 1.0 / grouped.lengths[grouped.rows]
    return Targets(
        torch.from_numpy(grouped.indptr),
        torch.from_numpy(grouped.indices.astype(np.int64)),
        torch.from_numpy(weights.astype(np.float32)),
    )

"""What other users took next after the items of a history: the graph's two-hop paths in order of time, at the head."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.model.head import Cells

if TYPE_CHECKING:
    from scipy.sparse import csr_array

FAINTEST = 0.01  # items of a history with a smaller weight are not looked at
NOTHING = 1e-6  # what rounding leaves where a user's own steps are all there were
LEAST = 0.03  # of what a position's strongest cell has; less is left out of what texts pass on
ROWS_AT_ONCE = 1024  # of the similarities of all texts


class SuccessorConfig(StrictConfig):
    """Which steps count. [ours]"""

    steps: int = Field(3, ge=1, le=100)
    """How many of the items after an item are its successors, the k-th with weight 1/k."""
    decay: float = Field(0.5, gt=0, le=0.99)
    """Weight of each item of a history as a share of the weight of the one after it."""
    alike: int = Field(0, ge=0)
    """How many items of the most similar texts each item shares its successors with; 0: none, and texts are not read.
    Besides s, positions then have s K + γH K S and γH K (`Successors`)."""
    alike_temperature: float = Field(0.05, gt=0)
    """Of the softmax over their cosine similarities that makes the shares."""

    @property
    def name(self) -> str:
        """As tables name it."""
        return "shared successors" if self.alike else "successors"

    def check(self, text_vectors: bool) -> None:
        """Raises ValueError where texts pass on and the model has none."""
        if self.alike and not text_vectors:
            raise ValueError(f"successors.alike={self.alike} asks for text_vectors=true: it is texts that are alike")

    @property
    def kinds(self) -> int:
        """Numbers of each cell."""
        return 3 if self.alike else 1


class Successors:
    """[ours] s_j = Σ_a γ^a Σ_k 1/k · #{times that a user v ≠ u took j k steps after h_{n−a}} for the items h_1 … h_n of
    a user u: paths item, user, later item in the training graph, none of them over u.

    What a user took is thus never known from the user, in training as little as later. Needs interactions in time
    order. For sparse graphs: a position's cells grow with what follows its items, some 200 of 12,101 items on Amazon
    Beauty, 550 of 1,573 on MovieLens-100K.

    In matrices s = γH S, with γH the weights of the histories' items. Where texts pass on, K holds each item's shares
    of the items whose texts are most like its own (`alike`), and two more numbers of a position are s K + (γH K) S,
    successors' likes and likes' successors, still none over u, and γH K, likes alone.
    """

    def __init__(
        self, train: CSR, num_items: int, config: SuccessorConfig, texts_It: torch.Tensor | None = None
    ) -> None:
        """train: CSR of each user's training items in time order. texts: the items' vectors, where the config has some
        of them share."""
        self.train, self.num_items, self.config = train, num_items, config
        self._all = step_counts(train, config.steps, np.asarray(train.indices), (num_items, num_items))
        self._weights = config.decay ** np.arange(1 + int(np.log(FAINTEST) / np.log(config.decay)))
        self._alike = alike(texts_It, config.alike, config.alike_temperature) if config.alike else None

    def after(self, users: np.ndarray, shown: CSR, read: np.ndarray) -> Cells:
        """s [P positions] where it is not zero, for histories that end at the entries `read` [P] of `shown`; −1: empty.

        Weights of cells are [C], or [C, 3] where texts pass on: s, and what these give.
        users: [B]. shown: [B] rows of their items, in time order. Raises ValueError where these are not as many: a
        row's own steps are known by its user.
        """
        if len(users) != len(shown):
            raise ValueError(f"{len(users)} users but {len(shown)} rows of items")
        taken = self.train.take(users)
        edges, edge_of = np.unique(taken.rows * self.num_items + taken.indices, return_inverse=True)
        own = step_counts(taken, self.config.steps, edge_of, (len(edges), self.num_items)).tocsr()
        ages = min(len(self._weights), int(shown.lengths.max(initial=0)))
        entries_PA = read[:, None] - np.arange(ages)
        rows_P = shown.rows[read] if len(shown.indices) else np.zeros(len(read), dtype=np.int64)
        positions, ages = ((read >= 0)[:, None] & (entries_PA >= shown.indptr[rows_P][:, None])).nonzero()
        items = np.asarray(shown.indices)[entries_PA[positions, ages]].astype(np.int64)
        weights_PI = _rows(self._weights[ages], positions, items, (len(read), self.num_items)).tocsr()

        def followed(weights_PI: "csr_array") -> "csr_array":
            """What others took after items of these weights."""
            cells = weights_PI.tocoo()
            keys = rows_P[cells.row] * self.num_items + cells.col
            mine = np.isin(keys, edges)
            steps = np.searchsorted(edges, keys[mine])
            found_PI = weights_PI @ self._all
            found_PI -= _rows(cells.data[mine], cells.row[mine], steps, (len(read), len(edges))) @ own
            return _above(found_PI)

        found_PI = followed(weights_PI)
        if self._alike is None:
            return _cells([found_PI])
        likes_PI = _above(weights_PI @ self._alike)
        passed = [found_PI @ self._alike, followed(likes_PI)]
        theirs, of_likes = (_above(part, LEAST * _largest(part)) for part in passed)
        return _cells([found_PI, theirs + of_likes, likes_PI])


def alike(texts_It: torch.Tensor, count: int, temperature: float) -> "csr_array":
    """K [I, I]: of each item the shares of the `count` others whose texts are most like its own, which add to 1.

    texts [I, t]: vectors, compared by the cosine once their mean is taken off. Shares are a softmax of it at
    `temperature`. Of as many items as there are.
    """
    unit_It = functional.normalize(texts_It.float() - texts_It.float().mean(0), dim=1)
    count, found = min(count, len(unit_It) - 1), []
    for start in range(0, len(unit_It), ROWS_AT_ONCE):
        near_nI = unit_It[start : start + ROWS_AT_ONCE] @ unit_It.T
        near_nI.diagonal(start).fill_(-torch.inf)
        found.append(near_nI.topk(count, dim=1))
    shares = (torch.cat([part.values for part in found]) / temperature).double().softmax(1)
    items = torch.cat([part.indices for part in found]).int().numpy()
    rows = np.repeat(np.arange(len(items), dtype=np.int32), count)
    return _rows(shares.numpy().ravel(), rows, items.ravel(), (len(items), len(items))).tocsr()


def _above(found_PI: "csr_array", least: "float | np.ndarray" = 0.0) -> "csr_array":
    """The entries that are not smaller, nor next to nothing; least: one number or that of each row."""
    found_PI = found_PI.tocsr()
    rows = np.repeat(np.broadcast_to(np.ravel(least), found_PI.shape[0]), np.diff(found_PI.indptr))
    found_PI.data[found_PI.data < np.maximum(rows, NOTHING)] = 0
    found_PI.eliminate_zeros()
    found_PI.sort_indices()  # what is added to it takes longer otherwise
    return found_PI


def _largest(found_PI: "csr_array") -> np.ndarray:
    """[P]: the largest entry of each row, 0 where there is none; scipy's own sorts all entries first."""
    full, largest_P = np.diff(found_PI.indptr) > 0, np.zeros(found_PI.shape[0])
    largest_P[full] = np.maximum.reduceat(found_PI.data, found_PI.indptr[:-1][full]) if full.any() else 0.0
    return largest_P


def _cells(kinds: list["csr_array"]) -> Cells:
    """Where any of these has an entry, those of all, [C] of one and [C, n] of n."""
    union = sum(kinds[1:], kinds[0]).tocsr()
    union.sort_indices()
    places, columns = _keys(union), []
    for kind in kinds:
        columns.append(np.zeros(union.nnz, dtype=np.float32))
        columns[-1][np.searchsorted(places, _keys(kind))] = kind.data
    return Cells(
        torch.from_numpy(union.indptr.astype(np.int64)),
        torch.from_numpy(union.indices.astype(np.int64)),
        torch.from_numpy(columns[0] if len(kinds) == 1 else np.stack(columns, axis=1)),
    )


def _keys(found: "csr_array") -> np.ndarray:
    """[entries]: the place of each in the whole matrix."""
    rows = np.repeat(np.arange(found.shape[0], dtype=np.int64), np.diff(found.indptr))
    return rows * found.shape[1] + found.indices


def step_counts(taken: CSR, steps: int, row_of: np.ndarray, shape: tuple[int, int]) -> "csr_array":
    """Σ_k 1/k · # of the items k ≤ `steps` steps after an entry of `taken`, as a sparse matrix of that shape.

    row_of: [entries], the matrix's row of each entry; columns are items.
    """
    place = np.arange(len(taken.indices)) - taken.indptr[taken.rows]
    later = [np.flatnonzero(place >= k) for k in range(1, steps + 1)]
    to, after = np.concatenate(later), np.repeat(np.arange(1, steps + 1), list(map(len, later)))
    return _rows(1 / after, row_of[to - after], np.asarray(taken.indices)[to], shape)


def _rows(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> "csr_array":
    """A sparse matrix; values of the same place are added up."""
    from scipy.sparse import csr_array

    return csr_array((values, (rows, columns)), shape)


class SuccessorLogits(nn.Module):
    """Σ_k α_k log(1 + s_k / ε_k) over the kinds k of numbers that a cell has, added to the logit of its item; α and ε
    are trained."""

    def __init__(self, kinds: int = 1) -> None:
        super().__init__()
        start = torch.tensor([[0.5, *[0.2] * (kinds - 1)], [0.0, *[-1.0] * (kinds - 1)]])  # α, log ε
        self.trained = nn.Parameter(start[:, 0] if kinds == 1 else start)

    def forward(self, found_C: torch.Tensor) -> torch.Tensor:
        """[C] fp32 logits of cells with these s, [C] or [C, kinds]."""
        share, floor = self.trained.float().unbind()
        logits = share * (found_C * (-floor).exp()).log1p()
        return logits if logits.dim() == 1 else logits.sum(1)

"""What other users took next after the items of a history: the graph's two-hop paths in order of time, at the head."""

import numpy as np
import torch
from pydantic import Field
from torch import nn

from raygrec.config import StrictConfig
from raygrec.data.arrays import CSR
from raygrec.model.head import Cells

FAINTEST = 0.01  # items of a history with a smaller weight are not looked at
NOTHING = 1e-6  # what rounding leaves where a user's own steps are all there were


class SuccessorConfig(StrictConfig):
    """Which steps count. [ours]"""

    steps: int = Field(3, ge=1)
    """How many of the items after an item are its successors, the k-th with weight 1/k."""
    decay: float = Field(0.5, gt=0, lt=1)
    """Weight of each item of a history as a share of the weight of the one after it."""


class Successors:
    """[ours] s_j = Σ_a γ^a Σ_k 1/k · #{users v ≠ u that took j k steps after h_{n−a}} for the items h_1 … h_n of a
    user u: paths item, user, later item in the training graph, none of them over u.

    What a user took is thus never known from the user, in training as little as later. Needs interactions in time
    order.
    """

    def __init__(self, train: CSR, num_items: int, config: SuccessorConfig) -> None:
        """train: CSR of each user's training items in time order."""
        from scipy import sparse

        items, users = np.asarray(train.indices).astype(np.int64), train.rows
        place = np.arange(len(items)) - train.indptr[users]
        self.num_items, self.config = num_items, config
        self.edges, edge_of = np.unique(users * num_items + items, return_inverse=True)
        later = [np.flatnonzero(place >= k) for k in range(1, config.steps + 1)]
        to = np.concatenate(later)
        steps = np.repeat(np.arange(1, config.steps + 1), [len(some) for some in later])
        # Every item's successors, and below them what a user's own steps are of these, a row for each edge.
        places = np.concatenate([items[to - steps], num_items + edge_of[to - steps]]), np.tile(items[to], 2)
        shape = num_items + len(self.edges), num_items
        self._matrix = sparse.csr_array((np.concatenate([1 / steps, -1 / steps]), places), shape)
        self._weights = config.decay ** np.arange(1 + int(np.log(FAINTEST) / np.log(config.decay)))

    def after(self, users: np.ndarray, shown: CSR, read: np.ndarray) -> Cells:
        """s [P positions] where it is not zero, for histories that end at the entries `read` [P] of `shown`; −1: empty.

        users: [B]. shown: [B] rows of their items, in time order.
        """
        from scipy import sparse

        entries_PA = read[:, None] - np.arange(len(self._weights))
        rows_P = shown.rows[read] if len(shown.indices) else np.zeros(len(read), dtype=np.int64)
        positions, ages = ((read >= 0)[:, None] & (entries_PA >= shown.indptr[rows_P][:, None])).nonzero()
        items = np.asarray(shown.indices)[entries_PA[positions, ages]].astype(np.int64)
        keys = users[rows_P[positions]] * self.num_items + items
        edges = np.searchsorted(self.edges, keys)
        own = self.edges[np.minimum(edges, len(self.edges) - 1)] == keys if len(self.edges) else edges < 0
        weights = self._weights[ages]
        places = np.concatenate([positions, positions[own]]), np.concatenate([items, self.num_items + edges[own]])
        shape = len(read), self._matrix.shape[0]
        found = sparse.csr_array((np.concatenate([weights, weights[own]]), places), shape) @ self._matrix
        found.data[found.data < NOTHING] = 0
        found.eliminate_zeros()
        found.sort_indices()
        return Cells(
            torch.from_numpy(found.indptr.astype(np.int64)),
            torch.from_numpy(found.indices.astype(np.int64)),
            torch.from_numpy(found.data.astype(np.float32)),
        )


class SuccessorLogits(nn.Module):
    """α log(1 + s / ε), added to the logits of the items that have an s; α and ε are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([0.5, 0.0]))  # α, log ε

    def forward(self, found: Cells) -> Cells:
        """The logits of these cells, in fp32."""
        share, floor = self.trained.float().unbind()
        return found.weighing(share * (found.weights * (-floor).exp()).log1p())

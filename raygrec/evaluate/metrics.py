"""Ranking metrics as sums over users, so that chunks and workers add up to the same figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError

METRICS = ("precision", "recall", "hit", "ndcg", "mrr")


@dataclass
class MetricSums:
    """Sums of precision, recall, hit, ndcg and mrr at each k over users, and the items they were shown.

    ks: list lengths. num_items: size of the catalogue. users: how many were added.
    sums: [5 metrics, len(ks)] float64. covered: [len(ks), I] bool.
    """

    ks: tuple[int, ...]
    num_items: int
    users: int = 0
    sums: torch.Tensor = field(default=None)  # type: ignore[assignment]
    covered: torch.Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise InputError(f"metrics: ks must be positive list lengths (got {list(self.ks)})")
        if self.sums is None:
            self.sums = torch.zeros(len(METRICS), len(self.ks), dtype=torch.float64)
        if self.covered is None:
            self.covered = torch.zeros(len(self.ks), self.num_items, dtype=torch.bool)

    def add(self, topk_items: torch.Tensor, targets: CSR) -> None:
        """Adds users by their ranked lists [B, K >= max(ks)], best first, and their targets [B rows].

        -1 pads a short list and never hits; an item named twice counts at its first place only. A user
        without targets is left out.
        """
        if topk_items.shape[1] < max(self.ks):
            raise InputError(f"metrics: lists of {topk_items.shape[1]} items, but k is {max(self.ks)}")
        kept = np.flatnonzero(targets.lengths)
        lists_BK = topk_items.detach().cpu()[torch.from_numpy(kept), : max(self.ks)]
        hits_BK, num_targets_B = find_hits(lists_BK, targets.take(kept), self.num_items)
        self.users += len(kept)
        for column, k in enumerate(self.ks):
            values_MB = metrics_at(k, hits_BK, num_targets_B)
            self.sums[:, column] += values_MB.sum(1)
            shown = lists_BK[:, :k]
            self.covered[column, shown[shown >= 0].long()] = True

    def merge(self, other: "MetricSums") -> None:
        """Adds another worker's or chunk's sums to these; both must have the same ks and catalogue."""
        if (self.ks, self.num_items) != (other.ks, other.num_items):
            raise InputError(f"metrics: sums at k={other.ks} cannot be added to sums at k={self.ks}")
        self.users += other.users
        self.sums += other.sums
        self.covered |= other.covered

    def as_tensor(self) -> torch.Tensor:
        """[1 + 5 len(ks) + len(ks) I] float64, for an all-reduce by SUM; read by `from_tensor`."""
        count = torch.tensor([self.users], dtype=torch.float64)
        return torch.cat([count, self.sums.flatten(), self.covered.flatten().double()])

    @staticmethod
    def from_tensor(tensor: torch.Tensor, ks: Sequence[int], num_items: int) -> "MetricSums":
        """Undoes `as_tensor`, also after summation over workers."""
        ks = tuple(ks)
        count, sums, covered = tensor.cpu().split([1, len(METRICS) * len(ks), len(ks) * num_items])
        return MetricSums(
            ks,
            num_items,
            users=int(count),
            sums=sums.reshape(len(METRICS), len(ks)).clone(),
            covered=covered.reshape(len(ks), num_items) > 0,
        )

    def result(self) -> dict[str, float]:
        """Means over users, and coverage (share of the catalogue in any list): {"precision@5": …, …}."""
        if not self.users:
            raise InputError("metrics: no user has a target")
        means = (self.sums / self.users).tolist()
        coverage = self.covered.double().mean(1).tolist()
        table = dict(zip((*METRICS, "coverage"), (*means, coverage), strict=True))
        return {f"{name}@{k}": table[name][column] for column, k in enumerate(self.ks) for name in table}


def find_hits(lists_BK: torch.Tensor, targets: CSR, num_items: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where ranked lists hold a target: hits [B, K] bool, and the number of distinct targets [B]."""
    num_users, length = lists_BK.shape
    wanted = np.unique(targets.rows * num_items + targets.indices)
    num_targets_B = torch.from_numpy(np.bincount(wanted // num_items, minlength=num_users))
    keys_BK = torch.arange(num_users)[:, None] * num_items + lists_BK.long()
    earlier_KK = torch.ones(length, length, dtype=torch.bool).tril(-1)
    repeated_BK = ((lists_BK[:, :, None] == lists_BK[:, None, :]) & earlier_KK).any(2)
    hits_BK = torch.isin(keys_BK, torch.from_numpy(wanted)) & (lists_BK >= 0) & ~repeated_BK
    return hits_BK, num_targets_B


def metrics_at(k: int, hits_BK: torch.Tensor, num_targets_B: torch.Tensor) -> torch.Tensor:
    """Per-user precision, recall, hit, ndcg and mrr at k: [5, B] float64.

    NDCG has binary gains and log2 discounts; its ideal list holds min(number of targets, k) targets. MRR is
    the inverse place of the first hit.
    """
    hits_Bk = hits_BK[:, :k].double()
    count_B = hits_Bk.sum(1)
    places_k = torch.arange(1, k + 1, dtype=torch.float64)
    discounts_k = 1 / torch.log2(places_k + 1)
    ideal_B = discounts_k.cumsum(0)[num_targets_B.clamp(max=k) - 1]
    return torch.stack(
        [
            count_B / k,
            count_B / num_targets_B,
            (count_B > 0).double(),
            hits_Bk @ discounts_k / ideal_B,
            (hits_Bk / places_k).amax(1),
        ]
    )

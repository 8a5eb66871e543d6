"""Which interactions stay: the first of repeated ones, and the k-core."""

import numpy as np

from raygrec.data.arrays import stable_order


def first_occurrences(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[entries] bool: true at the first entry of each (user, item) pair, in the given order."""
    order = stable_order(items, users)
    users, items = users[order], items[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    keep = np.empty_like(first)
    keep[order] = first
    return keep


def k_core(users: np.ndarray, items: np.ndarray, k: int) -> np.ndarray:
    """[entries] bool: the largest part in which every user and every item has at least `k` entries.

    Removing a user may starve an item and the other way round, so it repeats until nothing changes.
    """
    keep = np.ones(len(users), dtype=bool)
    while True:
        poor_users = np.bincount(users[keep], minlength=int(users.max(initial=-1)) + 1) < k
        poor_items = np.bincount(items[keep], minlength=int(items.max(initial=-1)) + 1) < k
        stay = keep & ~poor_users[users] & ~poor_items[items]
        if np.array_equal(stay, keep):
            return keep
        keep = stay


def compact(numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Renumbers without gaps: ([entries] int32 new numbers, [used] old numbers in their order)."""
    used = np.bincount(numbers) > 0
    renumbered = (np.cumsum(used) - 1).astype(np.int32)
    return renumbered[numbers], np.flatnonzero(used)

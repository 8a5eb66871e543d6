"""Which interactions stay: the first of repeated ones, and the k-core."""

import numpy as np


def first_occurrences(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[entries] bool: true at the first entry of each (user, item) pair, in the given order."""
    width = int(items.max(initial=0)) + 1
    pairs = users.astype(np.int64)
    pairs *= width
    pairs += items
    ordered = np.sort(pairs)  # quick; the indirect sort inside `unique` is not, and few users repeat anything
    repeats = np.zeros(int(users.max(initial=-1)) + 1, dtype=bool)
    repeats[ordered[1:][ordered[1:] == ordered[:-1]] // width] = True
    places = np.flatnonzero(repeats[users])
    _, first = np.unique(pairs[places], return_index=True)
    keep = np.ones(len(users), dtype=bool)
    keep[places] = False
    keep[places[first]] = True
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

"""What all users took lately: items' shares of the interactions, as known at the moment a recommendation is made."""

from typing import Self

import numpy as np
import torch

from raygrec.data.arrays import CSR, stable_order
from raygrec.data.store import Store

MOMENTS = 64  # the training interactions are cut into so many parts of equal size, each with its own shares
EARLIER = 0.1  # weight of the shares in all that came before, beside those in the window
READING = {"valid": MOMENTS, "test": MOMENTS + 1}
READINGS = MOMENTS + len(READING)


class Trend:
    """[ours] Log-shares of the items, ln π_i(m) [M + 2, I], before each of M moments of training, then at its end
    (validation reads these) and at the end of validation (test reads these).

    π = (1 − ε) w + ε a: w counts the `window` newest interactions before the moment, given as a share of all training
    interactions, and a all before it, where each item has one more than that. Nothing after the moment is counted.
    Added to the logits, it leaves to the model what a user wants beside what all want then, and moves with the times
    after training has ended.
    """

    def __init__(
        self, train: CSR, train_times: np.ndarray, valid: CSR, valid_times: np.ndarray, num_items: int, window: float
    ) -> None:
        order = stable_order(np.asarray(train_times))
        items = np.asarray(train.indices)[order]
        later = np.asarray(valid.indices)[stable_order(np.asarray(valid_times))]
        edges = np.arange(MOMENTS + 1) * len(items) // MOMENTS
        size = max(int(window * len(items)), 1)
        known = np.concatenate([items, later])
        self.log_shares_MI = torch.from_numpy(
            np.stack([_log_shares(known[:end], size, num_items) for end in (*edges, len(known))])
        )
        moments = np.empty(len(items), dtype=np.int64)
        moments[order] = np.repeat(np.arange(MOMENTS), np.diff(edges))
        pairs = train.rows * num_items + np.asarray(train.indices)
        by_pair = stable_order(pairs)
        self._pairs, self._moments, self._items = pairs[by_pair], moments[by_pair], num_items

    @classmethod
    def of(cls, store: Store, window: float) -> Self:
        """Of a store that was split in time; `InputError` where it knows no times."""
        train, valid = store.interactions("train"), store.interactions("valid")
        return cls(train, store.times("train"), valid, store.times("valid"), store.num_items, window)

    def moments(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        """[n]: the moment at which each user took the item, for the first time, in training."""
        return self._moments[np.searchsorted(self._pairs, users * self._items + items)]


def _log_shares(known: np.ndarray, size: int, num_items: int) -> np.ndarray:
    newest = known[-size:]
    earlier = (np.bincount(known, minlength=num_items) + 1) / (len(known) + num_items)
    window = np.bincount(newest, minlength=num_items) / max(len(newest), 1)
    share = (1 - EARLIER) * window + EARLIER * earlier if len(known) else earlier
    return np.log(share).astype(np.float32)

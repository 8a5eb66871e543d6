"""Random numbers as a pure function of what they are for: no state, the same for any batch split."""

from collections.abc import Sequence

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


class Draws:
    """Uniform numbers keyed by (seed, stage, epoch, …) and, entry by entry, by counters such as user, place.

    The mixing function is splitmix64's finaliser (Steele et al., OOPSLA 2014), applied once per counter.
    """

    def __init__(self, *key: int) -> None:
        self.key = _absorb(np.zeros((), dtype=np.uint64), key)

    def uniform(self, *counters: np.ndarray | int) -> np.ndarray:
        """float64 in [0, 1), of the counters' broadcast shape; the same counters give the same number."""
        return (_absorb(self.key, counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def permutation(self, count: int) -> np.ndarray:
        """A permutation of 0 … count − 1."""
        return np.argsort(self.uniform(np.arange(count)), kind="stable")


def _absorb(state: np.ndarray, counters: Sequence[np.ndarray | int]) -> np.ndarray:
    with np.errstate(over="ignore"):
        for counter in counters:
            state = state ^ np.asarray(counter).astype(np.uint64)
            state = state + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX1
            state = (state ^ (state >> np.uint64(27))) * _MIX2
            state = state ^ (state >> np.uint64(31))
    return state

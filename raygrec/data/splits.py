"""Which interactions are for training, validation and test.

Each function takes interactions that are sorted by user, and by time inside a user, and returns one label per
entry: [entries] uint8, 0 train, 1 valid, 2 test.
"""

import numpy as np

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)


def leave_one_out(users: np.ndarray) -> np.ndarray:
    """The last interaction of a user is for test, the one before it for validation.

    Users with fewer than 3 interactions keep them all in training.
    """
    counts = np.bincount(users)
    from_end = np.repeat(np.cumsum(counts), counts) - np.arange(len(users))  # 1 = the user's last
    labels = np.where(from_end == 1, TEST, np.where(from_end == 2, VALID, TRAIN)).astype(np.uint8)
    labels[counts[users] < 3] = TRAIN
    return labels


def ratio(users: np.ndarray, valid_ratio: float, test_ratio: float, seed: int) -> np.ndarray:
    """Draws a share of each user's interactions at random, rounded to the nearest number.

    One is left for training at least. Both ratios are of all of them: 0.1 and 0.2 give 70/10/20.
    """
    counts = np.bincount(users)
    tests = np.minimum(_share(counts, test_ratio), np.maximum(counts - 1, 0))
    valids = np.minimum(_share(counts, valid_ratio), np.maximum(counts - 1 - tests, 0))
    order = np.lexsort((np.random.default_rng(seed).random(len(users)), users))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(users), dtype=np.int64)
    rank[order] = np.arange(len(users)) - starts[users]  # a random place among the user's own
    labels = np.where(rank < (tests + valids)[users], VALID, TRAIN).astype(np.uint8)
    labels[rank < tests[users]] = TEST
    return labels


def global_time(times: np.ndarray, valid_ratio: float, test_ratio: float) -> np.ndarray:
    """Cuts all interactions at two moments; entries of equal time fall on the same, later side."""
    labels = np.zeros(len(times), dtype=np.uint8)
    ordered = np.sort(times)
    for label, share in ((VALID, valid_ratio + test_ratio), (TEST, test_ratio)):
        cut = len(times) - int(_share(np.array(len(times)), share))
        if cut < len(times):
            labels[times >= ordered[cut]] = label
    return labels


def unseen_in_training(numbers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[entries] bool: the user or item of this entry has no training entry."""
    trained = np.bincount(numbers[labels == TRAIN], minlength=int(numbers.max(initial=-1)) + 1) > 0
    return ~trained[numbers]


def _share(counts: np.ndarray, share: float) -> np.ndarray:
    return np.floor(counts * share + 0.5 + 1e-9).astype(np.int64)  # 1e-9: 0.145 * 100 is a hair below 14.5

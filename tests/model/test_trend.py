import math

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.model.trend import EARLIER, MOMENTS, READING, Trend

ITEMS = 5


def random_trend(window: float, seed: int = 0, valid: int = 40) -> tuple[Trend, list[tuple[int, int, int]], list]:
    """A trend over 200 training interactions of 20 users, and (time, user, item) of all, in time order."""
    rng = np.random.default_rng(seed)
    events = [(time, int(rng.integers(20)), int(rng.integers(ITEMS))) for time in rng.permutation(1000)[: 200 + valid]]
    events.sort()
    train, later = events[:200], events[200:]
    return Trend(*rows_of(train), *rows_of(later), ITEMS, window), train, later


def rows_of(events: list[tuple[int, int, int]]) -> tuple[CSR, np.ndarray]:
    """As a store has them: by user, in time order, with the times beside."""
    ordered = sorted(events, key=lambda event: (event[1], event[0]))
    users, items = (np.array([event[place] for event in ordered]) for place in (1, 2))
    return CSR.from_pairs(users, items, 20), np.array([event[0] for event in ordered], dtype=np.int64)


def by_hand(known: list[int], size: int) -> list[float]:
    newest = known[-size:]
    return [
        math.log(
            (1 - EARLIER) * newest.count(item) / len(newest) + EARLIER * (known.count(item) + 1) / (len(known) + ITEMS)
        )
        for item in range(ITEMS)
    ]


def test_shares_against_plain_counts_at_every_moment():
    trend, train, later = random_trend(0.25)
    items = [item for *_, item in train]
    table = trend.log_shares_MI
    assert table.shape == (MOMENTS + 2, ITEMS)
    torch.testing.assert_close(table[0], torch.full((ITEMS,), -math.log(ITEMS)))  # nothing is known: all are alike
    for moment in range(1, MOMENTS + 1):
        known = items[: 200 * moment // MOMENTS]
        np.testing.assert_allclose(table[moment], by_hand(known, 50), rtol=1e-5, err_msg=str(moment))
    np.testing.assert_allclose(table[READING["test"]], by_hand(items + [item for *_, item in later], 50), rtol=1e-5)
    np.testing.assert_allclose(table.exp().sum(1), 1, rtol=1e-5)


def test_validation_reads_what_was_known_when_training_ended():
    trend, train, _ = random_trend(1.0)
    np.testing.assert_allclose(trend.log_shares_MI[READING["valid"]], by_hand([item for *_, item in train], 200), 1e-5)


def test_no_moment_counts_the_interaction_itself_or_a_later_one():
    """Each interaction's moment begins at its own place in time or before it."""
    trend, train, _ = random_trend(0.25)
    first: dict[tuple[int, int], int] = {}
    for place, (_, user, item) in enumerate(train):
        first.setdefault((user, item), place)
    users, items = (np.array(column) for column in zip(*first, strict=True))
    moments = trend.moments(users, items)
    begins = moments * len(train) // MOMENTS
    places = np.array(list(first.values()))
    assert (begins <= places).all()
    assert ((moments + 1) * len(train) // MOMENTS > places).all()


@pytest.mark.parametrize("empty", ["valid", "train"])
def test_few_interactions(empty):
    """Fewer than there are moments, and none after training."""
    train = (CSR.from_lists([[0, 1], [1]]), np.array([3, 9, 5]))
    none = (CSR.from_lists([[], []]), np.zeros(0, dtype=np.int64))
    trend = Trend(*(train if empty == "valid" else none), *none, 2, 0.1)
    table = trend.log_shares_MI
    assert torch.isfinite(table).all()
    torch.testing.assert_close(table[READING["valid"]], table[READING["test"]])
    if empty == "valid":
        newest = [EARLIER * 2 / 5, 1 - EARLIER + EARLIER * 3 / 5]  # of one interaction, that with item 1
        torch.testing.assert_close(table[-1].exp(), torch.tensor(newest))

import numpy as np
import pytest

from raygrec.draws import Draws


def test_uniform_has_the_moments_of_a_uniform_distribution():
    values = Draws(3, 1).uniform(np.arange(200)[:, None], np.arange(500))
    assert values.shape == (200, 500)
    assert values.min() >= 0 and values.max() < 1
    # Five standard errors of the first three moments of 100,000 uniform numbers.
    for power, variance in ((1, 1 / 12), (2, 4 / 45), (3, 9 / 112)):
        assert abs((values**power).mean() - 1 / (power + 1)) < 5 * np.sqrt(variance / values.size)
    counts = np.bincount((values.ravel() * 20).astype(int), minlength=20)
    assert ((counts - 5000) ** 2 / 5000).sum() < 54  # chi-squared, 19 degrees of freedom, p = 3e-5


def test_neighbouring_counters_seeds_and_epochs_are_uncorrelated():
    users = np.arange(50_000)
    base = Draws(0, 0).uniform(users, 1)
    others = [
        Draws(1, 0).uniform(users, 1),
        Draws(0, 1).uniform(users, 1),
        Draws(0, 0).uniform(users, 2),
        Draws(0, 0).uniform(users + 1, 1),
        Draws(0, 0).uniform(1, users),
    ]
    for other in others:
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(len(users))


def test_a_number_does_not_depend_on_the_call_it_comes_from():
    draws = Draws(7, 2, 5)
    users, items = np.array([4, 9, 4]), np.array([[1], [2]])
    together = draws.uniform(users, items)
    assert together.shape == (2, 3)
    assert together[1, 1] == draws.uniform(9, 2) == Draws(7, 2, 5).uniform(np.array([9]), np.array([2]))[0]
    assert together[0, 0] == together[0, 2]
    assert draws.uniform(9, 2) != draws.uniform(2, 9)
    assert np.array_equal(draws.uniform(users), draws.uniform(users.astype(np.int32)))


def test_the_numbers_are_the_same_on_every_machine_and_in_every_release():
    # Two rounds of splitmix64, worked out with Python's integers.
    def mix(state: int, counter: int) -> int:
        mask = 2**64 - 1
        state = ((state ^ counter) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & mask
        return state ^ state >> 31

    assert Draws(11).uniform(5) == (mix(mix(0, 11), 5) >> 11) / 2**53


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_permutation_is_one(count):
    order = Draws(1).permutation(count)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, Draws(1).permutation(count))
    assert count < 3 or not np.array_equal(order, Draws(2).permutation(count))


def test_every_permutation_is_equally_likely():
    seen = [tuple(Draws(seed).permutation(3)) for seed in range(6000)]
    counts = np.array([seen.count(order) for order in set(seen)])
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 26  # chi-squared, 5 degrees of freedom, p = 1e-4

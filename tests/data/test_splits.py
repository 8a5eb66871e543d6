import numpy as np
import pytest

from raygrec.data import splits


def test_leave_one_out_takes_the_last_two():
    users = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert splits.leave_one_out(users).tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("length", "valid", "test"),
    [(1, 0, 0), (2, 0, 0), (3, 0, 1), (5, 1, 1), (10, 1, 2), (15, 2, 3), (24, 2, 5)],
)
def test_ratio_takes_rounded_shares_of_each_user(length, valid, test):
    users = np.repeat([0, 1, 2], [7, length, 4])
    labels = splits.ratio(users, 0.1, 0.2, seed=3)[users == 1]
    assert np.bincount(labels, minlength=3).tolist() == [length - valid - test, valid, test]


def test_ratio_leaves_one_for_training():
    labels = splits.ratio(np.zeros(2, dtype=int), 0.49, 0.5, seed=0)
    assert sorted(labels) == [splits.TRAIN, splits.TEST]


def test_ratio_is_random_by_seed_and_uniform_over_places():
    users = np.repeat(np.arange(2000), 10)
    first, again, other = (splits.ratio(users, 0.1, 0.2, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    share_by_place = (first.reshape(2000, 10) == splits.TEST).mean(axis=0)
    assert np.abs(share_by_place - 0.2).max() < 0.04  # 4.5 standard errors of 2000 draws


def test_global_time_cuts_at_quantiles_and_keeps_ties_together():
    times = np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 90])
    assert splits.global_time(times, 0.1, 0.2).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 2, 2]
    tied = np.array([10, 20, 30, 40, 50, 60, 70, 90, 90, 90])
    assert splits.global_time(tied, 0.2, 0.1).tolist() == [0, 0, 0, 0, 0, 0, 0, 2, 2, 2]


def test_unseen_in_training():
    numbers = np.array([0, 1, 1, 2])
    labels = np.array([0, 0, 2, 2])
    assert splits.unseen_in_training(numbers, labels).tolist() == [False, False, False, True]

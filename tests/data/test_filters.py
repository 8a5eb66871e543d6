import numpy as np

from raygrec.data.filters import compact, first_occurrences, k_core


def test_first_occurrence_of_each_pair_stays():
    users = np.array([0, 0, 0, 1, 1], dtype=np.int32)
    items = np.array([5, 2, 5, 5, 5], dtype=np.int32)
    assert first_occurrences(users, items).tolist() == [True, True, False, True, False]


def test_first_occurrences_agree_with_a_slow_one_on_random_data():
    rng = np.random.default_rng(0)
    for most in (4, 400):
        users, items = rng.integers(most, size=300), rng.integers(9, size=300)
        seen = set()
        slow = [not (pair in seen or seen.add(pair)) for pair in zip(users, items, strict=True)]
        assert first_occurrences(users, items).tolist() == slow


def test_k_core_repeats_until_nothing_changes():
    # 2-core by hand: item 3 has one entry and goes; then user 2 has one left and goes; then item 2 has one
    # left (user 0) and goes; users 0 and 1 with items 0 and 1 remain.
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2), (2, 3)]
    users, items = np.array(pairs, dtype=np.int32).T
    keep = k_core(users, items, 2)
    assert [pair for pair, kept in zip(pairs, keep, strict=True) if kept] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_k_core_agrees_with_a_slow_one_on_random_data():
    rng = np.random.default_rng(0)
    users, items = rng.integers(60, size=400), rng.integers(50, size=400)
    alive = set(range(400))
    while True:
        poor = {
            entry
            for entry in alive
            if sum(users[other] == users[entry] for other in alive) < 5
            or sum(items[other] == items[entry] for other in alive) < 5
        }
        if not poor:
            break
        alive -= poor
    assert set(np.flatnonzero(k_core(users, items, 5))) == alive
    assert 0 < len(alive) < 400


def test_k_core_of_nothing_left():
    users, items = np.array([0, 1]), np.array([0, 1])
    assert not k_core(users, items, 2).any()


def test_compact_keeps_the_order():
    renumbered, used = compact(np.array([7, 2, 7, 4], dtype=np.int32))
    assert renumbered.tolist() == [2, 0, 2, 1]
    assert used.tolist() == [2, 4, 7]

import time
from collections import Counter

import numpy as np
import pytest

from raygrec.data.arrays import CSR
from raygrec.draws import Draws
from raygrec.graph.neighbours import NeighbourConfig, NeighbourSampler

CHOICES = ["recent", "uniform", "co-occurrence"]
USERS, ITEMS = 40, 30


def sampler(by_user, num_items, **settings) -> NeighbourSampler:
    return NeighbourSampler(by_user, by_user.transposed(num_items), NeighbourConfig(**settings))


def lists(rows: CSR) -> list[list[int]]:
    return [row.tolist() for row in rows]


def copies(histories: list[list[int]], num_items: int, count: int) -> CSR:
    """`count` separate graphs of the same shape, one after the other."""
    return CSR.from_lists([[item + num_items * n for item in row] for n in range(count) for row in histories])


@pytest.fixture
def histories() -> CSR:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, USERS)  # some users, and the last item, have no edge
    return CSR.from_lists([rng.choice(ITEMS - 1, size, replace=False) for size in lengths])


@pytest.fixture
def shown(histories) -> CSR:
    return CSR.from_lists([row[: len(row) - user % 3] if len(row) > 2 else row for user, row in enumerate(histories)])


@pytest.fixture
def hidden(histories) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.random.default_rng(1).random(len(histories.indices)) < 0.3
    return histories.rows[chosen], histories.indices[chosen]


def ranked(paths: list[tuple[int, tuple[int, ...]]], choice: str) -> dict[int, tuple[int, ...]]:
    """Per node reached by (node, ages) paths its rank in the choice, the smallest first, in plain Python."""
    if choice == "co-occurrence":
        return {node: (-count,) for node, count in Counter(node for node, _ in paths).items()}
    return {node: min(ages for end, ages in paths if end == node) if choice == "recent" else () for node, _ in paths}


def assert_first_of(found: list[int], ranks: dict[int, tuple[int, ...]], limit: int):
    """`found` are the first of what was reached; which of equal ones is left to the draws."""
    assert len(set(found)) == len(found) and set(found) <= set(ranks)
    assert [ranks[node] for node in found] == sorted(ranks.values())[:limit]


def edge_ages(histories: CSR) -> dict[tuple[int, int], int]:
    return {
        (user, int(item)): len(row) - 1 - place for user, row in enumerate(histories) for place, item in enumerate(row)
    }


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("limit", [2, 5, 1000])
def test_users_of_random_graphs_equal_a_plain_reference(histories, shown, choice, limit):
    ages = edge_ages(histories)
    found = sampler(histories, ITEMS, choice=choice, two_hop=limit).of_users(np.arange(USERS), shown, Draws(1))
    assert (found.indptr.dtype, found.indices.dtype) == (np.int64, np.int32)
    for user, row in enumerate(lists(found)):
        items = shown[user].tolist()
        paths = [
            (other, (len(items) - 1 - place, age))
            for place, item in enumerate(items)
            for (other, other_item), age in ages.items()
            if other_item == item and other != user
        ]
        assert_first_of(row, ranked(paths, choice), limit)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("limit", [2, 5, 1000])
def test_items_of_random_graphs_equal_a_plain_reference(histories, hidden, choice, hides, limit):
    ages = edge_ages(histories)
    if hides:
        for edge in zip(*hidden, strict=True):
            del ages[edge]
    graph = sampler(histories, ITEMS, choice=choice, one_hop=limit, two_hop=limit)
    one, two = graph.of_items(np.arange(ITEMS), Draws(1), graph.edges(*hidden) if hides else None)
    for item in range(ITEMS):
        users = {user: age for (user, other), age in ages.items() if other == item}
        assert_first_of(one[item].tolist(), ranked([(user, (age,)) for user, age in users.items()], choice), limit)
        paths = [(other, (users[user], age)) for (user, other), age in ages.items() if user in users and other != item]
        assert_first_of(two[item].tolist(), ranked(paths, choice), limit)


def test_choices_by_hand():
    # User 0 holds items 0, 1 and, newest, 2: it shares two with users 1 and 2, and only the newest with user 3.
    by_user = CSR.from_lists([[0, 1, 2], [0, 1, 3], [1, 0], [2, 4]])
    user, item, shown = np.array([0]), np.array([0]), by_user.take(np.array([0]))
    by_paths, by_age = (sampler(by_user, 5, choice=choice) for choice in ("co-occurrence", "recent"))

    assert [set(by_paths.of_users(user, shown, Draws(0))[0][:2])] == [{1, 2}]
    # Of item 1's users, user 1 has one later item and user 2 has one too; item 0 is older still.
    assert by_age.of_users(user, shown, Draws(0))[0][0] == 3

    one, two = by_paths.of_items(item, Draws(0))
    assert set(one[0]) == {0, 1, 2} and two[0][0] == 1  # item 1 shares all three users, 2 and 3 one each
    one, two = by_age.of_items(item, Draws(0))
    assert one[0][0] == 2 and set(one[0][1:]) == {0, 1}  # later items of users 2, 0 and 1: none, two, two
    assert lists(two) in ([[1, 2, 3]], [[1, 3, 2]])  # user 2's other item; then the newest of users 0 and 1


def test_only_shown_items_lead_to_users():
    by_user = CSR.from_lists([[0, 1], [0], [1]])
    graph = sampler(by_user, 2)
    assert lists(graph.of_users(np.array([0, 0]), CSR.from_lists([[0], [1]]), Draws(0))) == [[1], [2]]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_hidden_edge_leaves_no_path(choice):
    # 0 - {A, B} - 1 and 0 - {A} - 2; hiding (A, 0) leaves item 0 only user B, and item 2 nobody to share.
    by_user = CSR.from_lists([[0, 1, 2], [1, 0]])
    graph = sampler(by_user, 3, choice=choice)
    edge = (np.array([0]), np.array([0]))
    one, two = graph.of_items(np.arange(3), Draws(0), graph.edges(*edge))
    assert lists(one)[0] == [1] and set(one[1]) == {0, 1} and lists(one)[2] == [0]
    assert lists(two)[0] == [1]
    assert set(two[1]) == {0, 2}  # to item 0 through user B still
    assert lists(two)[2] == [1]
    both = (np.array([0, 1]), np.array([0, 0]))
    one, two = graph.of_items(np.arange(3), Draws(0), graph.edges(*both))
    assert lists(one)[0] == lists(two)[0] == [] and lists(two)[1] == [2]


@pytest.mark.parametrize("choice", ["uniform", "co-occurrence"])
def test_hiding_edges_equals_a_graph_without_them(histories, hidden, choice):
    gone = set(zip(*(part.tolist() for part in hidden), strict=True))
    rest = CSR.from_lists([[i for i in row.tolist() if (user, i) not in gone] for user, row in enumerate(histories)])
    items = np.arange(ITEMS)
    graph = sampler(histories, ITEMS, choice=choice)
    with_hidden = graph.of_items(items, Draws(5), graph.edges(*hidden))
    without = sampler(rest, ITEMS, choice=choice).of_items(items, Draws(5))
    assert [lists(hop) for hop in with_hidden] == [lists(hop) for hop in without]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("candidates", [3, 2048])
def test_neighbours_depend_on_the_node_and_the_draws_alone(histories, shown, hidden, choice, candidates):
    graph = sampler(histories, ITEMS, choice=choice, one_hop=2, two_hop=2, candidates=candidates)

    def neighbours(users, items, draws):
        one, two = graph.of_items(items, draws, graph.edges(*hidden))
        others = lists(graph.of_users(users, shown.take(users), draws))
        return (
            dict(zip(users.tolist(), others, strict=True)),
            dict(zip(items.tolist(), zip(lists(one), lists(two), strict=True), strict=True)),
        )

    users, items = neighbours(np.arange(USERS), np.arange(ITEMS), Draws(0, 1))
    assert neighbours(np.arange(USERS)[::-1], np.arange(ITEMS)[::-1], Draws(0, 1)) == (users, items)
    for node in range(ITEMS):
        assert neighbours(np.array([node]), np.array([node]), Draws(0, 1)) == ({node: users[node]}, {node: items[node]})
    other_users, other_items = neighbours(np.arange(USERS), np.arange(ITEMS), Draws(0, 2))
    assert other_users != users and other_items != items


def assert_equally_often(chosen: np.ndarray, kinds: list[int], times: int):
    """Five standard errors of a binomial count."""
    share = 1 / len(kinds)
    counts = Counter(chosen.tolist())
    assert set(counts) == set(kinds)
    for kind in kinds:
        assert abs(counts[kind] - times * share) < 5 * np.sqrt(times * share * (1 - share))


def test_uniform_does_not_weigh_by_paths_and_ties_are_drawn():
    # User 0 shares two items with user 1, one with each of 2, 3 and 4; 5 is out of reach.
    shape, count = [[0, 1, 2], [0, 1, 3], [0], [1], [2], [3]], 4000
    by_user = copies(shape, 4, count)
    users = np.arange(count) * len(shape)
    shown = by_user.take(users)

    def others(**settings):
        found = sampler(by_user, 4 * count, **settings).of_users(users, shown, Draws(3))
        assert (found.lengths == settings["two_hop"]).all()
        return (found.indices % len(shape)).reshape(count, -1)

    assert_equally_often(others(choice="uniform", two_hop=1)[:, 0], [1, 2, 3, 4], count)
    co_occurring = others(choice="co-occurrence", two_hop=2)
    assert (co_occurring[:, 0] == 1).all()
    assert_equally_often(co_occurring[:, 1], [2, 3, 4], count)
    assert (others(choice="recent", two_hop=1) == 4).all()


@pytest.mark.parametrize("choice", ["uniform", "co-occurrence"])
def test_hubs_beyond_the_bound_are_sampled_evenly(choice):
    # One item with 11 users, all holding an item of their own besides: rows of 11 where 4 are examined.
    shape, count = [[0, user + 1] for user in range(11)], 4000
    by_user = copies(shape, 12, count)
    settings = dict(choice=choice, one_hop=1000, two_hop=1000, candidates=4)
    graph = sampler(by_user, 12 * count, **settings)
    one, two = graph.of_items(np.arange(count) * 12, Draws(4))
    assert (one.lengths == 4).all()
    samples = np.sort(one.indices.reshape(count, 4) % 11, axis=1)
    assert len(np.unique(samples, axis=0)) > 11  # not one sample, rotated
    users = np.arange(count) * 11
    others = graph.of_users(users, by_user.take(users), Draws(4))
    assert others.lengths.min() >= 3 and others.lengths.max() <= 4  # the user itself may be among the four
    first = sampler(by_user, 12 * count, **settings | {"one_hop": 1, "two_hop": 1})
    one, two = first.of_items(np.arange(count) * 12, Draws(4))
    assert_equally_often(one.indices % 11, list(range(11)), count)
    assert_equally_often(two.indices % 12, list(range(1, 12)), count)
    others = first.of_users(users, by_user.take(users), Draws(4))
    assert_equally_often(others.indices % 11, list(range(1, 11)), count)


def test_many_nodes_between_are_taken_in_drawn_order_or_newest_first():
    # User 0 holds four items, each with three other users: sixteen paths, of which eight are examined.
    shape, count = [[0, 1, 2, 3], *([item] for item in range(4) for _ in range(3))], 3000
    by_user = copies(shape, 4, count)
    users = np.arange(count) * len(shape)
    shown = by_user.take(users)
    settings = dict(two_hop=1000, candidates=8)
    for choice in CHOICES:
        found = sampler(by_user, 4 * count, choice=choice, **settings).of_users(users, shown, Draws(2))
        assert (found.lengths == 6).all()  # two items, the user itself left out
        items_between = (found.indices % len(shape) - 1).reshape(count, 6) // 3
        if choice == "recent":
            assert (items_between == [3, 3, 3, 2, 2, 2]).all()
    found = sampler(by_user, 4 * count, choice="uniform", two_hop=1, candidates=8).of_users(users, shown, Draws(2))
    assert_equally_often(found.indices % len(shape), list(range(1, 13)), count)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("candidates", [1, 3, 10])
def test_no_more_than_twice_the_candidates_are_examined(choice, candidates):
    everything = CSR.from_lists([list(range(30))] * 25)
    graph = sampler(everything, 30, choice=choice, one_hop=1000, two_hop=1000, candidates=candidates)
    one, two = graph.of_items(np.arange(30), Draws(0))
    assert (one.lengths == candidates).all()
    assert max(two.lengths.max(), graph.of_users(np.arange(25), everything, Draws(0)).lengths.max()) <= 2 * candidates


@pytest.mark.parametrize("choice", CHOICES)
def test_repeated_interactions_count_once_as_the_latest(choice):
    repeated = CSR.from_lists([[0, 1, 0, 2, 0], [0, 0, 3, 0], [1, 2, 1], [3, 3]])
    once = CSR.from_lists([[1, 2, 0], [3, 0], [2, 1], [3]])
    users, items = np.arange(4), np.arange(4)
    first, second = (sampler(rows, 4, choice=choice, two_hop=1) for rows in (repeated, once))
    assert lists(first.of_users(users, repeated, Draws(0))) == lists(second.of_users(users, once, Draws(0)))
    pairs = zip(first.of_items(items, Draws(0)), second.of_items(items, Draws(0)), strict=True)
    assert all(lists(ours) == lists(expected) for ours, expected in pairs)


@pytest.mark.parametrize("choice", CHOICES)
def test_nodes_without_neighbours_have_empty_rows(choice):
    graph = sampler(CSR.from_lists([[], [0], [1, 2], [2]]), 4, choice=choice)
    assert lists(graph.of_users(np.array([0, 1, 2]), CSR.from_lists([[], [0, 3], []]), Draws(0))) == [[], [], []]
    one, two = graph.of_items(np.array([3, 0, 1]), Draws(0))
    assert (lists(one), lists(two)) == ([[], [1], [2]], [[], [], [2]])
    nobody = np.zeros(0, dtype=np.int64)
    assert len(graph.of_users(nobody, CSR.from_lists([]), Draws(0))) == 0
    assert [len(hop) for hop in graph.of_items(nobody, Draws(0), graph.edges(nobody, nobody))] == [0, 0]
    no_edges = sampler(CSR.from_lists([[], []]), 2, choice=choice)
    assert lists(no_edges.of_items(np.array([1]), Draws(0))[1]) == [[]]


def test_wrong_numbers_are_refused():
    by_user = CSR.from_lists([[0, 1], [1]])
    graph = sampler(by_user, 2)
    with pytest.raises(ValueError, match="user numbers: expected whole numbers 0…1"):
        graph.of_users(np.array([2]), CSR.from_lists([[0]]), Draws(0))
    with pytest.raises(ValueError, match="1 users, but 2 rows"):
        graph.of_users(np.array([0]), by_user, Draws(0))
    with pytest.raises(ValueError, match="item numbers"):
        graph.of_items(np.array([0.0]), Draws(0))
    with pytest.raises(ValueError, match="not by_user grouped by item"):
        NeighbourSampler(by_user, CSR.from_lists([[0], [1, 0]]), NeighbourConfig())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_batch_of_a_large_graph_takes_a_moment(choice):
    rng = np.random.default_rng(0)
    by_user = CSR.from_pairs(np.sort(rng.integers(20_000, size=200_000)), rng.integers(10_000, size=200_000), 20_000)
    graph = sampler(by_user, 10_000, choice=choice)
    users = rng.choice(20_000, 512, replace=False)
    started = time.perf_counter()
    graph.of_users(users, by_user.take(users), Draws(0))
    graph.of_items(users % 10_000, Draws(0), graph.edges(by_user.rows[:5000], by_user.indices[:5000]))
    assert time.perf_counter() - started < 5

import math

import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.model.head import Cells
from raygrec.model.successors import SuccessorConfig, SuccessorLogits, Successors, alike

ITEMS = 6
TRAIN = [[0, 1, 2, 3], [1, 2, 4], [0, 2, 5, 1], [], [3]]


def found(cells: Cells) -> list[dict[int, float]]:
    """Each position's items and their weights."""
    parts = [cells.part(p, p + 1) for p in range(len(cells))]
    return [dict(zip(part.items.tolist(), part.weights.tolist(), strict=True)) for part in parts]


def after(rows: list[list[int]], histories: list[list[int]], read: list[int], **changes: object) -> list:
    """What stands after the entries `read` of the users' histories, who are the rows' first."""
    config = SuccessorConfig(**changes)
    shown = CSR.from_lists(histories)
    successors = Successors(CSR.from_lists(rows), ITEMS, config)
    return found(successors.after(np.arange(len(histories)), shown, np.array(read, dtype=np.int64)))


def plainly(rows: list[list[int]], user: int, history: list[int], steps: int, decay: float) -> dict[int, float]:
    """One user, item and step after the other."""
    counts: dict[int, float] = {}
    for other, items in enumerate(rows):
        for place, item in enumerate(items):
            for age, known in enumerate(reversed(history)):
                if other == user or known != item or decay**age < 0.01:
                    continue
                for step, later in enumerate(items[place + 1 : place + 1 + steps], 1):
                    counts[later] = counts.get(later, 0.0) + decay**age / step
    return counts


def test_successors_by_hand():
    """User 0 has taken 0 and 1; after 1 user 1 took 2, then 4, and after 0 user 2 took 2, then 5 and 1."""
    newest, empty = after(TRAIN, [[0, 1], []], [1, -1], steps=3, decay=0.5)
    assert newest == pytest.approx({2: 1 + 0.5, 4: 1 / 2, 5: 0.5 / 2, 1: 0.5 / 3})
    assert empty == {}
    assert after(TRAIN, [[0, 1]], [0], steps=1) == [{2: 1.0}]  # of 0 alone; what user 0 did is not counted


@pytest.mark.parametrize(("steps", "decay"), [(1, 0.5), (3, 0.5), (9, 0.9), (2, 0.005)])
def test_against_plain_loops_with_repeats_and_at_every_place(steps, decay):
    rng = np.random.default_rng(steps)
    rows = [rng.integers(0, ITEMS, length).tolist() for length in rng.integers(0, 7, 12)]
    successors = Successors(CSR.from_lists(rows), ITEMS, SuccessorConfig(steps=steps, decay=decay))
    users = rng.permutation(12)
    # Histories go on with what is no training item of the user.
    histories = [rows[user] + rng.integers(0, ITEMS, 2).tolist() for user in users]
    shown = CSR.from_lists(histories)
    cells = found(successors.after(users, shown, np.arange(len(shown.indices))))
    places = [
        (user, history[: n + 1]) for user, history in zip(users, histories, strict=True) for n in range(len(history))
    ]
    for cell, (user, history) in zip(cells, places, strict=True):
        assert cell == pytest.approx(plainly(rows, user, history, steps, decay), rel=1e-5)


TEXTS = torch.randn(ITEMS, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("count", [2, 99])
def test_shares_of_items_with_like_texts_against_scikit_learn(count):
    neighbours = pytest.importorskip("sklearn.neighbors").NearestNeighbors(metric="cosine")
    centred = (TEXTS - TEXTS.mean(0)).numpy()
    distances, items = neighbours.fit(centred).kneighbors(n_neighbors=min(count, ITEMS - 1))  # of others than itself
    found = alike(TEXTS, count, 0.2).toarray()
    for item in range(ITEMS):
        weights = np.exp((1 - distances[item]) / 0.2)
        expected = np.zeros(ITEMS)
        expected[items[item]] = weights / weights.sum()
        np.testing.assert_allclose(found[item], expected, rtol=1e-4)


def test_likes_are_found_in_parts(monkeypatch):
    whole = alike(TEXTS, 3, 0.1).toarray()
    monkeypatch.setattr("raygrec.model.successors.ROWS_AT_ONCE", 4)
    np.testing.assert_allclose(alike(TEXTS, 3, 0.1).toarray(), whole, rtol=1e-6)


def passed_on(rows: list[list[int]], user: int, history: list[int], config: SuccessorConfig) -> np.ndarray:
    """[3, I]: s, what texts pass on, and γH K, one user, item and step after the other."""
    shares = alike(TEXTS, config.alike, config.alike_temperature).toarray()

    def followed(weights: np.ndarray) -> np.ndarray:
        total = np.zeros(ITEMS)
        for item in np.flatnonzero(weights):
            for later, count in plainly(rows, user, [item], config.steps, config.decay).items():
                total[later] += weights[item] * count
        return total

    ages = [(age, item) for age, item in enumerate(reversed(history)) if config.decay**age >= 0.01]
    known = np.zeros(ITEMS)
    for age, item in ages:
        known[item] += config.decay**age
    parts = [followed(known) @ shares, followed(known @ shares)]
    passed = sum(np.where(part < 0.03 * part.max(), 0, part) for part in parts)
    return np.stack([followed(known), passed, known @ shares])


@pytest.mark.parametrize(("count", "steps"), [(1, 3), (2, 1), (4, 2)])
def test_what_texts_pass_on_against_plain_loops(count, steps):
    rng = np.random.default_rng(count)
    rows = [rng.integers(0, ITEMS, length).tolist() for length in rng.integers(0, 5, 6)]
    config = SuccessorConfig(steps=steps, alike=count, alike_temperature=0.3)
    successors = Successors(CSR.from_lists(rows), ITEMS, config, TEXTS)
    users = rng.permutation(6)
    histories = [rows[user] + rng.integers(0, ITEMS, 2).tolist() for user in users]
    shown = CSR.from_lists(histories)
    cells = successors.after(users, shown, np.append(np.arange(len(shown.indices)), -1))
    places = [
        (user, history[: n + 1]) for user, history in zip(users, histories, strict=True) for n in range(len(history))
    ]
    left_out = 0
    for place, (user, history) in enumerate(places):
        cell, expected = cells.part(place, place + 1), passed_on(rows, user, history, config)
        assert cell.items.tolist() == np.flatnonzero((expected > 1e-6).any(0)).tolist()
        np.testing.assert_allclose(cell.weights.numpy(), expected[:, cell.items.numpy()].T, rtol=1e-5, atol=1e-6)
        left_out += len(cell.items) < ITEMS
    assert left_out > 0
    assert not len(cells.part(len(places), len(places) + 1).items)  # of an empty history


def test_what_texts_pass_on_is_known_from_others_alone():
    config, others = SuccessorConfig(alike=2), TRAIN[1:]
    seen = []
    for own in ([0, 1], [0, 1, 5, 4], [5, 0, 1, 0, 3], [4]):
        successors = Successors(CSR.from_lists([own, *others]), ITEMS, config, TEXTS)
        seen.append(successors.after(np.array([0]), CSR.from_lists([[0, 1]]), np.array([1])))
    assert len(seen[0].items) > 3
    for one in seen[1:]:
        assert one.items.tolist() == seen[0].items.tolist()
        torch.testing.assert_close(one.weights, seen[0].weights)


def test_where_texts_pass_on_and_there_is_nothing():
    successors = Successors(CSR.from_lists([[], []]), ITEMS, SuccessorConfig(alike=2), TEXTS)
    cells = successors.after(np.array([0, 1]), CSR.from_lists([[], []]), np.array([-1, -1]))
    assert (len(cells), cells.weights.shape) == (2, (0, 3))
    none = np.zeros(0, dtype=np.int64)
    assert successors.after(none, CSR.from_lists([]), none).weights.shape == (0, 3)


def test_rows_of_other_users_are_refused():
    successors = Successors(CSR.from_lists(TRAIN), ITEMS, SuccessorConfig())
    with pytest.raises(ValueError, match="1 users but 2 rows of items"):
        successors.after(np.array([0]), CSR.from_lists([[0], [1]]), np.array([0, 1]))


def test_what_a_user_took_is_known_from_others_alone():
    """Whatever else the user has taken later, before, or twice, the user's own successors stay."""
    others = [row for row in TRAIN[1:]]
    seen = [after([own, *others], [[0, 1]], [1]) for own in ([0, 1], [0, 1, 5, 4], [5, 0, 1, 0, 3], [4])]
    assert all(one == seen[0] for one in seen)


def test_without_interactions_there_is_nothing():
    assert after([[], []], [[0, 1], []], [1, -1]) == [{}, {}]
    assert after(TRAIN, [[], []], [-1, -1]) == [{}, {}]
    assert after(TRAIN, [[1], []], []) == []


def test_their_logits_by_hand_and_what_trains_them():
    model = SuccessorLogits()
    model.trained.data = torch.tensor([0.7, math.log(2.0)])
    logits = model(torch.tensor([0.5, 3.0, 1.0]))
    expected = [0.7 * math.log(1 + s / 2) for s in (0.5, 3.0, 1.0)]
    torch.testing.assert_close(logits, torch.tensor(expected))
    (gradient,) = torch.autograd.grad(logits.sum(), model.trained)
    by_share = sum(math.log(1 + s / 2) for s in (0.5, 3.0, 1.0))
    by_floor = sum(-0.7 * s / (2 + s) for s in (0.5, 3.0, 1.0))
    torch.testing.assert_close(gradient, torch.tensor([by_share, by_floor]))


def test_logits_of_three_numbers_by_hand_and_what_trains_them():
    model = SuccessorLogits(3)
    with torch.no_grad():
        model.trained[:] = torch.tensor([[0.7, 0.2, -0.1], [math.log(2.0), 0.0, math.log(0.5)]])
    found = torch.tensor([[0.5, 0.0, 3.0], [0.0, 1.0, 0.0]])
    logits = model(found)
    expected = [0.7 * math.log(1.25) - 0.1 * math.log(7.0), 0.2 * math.log(2.0)]
    torch.testing.assert_close(logits, torch.tensor(expected))
    (gradient,) = torch.autograd.grad(logits.sum(), model.trained)
    by_share = [math.log(1.25), math.log(2.0), math.log(7.0)]
    by_floor = [-0.7 * 0.5 / 2.5, -0.2 * 1 / 2, 0.1 * 3 / 3.5]
    torch.testing.assert_close(gradient, torch.tensor([by_share, by_floor]))

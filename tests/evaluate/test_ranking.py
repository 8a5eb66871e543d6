import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate.ranking import evaluate_scores, top_k


def test_best_first_and_masked_items_left_out():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7], [4.0, 3.0, 2.0, 1.0]])
    masks = [CSR.from_lists([[1], []]), CSR.from_lists([[], [0, 2]])]
    assert top_k(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert top_k(scores, 2, masks).tolist() == [[3, 2], [1, 3]]
    assert scores[0, 1] == pytest.approx(0.9)  # the caller's scores are left as they were


def test_short_rows_are_padded():
    mask = CSR.from_lists([[0, 2]])
    assert top_k(torch.ones(1, 3), 2, [mask]).tolist() == [[1, -1]]
    assert top_k(torch.tensor([[1.0, 2.0]]), 4).tolist() == [[1, 0, -1, -1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_keep_the_order_of_the_scores(dtype):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(-3, 4, (50, 30))).to(dtype)
    ranked = scores.gather(1, top_k(scores, 8))
    assert torch.equal(ranked, scores.sort(descending=True).values[:, :8])


def test_minus_zero_ties_with_zero():
    scores = torch.tensor([[0.0, -0.0]]).expand(400, 2)
    assert 140 < int(top_k(scores, 1).sum()) < 260  # 200 expected, standard deviation 10


def test_every_tied_item_is_equally_likely_at_every_place():
    places = top_k(torch.zeros(6000, 6), 3)
    for place in range(3):
        counts = places[:, place].bincount(minlength=6)
        assert (counts - 1000).abs().max() < 5 * np.sqrt(6000 / 6 * 5 / 6)


def test_a_constant_scorer_gets_chance_wherever_the_targets_are():
    num_users, num_items = 4000, 50
    for item in (0, num_items - 1):
        targets = CSR.from_lists([[item]] * num_users)
        sums = evaluate_scores(
            lambda users: torch.full((len(users), num_items), 0.5),
            np.arange(num_users),
            targets,
            [],
            num_items,
            ks=(10,),
        )
        chance = 10 / num_items
        assert abs(sums.result()["hit@10"] - chance) < 4 * np.sqrt(chance * (1 - chance) / num_users)


def test_result_does_not_depend_on_chunks_or_order():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 3, (40, 25))).float()
    targets = CSR.from_lists([rng.choice(25, 2, replace=False) for _ in range(40)])
    masks = [CSR.from_lists([rng.choice(25, 5, replace=False) for _ in range(40)])]

    def result(users, chunk, seed=0):
        score = lambda rows: scores[torch.from_numpy(rows)]  # noqa: E731
        return evaluate_scores(score, users, targets, masks, 25, chunk=chunk, seed=seed).result()

    expected = result(np.arange(40), chunk=40)
    assert result(np.arange(40)[::-1].copy(), chunk=7) == pytest.approx(expected)
    assert result(np.arange(40), chunk=40, seed=1) != pytest.approx(expected)


def test_a_masked_target_is_a_miss_and_users_without_targets_are_not_scored():
    def score(users):
        assert users.tolist() == [0, 2]
        return torch.tensor([[3.0, 2.0, 1.0]]).expand(2, 3)

    targets, mask = CSR.from_lists([[0], [], [0]]), CSR.from_lists([[0], [], []])
    sums = evaluate_scores(score, np.arange(3), targets, [mask], 3, ks=(1,))
    assert sums.users == 2
    assert sums.result()["hit@1"] == 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(value):
    with pytest.raises(InputError, match="row 1, item 2"):
        top_k(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, value]]), 1)


@pytest.mark.parametrize("items", [5_003, 40_000])  # strips, and strips of strips
def test_long_rows_are_ranked_as_a_sort_does(items):
    """The greatest of strips choose where to look: whole ranks, ties across the cut and masks as in a full sort."""
    drawn = torch.Generator().manual_seed(0)
    scores = torch.randn(6, items, generator=drawn)
    scores[1] = scores[1].round(decimals=1)  # ties everywhere
    scores[2] = -torch.arange(items)  # all of the best in other strips
    scores[3, ::700] = 9 + torch.arange(len(scores[3, ::700]))  # far apart
    scores[4, -10:] = 50.0 + torch.arange(10)  # in what is left over
    mask = CSR.from_lists([[], [0], [0, 1], [0], [items - 1], range(items - 3)])
    wanted = scores.clone()
    wanted[torch.from_numpy(mask.rows), torch.from_numpy(np.asarray(mask.indices)).long()] = -torch.inf
    order = wanted.sort(descending=True, stable=True)
    before, found = scores.clone(), top_k(scores, 10, [mask])
    assert torch.equal(wanted.gather(1, found.clamp(min=0))[:5], order.values[:5, :10])
    for row in (0, 2, 3, 4):
        assert found[row].tolist() == order.indices[row, :10].tolist()
    assert sorted(found[5].tolist()) == [-1] * 7 + [items - 3, items - 2, items - 1]
    assert torch.equal(scores, before)


def test_rows_that_share_their_memory_have_masks_of_their_own():
    scores = torch.tensor([[3.0, 2.0, 1.0]]).expand(2, 3)
    assert top_k(scores, 1, [CSR.from_lists([[0], []])]).tolist() == [[1], [0]]

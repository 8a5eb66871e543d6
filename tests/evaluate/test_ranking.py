import numpy as np
import pytest
import torch

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate import ranking
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


def by_sorting(scores: torch.Tensor, k: int, masks: list[CSR], seed: int = 0) -> torch.Tensor:
    """`top_k` by a sort of all items of each row, equal scores by the hash that the module says."""
    scores = scores.float().clone()
    for mask in masks:
        scores[torch.from_numpy(mask.rows), torch.from_numpy(np.asarray(mask.indices)).long()] = -torch.inf
    items = torch.arange(scores.shape[1]).expand_as(scores)
    order = ranking._tie_free(scores, items, np.arange(len(scores)), seed).argsort(descending=True)[:, :k]
    return order.masked_fill(scores.gather(1, order) == -torch.inf, -1)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [30, 5_003, 40_000])  # a row at once, strips, and strips of strips
def test_rows_are_ranked_as_a_sort_does(items, dtype, overwrite):
    """Also where more items than places score the same, where nearly all do, and where few are left."""
    scores = torch.randn(7, items, generator=torch.Generator().manual_seed(0))
    scores[1] = scores[1].round(decimals=1)
    scores[2] = -torch.arange(items)  # the best are far apart
    scores[3] = 0.5
    scores[4, 3:] = -9.0
    scores[5, -10:] = 50.0 + torch.arange(10) // 2  # in what the strips leave over
    scores = scores.to(dtype)
    masks = [CSR.from_lists([[], [0], [0, 1], [5, 5], [1], [items - 1], range(items - 3)]), CSR.from_lists([[2]] * 7)]
    before = scores.clone()
    assert torch.equal(top_k(scores, 10, masks, seed=3, overwrite=overwrite), by_sorting(before, 10, masks, seed=3))
    assert overwrite or torch.equal(scores, before)


def test_rows_that_share_their_memory_have_masks_of_their_own():
    scores = torch.tensor([[3.0, 2.0, 1.0]]).expand(2, 3)
    mask = CSR.from_lists([[0], []])
    assert top_k(scores, 1, [mask], overwrite=True).tolist() == [[1], [0]]
    overlapping = torch.tensor([3.0, 2.0, 1.0, 0.0]).unfold(0, 3, 1)
    assert top_k(overlapping, 1, [CSR.from_lists([[1], []])], overwrite=True).tolist() == [[0], [0]]


def test_scores_may_be_of_a_graph_or_of_inference_mode():
    mask = CSR.from_lists([[0], [1]])
    leaf = torch.tensor([[3.0, 2.0, 1.0]] * 2, requires_grad=True)
    scores = leaf.softmax(-1)
    assert top_k(scores, 1, [mask]).tolist() == [[1], [0]]
    scores[0, 0].backward()
    with torch.inference_mode():
        scores = torch.tensor([[3.0, 2.0, 1.0]] * 2)
    assert top_k(scores, 1, [mask]).tolist() == [[1], [0]]


def test_no_rows_and_no_items():
    assert top_k(torch.zeros(0, 5), 2).shape == (0, 2)
    assert top_k(torch.zeros(2, 0), 2).tolist() == [[-1, -1]] * 2

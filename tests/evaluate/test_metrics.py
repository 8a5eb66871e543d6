import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from raygrec.data.arrays import CSR
from raygrec.errors import InputError
from raygrec.evaluate.metrics import MetricSums


def test_values_worked_out_by_hand():
    sums = MetricSums((2, 3), num_items=6)
    sums.add(torch.tensor([[4, 1, 0], [5, 2, 3]]), CSR.from_lists([[0, 1, 5], [4]]))
    result = sums.result()
    discount = 1 / np.log2([2, 3, 4])
    assert result["precision@2"] == pytest.approx((1 / 2 + 0) / 2)
    assert result["recall@3"] == pytest.approx((2 / 3 + 0) / 2)
    assert result["hit@3"] == pytest.approx(1 / 2)
    assert result["ndcg@2"] == pytest.approx(discount[1] / discount[:2].sum() / 2)  # ideal list: two targets
    assert result["ndcg@3"] == pytest.approx(discount[1:].sum() / discount.sum() / 2)
    assert result["mrr@2"] == pytest.approx(1 / 2 / 2)
    assert result["coverage@2"] == pytest.approx(4 / 6)
    assert result["coverage@3"] == pytest.approx(6 / 6)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_agrees_with_torchmetrics_and_scikit_learn(k):
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.random((12, 40)))
    targets = CSR.from_lists([rng.choice(40, size, replace=False) for size in rng.integers(1, 15, 12)])
    relevant = torch.zeros(12, 40, dtype=torch.long)
    relevant[torch.from_numpy(targets.rows), torch.from_numpy(targets.indices).long()] = 1
    sums = MetricSums((k,), num_items=40)
    sums.add(scores.topk(k).indices, targets)
    result = sums.result()
    others = {
        "precision": retrieval_precision,
        "recall": retrieval_recall,
        "hit": retrieval_hit_rate,
        "mrr": retrieval_reciprocal_rank,
    }
    for name, other in others.items():
        expected = np.mean([float(other(row, wanted, top_k=k)) for row, wanted in zip(scores, relevant, strict=True)])
        assert result[f"{name}@{k}"] == pytest.approx(expected), name
    assert result[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevant.numpy(), scores.numpy(), k=k))


def test_padding_never_hits_and_a_repeated_item_hits_once():
    sums = MetricSums((4,), num_items=3)
    # Row 1 padded with -1: its key must not be mistaken for item 2 of row 0.
    sums.add(torch.tensor([[1, 1, 2, -1], [-1, -1, -1, -1]]), CSR.from_lists([[1, 2], [0]]))
    result = sums.result()
    assert result["precision@4"] == pytest.approx(2 / 4 / 2)
    assert result["recall@4"] == pytest.approx(1 / 2)
    assert result["coverage@4"] == pytest.approx(2 / 3)


def test_repeated_targets_count_once_and_users_without_targets_are_left_out():
    sums = MetricSums((1,), num_items=3)
    sums.add(torch.tensor([[0], [1], [2]]), CSR.from_lists([[0, 0], [], [2]]))
    assert sums.users == 2
    assert sums.result()["recall@1"] == 1.0


def test_workers_add_up_by_merge_and_by_tensor():
    rng = np.random.default_rng(1)
    lists = torch.from_numpy(rng.permuted(np.tile(np.arange(9), (6, 1)), axis=1)[:, :3])
    targets = CSR.from_lists([rng.choice(9, 2, replace=False) for _ in range(6)])
    whole, first, second = (MetricSums((1, 3), num_items=9) for _ in range(3))
    whole.add(lists, targets)
    first.add(lists[:2], targets.take(np.arange(2)))
    second.add(lists[2:], targets.take(np.arange(2, 6)))
    reduced = MetricSums.from_tensor(first.as_tensor() + second.as_tensor(), (1, 3), 9)
    first.merge(second)
    assert first.result() == pytest.approx(whole.result())
    assert reduced.result() == pytest.approx(whole.result())


def test_wrong_use_is_an_input_error():
    with pytest.raises(InputError, match="positive"):
        MetricSums((0,), num_items=3)
    with pytest.raises(InputError, match="no user has a target"):
        MetricSums((1,), num_items=3).result()
    with pytest.raises(InputError, match="k is 5"):
        MetricSums((5,), num_items=9).add(torch.zeros(1, 3, dtype=torch.long), CSR.from_lists([[0]]))
    with pytest.raises(InputError, match="cannot be added"):
        MetricSums((5,), num_items=9).merge(MetricSums((10,), num_items=9))
